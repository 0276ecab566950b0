// One face in a film (utils/detection/refine.py, utils/tracking, the largest face of driver.py).
import { add, around, centre, iou, mean, mid, rotate, rules, side } from './model.js';

const { refine: R, tracker: T, one_euro: F } = rules;

/** Fit the mean face to landmarks: a complex factor in pixels per crop unit. */
function similarity(points, { mean_face: face }) {
  const from = mid(face), to = mid(points), sum = (term) => points.reduce((total, point, i) => (
    total + term(...add(point, to, -1), ...add(face[i], from, -1))), 0);
  const norm = sum((x, y, u, v) => u * u + v * v);
  return [sum((x, y, u, v) => x * u + y * v) / norm, sum((x, y, u, v) => y * u - x * v) / norm];
}

/** Return the crop of landmarks by the training rule; crop.face_boxes. */
function faceBox(points, { crop, scheme }) {
  if (crop.rule === 'box' || scheme.base) {
    const [re, im] = similarity(points, scheme), half = Math.max(Math.hypot(re, im), 1) / 2;
    const [x, y] = add([0.5, 0.5], mid(scheme.mean_face), -1);
    return around(add(mid(points), [re * x - im * y, re * y + im * x]), [half, half]);
  }
  const [low, high] = [Math.min, Math.max].map(
    (limit) => [0, 1].map((axis) => limit(...points.map((point) => point[axis]))));
  const sides = add(high, low, -1).map((length) => Math.max(length, 1));
  const least = Math.max(...sides) * (crop.rule === 'square' ? 1 : rules.crop.MIN_ASPECT);
  return around(mid([low, high]), sides.map((length) => Math.max(length, least) * crop.scale / 2));
}

/** Return the [crop, roll] around landmarks; refine.place_crops. */
function placeCrop(points, model) {
  const [re, im] = similarity(points, model.scheme), angle = Math.atan2(im, re);
  const roll = Math.sign(angle) * Math.max(Math.abs(angle) - R.MAX_UPRIGHT_ROLL, 0);
  const pivot = mid(points), upright = points.map((point) => rotate(point, pivot, -roll));
  const box = faceBox(upright, model);
  const shift = add(rotate(centre(box), pivot, roll), centre(box), -1);
  return [box.map((value, i) => value + shift[i % 2]), roll];
}

const moved = (box, other) => box.some((v, i) => Math.abs(v - other[i]) > R.TOLERANCE * side(box));

/** Predict {points, confidence, box} from a rough crop; refine.refine. */
export async function refine(model, frame, box) {
  let [face] = await model.predict(frame, [box], [0]);
  if (mean(face.confidence) < R.MIN_UPRIGHT_CONFIDENCE) { // Try crops of turned heads.
    const pivot = add(centre(box), [0, -R.CENTRE_SHIFT * side(box)]), half = side(box) / 2;
    const crops = R.TRIAL_ROLLS.map(
      (roll) => around(rotate(centre(box), pivot, roll), [half, half]));
    const trials = await model.predict(frame, crops, R.TRIAL_ROLLS);
    const sure = trials.map((one) => mean(one.confidence)), best = sure.indexOf(Math.max(...sure));
    const least = Math.max(R.FACE_MARGIN * model.eyes.face, R.MIN_GAIN * mean(face.confidence));
    if (sure[best] > least) [face, box] = [trials[best], crops[best]];
  }
  for (let pass = 1, again = true; pass < 4 && again; pass++) {
    const [placed, roll] = placeCrop(face.points, model);
    [again, box] = [moved(box, placed), placed];
    [face] = await model.predict(frame, [box], [roll]);
  }
  return { ...face, box };
}

