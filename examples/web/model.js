// The landmark model and the face detector (utils/predictor.py, utils/detection/detector.py).
import { clip, cut, resize, round } from './image.js';

export const rules = await (await fetch(new URL('rules.json', import.meta.url))).json();
export const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
export const mid = (points) => [0, 1].map((axis) => mean(points.map((point) => point[axis])));
export const add = (a, b, factor = 1) => [a[0] + factor * b[0], a[1] + factor * b[1]];
export const side = (box) => Math.max(box[2] - box[0], box[3] - box[1]);
export const around = (centre, half) => [-1, 1].flatMap((sign) => add(centre, half, sign));
export const centre = (box) => mid([box.slice(0, 2), box.slice(2, 4)]);
/** Rotate a point clockwise by roll in radians about a pivot. */
export function rotate(point, pivot, roll) {
  const cos = Math.cos(roll), sin = Math.sin(roll), [x, y] = add(point, pivot, -1);
  return add(pivot, [cos * x - sin * y, sin * x + cos * y]);
}
export function iou(a, b) {
  const area = (box) => Math.max(box[2] - box[0], 0) * Math.max(box[3] - box[1], 0);
  const shared = area([0, 1, 2, 3].map((i) => Math[i < 2 ? 'max' : 'min'](a[i], b[i])));
  return shared / Math.max(area(a) + area(b) - shared, 1e-9);
}

/** Return [number, bytes] of each field of a protobuf message that has a length. */
function fields(bytes) {
  const found = [];
  let at = 0;
  const varint = (value = 0, unit = 1) => (bytes[at] > 127
    ? varint(value + (bytes[at++] - 128) * unit, unit * 128) : value + bytes[at++] * unit);
  while (at < bytes.length) {
    const tag = varint(), kind = tag % 8, value = kind % 2 ? 0 : varint(), start = at;
    at += { 0: 0, 1: 8, 2: value, 5: 4 }[kind] ?? Infinity;
    if (kind === 2) found.push([Math.floor(tag / 8), bytes.subarray(start, at)]);
  }
  return found;
}

/** Load an .onnx of main.py --export, with its metadata: field 14 of the file, pairs of strings. */
export async function loadModel(ort, bytes) {
  const pairs = fields(bytes).filter(([number]) => number === 14).map(([, pair]) => fields(pair)
    .map(([, text]) => new TextDecoder().decode(text))), found = Object.fromEntries(pairs);
  const [size, crop, scheme, eyes] = ['input_size', 'crop', 'scheme', 'eyes'].map(
    (key) => JSON.parse(found[key] ?? 'null'));
  if (!crop || !eyes) throw Error('this model is not of main.py --export, or has no eyes');
  const session = await ort.InferenceSession.create(bytes);
  /** Predict {points in pixels, confidence} in boxes turned by rolls; refine.predict_boxes. */
  async function predict(frame, boxes, rolls) {
    const crops = new Uint8Array(boxes.length * 3 * size * size);
    boxes.forEach((box, i) => cut(frame, box, size, rolls[i], crops, i * 3 * size * size));
    const images = new ort.Tensor('uint8', crops, [boxes.length, 3, size, size]);
    const { landmarks: { data, dims: [, count] }, confidence } = await session.run({ images });
    return boxes.map((box, n) => ({
      confidence: Array.from(confidence.data.subarray(n * count, (n + 1) * count)),
      points: Array.from({ length: count }, (_, i) => rotate([0, 1].map((axis) => box[axis]
        + data[2 * (n * count + i) + axis] * (box[axis + 2] - box[axis])), centre(box), rolls[n])),
    }));
  }
  return { predict, crop, scheme, eyes };
}

/** Load a YuNet .onnx: a function that returns rough crops of the faces of a frame, best first:
 * Detector.to_crop of the boxes of cv2.FaceDetectorYN; scale is that of the landmark model. */
export async function loadDetector(ort, bytes) {
  const session = await ort.InferenceSession.create(bytes);
  const [{ name, shape: [, , size] }] = session.inputMetadata;
  const { STRIDES, CROP_TRANSFORMS: { yunet: [dx, dy, ratio] } } = rules.detector;
  if (!session.outputNames.includes('bbox_8')) throw Error('this detector is not YuNet');
  return async (frame, scale) => {
    // The frame fills the top left of a black square of planes B, G, R.
    const from = [frame.width, frame.height], planes = new Float32Array(3 * size * size);
    const zoom = size / Math.max(...from), to = from.map((side) => Math.max(1, round(side * zoom)));
    resize(frame, [0, 0], from, to).data.forEach((value, at) => {
      const pixel = at >> 2, x = pixel % to[0], y = (pixel - x) / to[0];
      if (at % 4 < 3) planes[((2 - at % 4) * size + y) * size + x] = value;
    });
    const images = new ort.Tensor('float32', planes, [1, 3, size, size]);
    const maps = await session.run({ [name]: images });
    const boxes = STRIDES.flatMap((stride) => {
      const [cls, obj, bbox] = ['cls', 'obj', 'bbox'].map((kind) => maps[`${kind}_${stride}`].data);
      return Array.from(cls, (value, i) => {
        const score = Math.sqrt(clip(value, 0, 1) * clip(obj[i], 0, 1)), columns = size / stride;
        const [x, y, w, h] = bbox.subarray(4 * i, 4 * i + 4), cell = [i % columns, i / columns | 0];
        const box = around(add(cell, [x, y]), [Math.exp(w) / 2, Math.exp(h) / 2]);
        return [...box.map((v) => v * stride), score];
      });
    }).filter((box) => box[4] >= 0.6).sort((a, b) => b[4] - a[4]).slice(0, 100);
    // OpenCV truncates corner and size to whole numbers before it compares boxes.
    const whole = ([x, y, x2, y2]) => [x, y, Math.trunc(x) + Math.trunc(x2 - x),
      Math.trunc(y) + Math.trunc(y2 - y)].map(Math.trunc);
    const kept = boxes.reduce((best, box) => (
      best.some((one) => iou(whole(one), whole(box)) > 0.3) ? best : [...best, box]), []);
    return kept.map((one) => one.slice(0, 4).map((v) => (v + 0.5) / zoom - 0.5)).map((box) => {
      const half = side(box) * ratio * scale / 2;
      return around(add(centre(box), [dx, dy], side(box)), [half, half]);
    });
  };
}
