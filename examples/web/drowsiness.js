// Eyes and drowsiness of one person, as in utils/drowsiness/eyes.py and states.py.
import { clip } from './image.js';
import { add, mean, rules } from './model.js';

const { states: S, eyes: E } = rules, SLACK = S._TOLERANCE;
const lasts = ([start, end], seconds) => end - start >= seconds - SLACK;
function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b), at = share * (values.length - 1);
  const low = sorted[Math.floor(at)];
  return low + (sorted[Math.ceil(at)] - low) * (at % 1);
}

/** Return {openness of the right and left eye or null, closed or null}; eyes.read_eyes. */
export function readEyes({ raw, confidence }, { scheme, eyes }, { width, height }) {
  const contours = ['right eye', 'left eye'].map((name) => scheme.regions[name]);
  const distance = (a, b) => Math.hypot(...add(raw[a], raw[b], -1));
  const widths = contours.map((eye) => distance(eye[0], eye[eye.length / 2]));
  const least = Math.max(E.MIN_WIDTH, E.MIN_WIDTH_RATIO * Math.max(...widths));
  const openness = contours.map((eye, i) => {
    const points = eye.map((k) => raw[k]), middle = eye.length / 2;
    const inside = points.every(([x, y]) => Math.min(x, y, width - 1 - x, height - 1 - y) >= 0);
    const sure = mean(eye.map((k) => confidence[k])) >= eyes.min_confidence;
    if (widths[i] < least || !sure || !inside) return null;
    const gaps = eye.slice(1, middle).map((k, j) => distance(k, eye[eye.length - 1 - j]));
    return clip((mean(gaps) / widths[i] - eyes.shut) / (eyes.open - eyes.shut), 0, 1);
  });
  const judged = openness.filter((value) => value !== null);
  return { openness, closed: judged.length ? mean(judged) <= eyes.closed_below : null };
}

/** The time during which a condition holds; short interruptions (gaps) do not end it. */
class Interval {
  start = null; gap = null;
  update(holds, time, maxGap = S.OPEN_GAP, since = -Infinity) {
    if (holds) [this.start, this.gap, this.last] = [this.start ?? time, null, time];
    else if (this.start !== null) this.gap ??= time;
    const ends = this.gap !== null && time - Math.max(this.gap, since) >= maxGap - SLACK;
    return ends ? this.finish(time) : null;
  }
  finish(time) {
    const ended = this.start === null ? null : [this.start, this.end(time)];
    this.start = this.gap = null;
    return ended;
  }
  end(time) { return this.gap === null ? time : Math.min(this.gap, this.last + S.MAX_END_DELAY); }
}