/** Return a function that smooths the landmarks of a face; one_euro.FaceFilter. */
export function faceFilter(lids) {
  const alpha = (cutoff, period) => 1 / (1 + 1 / (2 * Math.PI * cutoff * period));
  let rows, speeds;
  return (points, length, period) => {
    const next = [mid(points), ...points.map((point) => add(point, mid(points), -1))];
    speeds ??= next.map(() => [0, 0]);
    rows = rows ? next.map((row, i) => {
      const lid = lids.includes(i - 1), change = add(row, rows[i], -1);
      const share = alpha(lid ? F.LID_D_CUTOFF : F.D_CUTOFF, period);
      speeds[i] = add(speeds[i], add(change.map((v) => v / period), speeds[i], -1), share);
      const cutoff = T.filter_min_cutoff * (i ? 1 : F.CENTRE_CUTOFF_FACTOR)
        + Math.hypot(...speeds[i]) * T.filter_beta * (lid ? F.LID_BETA_FACTOR : 1) / length;
      return add(rows[i], change, alpha(cutoff, period));
    }) : next;
    return rows.slice(1).map((row) => add(row, rows[0]));
  };
}

/** Follows the largest, most central face, and looks for one where there is none. */
export class Tracker {
  face = null; frames = 0; next = 0; lost = -Infinity;
  constructor(model, detect) {
    [this.model, this.detect] = [model, detect];
    const { face, min_confidence: eyes } = model.eyes;
    this.least = face || T.EYE_CONFIDENCE_FACTOR * eyes || T.MIN_CONFIDENCE;
  }
  /** Return {raw, points, confidence, box} of the next frame, or null where there is no face. */
  async update(frame, time) {
    const { model, face: last } = this;
    if (last) {
      const roll = placeCrop(last.raw, model)[1];
      let [found] = await model.predict(frame, [last.box], [roll]);
      let placed = placeCrop(found.points, model);
      if (moved(last.box, placed[0])) {
        [found] = await model.predict(frame, [placed[0]], [placed[1]]);
        placed = placeCrop(found.points, model);
      }
      found.box = placed[0];
      if (this.isFace(found, frame)) this.take(found, time, last);
      else [this.face, this.lost] = [null, last.time];
    }
    if ((last && !this.face) || this.frames >= this.next) await this.look(frame, time);
    this.frames++;
    return this.face;
  }
  isFace({ confidence, box }, { width, height }) {
    const [x, y] = centre(box);
    return x >= 0 && x < width && y >= 0 && y < height && mean(confidence) >= this.least;
  }
  take(found, time, last) {
    const { 'right eye': right, 'left eye': left } = this.model.scheme.regions;
    const smooth = last?.smooth ?? faceFilter([...right, ...left]);
    const points = smooth(found.points, side(found.box), Math.max(time - last?.time, 1e-3));
    this.face = { ...found, raw: found.points, points, smooth, time };
  }
  async look(frame, time) {
    const { model, face } = this, middle = [frame.width / 2, frame.height / 2];
    const shows = (crop, box) => iou(crop, box) > 0 && centre(box).every(
      (value, axis) => value > crop[axis] && value < crop[axis + 2]);
    this.next = this.frames + T.detect_every;
    // Whether it is detected matters only to a face of low confidence.
    if (face && mean(face.confidence) >= T.UNDETECTED_FACTOR * this.least) return;
    const crops = await this.detect(frame, model.crop.scale);
    if (face && crops.some((crop) => shows(crop, face.box))) return;
    if (face) [this.face, this.lost] = [null, time];
    let best = 0;
    for (const crop of crops) {
      const found = await refine(model, frame, crop), off = add(centre(found.box), middle, -1);
      const score = side(found.box) * (1 - Math.hypot(...off) / Math.hypot(...middle));
      if (score <= best || !this.isFace(found, frame) || !shows(crop, found.box)) continue;
      this.take(found, time);
      best = score;
    }
    // A lost face is searched for more often than a new one.
    const soon = !this.face && time - this.lost <= T.LOST_SECONDS;
    if (soon) this.next = this.frames + Math.max(1, Math.floor(T.detect_every / 3));
  }
}