/** Drowsiness of one person; update returns the events {kind, start, end} that have ended. */
export class Drowsiness {
  state = 'not visible'; perclos = null; blinksPerMinute = null; eyesClosed = false; interval = 0;
  closed = new Interval(); half = new Interval(); held = new Interval(); drowsyUntil = -Infinity;
  steps = []; blinks = []; levels = []; intervals = []; openLevel = S.MAX_OPEN_LEVEL;
  update(openness, closed, time) {
    const judged = openness.filter((value) => value !== null), seen = closed !== null;
    const step = Math.max(time - (this.time ?? time), 0), events = [];
    if (step) this.intervals = [...this.intervals, step].slice(-S.MEDIAN_INTERVALS);
    if (step) this.interval = quantile(this.intervals, 0.5);
    const limit = Math.max(S.MAX_GAP, S.GAP_INTERVALS * this.interval);
    this.maxGap = Math.min(limit, S.MAX_INTERVAL) + SLACK;
    const observed = seen && this.wasSeen && step <= this.maxGap;
    this.lastSeen ??= time;
    const gap = time - this.lastSeen;
    if (gap > this.maxGap) {
      const closing = this.closed.start !== null && this.closed.gap === null;
      const ends = !closing || gap > S.MAX_CLOSED_GAP + SLACK || (seen && !closed);
      if (ends) events.push(...this.end(this.lastSeen));
      if (seen) events.push({ kind: 'not visible', start: this.lastSeen, end: time });
      if (seen) this.stillClosed = this.eyesClosed && closed;
    }
    if (seen) {
      closed = this.follow(mean(judged), closed, time, events);
      this.stillClosed = this.stillClosed && closed;
      [this.lastSeen, this.everSeen] = [time, true];
    }
    const length = observed || !step ? Math.min(step, S.WINDOW) : 0;
    this.steps.push([time, length, observed && closed ? length : 0]);
    while (this.steps[0][0] <= time - S.WINDOW) this.steps.shift();
    [this.time, this.wasSeen] = [time, seen];
    this.count(events, time);
    this.decide(time);
    return events;
  }
  /** Return the events that had not ended at the last frame. */
  finish() {
    const [start, end] = [this.lastSeen, this.time], away = end - start > this.maxGap;
    if (end === undefined) return [];
    const hidden = away ? [{ kind: 'not visible', start, end }] : [];
    return [...this.end(away ? start : end), ...hidden];
  }
  /** Add a level of the lids; return whether they are closed or held nearly closed. */
  follow(level, closed, time, events) {
    this.learn(level, time);
    const below = (share) => closed || level < share * this.openLevel;
    const half = below(this.half.start === null ? S.BLINK_CLOSE_LEVEL : S.BLINK_OPEN_LEVEL);
    const nearly = below(S.NEARLY_CLOSED), held = below(S.HELD_CLOSED);
    this.wideSince = nearly ? null : this.wideSince ?? time;
    const [maxGap, since] = nearly ? [S.NEARLY_CLOSED_GAP, -Infinity]
      : [half ? S.HALF_OPEN_GAP : S.OPEN_GAP, this.wideSince];
    this.held.update(held, time, maxGap, since);
    const { start } = this.held;
    if (nearly && start !== null && time - start >= S.HELD_SECONDS - SLACK) {
      closed = true;
      this.closed.start = Math.min(start, this.closed.start ?? start);
    }
    const closure = this.withLids(this.closed.update(closed, time, maxGap, since), time);
    events.push(...this.classify(closure, this.half.update(half, time)));
    return closed;
  }
  end(time) {
    this.held.finish(time);
    this.wideSince = null;
    const closure = this.withLids(this.closed.finish(time), time), opened = this.half.gap !== null;
    return this.classify(closure, this.half.finish(time), opened);
  }
  /** Extend the [start, end] of closed eyes by the closing and opening of the lids. */
  withLids(closure, time) {
    return closure && [Math.max(closure[0] - S.LID_SECONDS, this.half.start),
      Math.min(closure[1] + S.LID_SECONDS, this.half.end(time))];
  }
  classify(closure, half, opened = true) {
    const long = closure && lasts(closure, S.MICROSLEEP_SECONDS), events = [];
    if (long) events.push([lasts(closure, S.SLEEP_SECONDS) ? 'sleep' : 'microsleep', ...closure]);
    const brief = half && lasts(half, S.BLINK_MIN_SECONDS) && !lasts(half, S.BLINK_MAX_SECONDS);
    if (opened && brief && !this.slept && !long) events.push(['blink', ...half]);
    this.slept = !half && (this.slept || long);
    return events.map(([kind, start, end]) => ({ kind, start, end }));
  }
  /** Learn once a second how open this person's eyes typically are. */
  learn(level, time) {
    this.levels.push([time, level]);
    this.nextLearning ??= time + 1;
    if (time < this.nextLearning) return;
    this.nextLearning = time + 1;
    this.levels = this.levels.filter(([when]) => when > time - S.WINDOW);
    const typical = quantile(this.levels.map(([, value]) => value), 0.75);
    this.openLevel = clip(typical, S.MIN_OPEN_LEVEL, S.MAX_OPEN_LEVEL);
  }
  count(events, time) {
    const ends = (kind) => events.filter((event) => event.kind === kind).map(({ end }) => end);
    this.drowsyUntil = Math.max(this.drowsyUntil, ...ends('sleep').map((end) => end + S.WINDOW));
    this.blinks = [...this.blinks, ...ends('blink')].filter((end) => end > time - S.WINDOW);
    const [seen, closed] = [1, 2].map((k) => this.steps.reduce((sum, one) => sum + one[k], 0));
    const enough = seen >= S.MIN_SEEN - SLACK;
    this.perclos = enough ? closed / seen : null;
    this.blinksPerMinute = enough ? this.blinks.length * 60 / seen : null;
  }
  decide(time) {
    const { perclos, closed, maxGap } = this;
    const limit = S[this.drowsy ? 'AWAKE_PERCLOS' : 'DROWSY_PERCLOS'];
    if (perclos !== null) this.drowsy = perclos >= limit;
    const closure = closed.start === null ? null : [closed.start, closed.end(time)];
    const [start, end] = this.withLids(closure, time) ?? [0, -1], seconds = end - start + SLACK;
    const away = !this.everSeen || time - this.lastSeen > maxGap;
    const hidden = away || this.interval > S.MAX_INTERVAL;
    this.state = hidden ? 'not visible' : seconds >= S.SLEEP_SECONDS ? 'asleep'
      : seconds >= S.MICROSLEEP_SECONDS || this.stillClosed ? 'microsleep'
      : this.drowsy || time < this.drowsyUntil ? 'drowsy' : 'awake';
    this.eyesClosed = S.STATES[this.state].eyes_closed ?? this.eyesClosed;
  }
}
