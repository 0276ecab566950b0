// Eyes and drowsiness of one person, as in utils/drowsiness/eyes.py and states.py.
import { clip } from './image.js';
import { add, mean, rules } from './model.js';

const { eyes: E } = rules, S = { ...rules.intervals, ...rules.states }, SLACK = S._TOLERANCE;
const event = (kind, [start, end]) => ({ kind, start, end });
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
  const ratio = (contour) => {
    const points = contour.map((k) => raw[k]), middle = contour.length / 2;
    const gaps = points.slice(1, middle).map((point, j) => Math.hypot(
      ...add(point, points[points.length - 1 - j], -1)));
    return mean(gaps) / Math.hypot(...add(points[0], points[middle], -1));
  };
  const openness = contours.map((eye, i) => {
    const points = eye.map((k) => raw[k]);
    const inside = points.every(([x, y]) => Math.min(x, y, width - 1 - x, height - 1 - y) >= 0);
    const sure = mean(eye.map((k) => confidence[k])) >= eyes.min_confidence;
    if (widths[i] < least || !sure || !inside) return null;
    return clip((ratio(eye) - eyes.shut) / (eyes.open - eyes.shut), 0, 1);
  });
  const judged = openness.filter((value) => value !== null), lips = scheme.regions['inner lips'];
  const closed = judged.length ? mean(judged) <= eyes.closed_below : null;
  // The page has no network of eye patches: whether the eyes look down is not known.
  return { openness, closed, looksDown: null, mouth: lips?.length > 4 ? ratio(lips) : null };
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
  wink = new Interval(); down = new Interval(); yawn = new Interval(); lastEnd = -Infinity;
  steps = []; blinks = []; levels = []; intervals = []; openLevel = S.MAX_OPEN_LEVEL;
  update(openness, closed, time, looksDown = null, mouth = null) {
    const judged = openness.filter((value) => value !== null), seen = closed !== null;
    const step = Math.max(time - (this.time ?? time), 0), events = [];
    if (step) this.intervals = [...this.intervals, step].slice(-S.MEDIAN_INTERVALS);
    if (step) this.interval = quantile(this.intervals, 0.5);
    const limit = Math.max(S.MAX_GAP, S.GAP_INTERVALS * this.interval);
    this.maxGap = Math.min(limit, S.MAX_INTERVAL) + SLACK;
    const observed = seen && this.wasSeen && step <= this.maxGap;
    this.lastSeen ??= time;
    this.endBeforeGap(seen, closed, time, events);
    if (seen) {
      const [level, wink] = this.lidLevel(judged, closed), learns = !(wink || looksDown);
      closed = this.follow(level, closed && !wink, time, events, learns);
      this.stillClosed = this.stillClosed && closed;
      [this.lastSeen, this.everSeen, this.hiddenSince] = [time, true, null];
      events.push(...this.winks(this.wink.update(wink, time, this.openGap())));
      const down = Boolean(looksDown) && !closed;
      events.push(...this.glances(this.down.update(down, time, S.DOWN_GAP)));
    } else this.hiddenSince ??= time;
    const told = [...this.withoutOverlap(events), ...this.followMouth(mouth, time)];
    const length = observed || !step ? Math.min(step, S.WINDOW) : 0;
    this.steps.push([time, length, observed && closed ? length : 0]);
    while (this.steps[0][0] <= time - S.WINDOW) this.steps.shift();
    [this.time, this.wasSeen] = [time, seen];
    this.count(told, time);
    this.decide(time);
    return told;
  }
  /** Return the events that had not ended at the last frame. */
  finish() {
    const [start, end] = [this.lastSeen, this.time], away = end - start > this.maxGap;
    if (end === undefined) return [];
    const hidden = away ? [{ kind: 'not visible', start, end }] : [];
    const { lastEnd } = this, last = away ? start : end;
    const events = [...this.end(last, away), ...this.endGlances(last), ...hidden];
    const told = [...this.withoutOverlap(events), ...this.yawns(this.yawn.finish(end))];
    this.lastEnd = lastEnd;
    return told;
  }
  /** Add the events that ended when the eyes were last seen, where they were not since. */
  endBeforeGap(seen, closed, time, events) {
    const gap = time - this.lastSeen, away = gap > this.maxGap;
    const hidden = this.hiddenSince != null && seen
      && time - this.hiddenSince >= S.UNSEEN_GAP - SLACK;
    const closing = this.closed.start !== null && this.closed.gap === null;
    const bridged = closing && this.eyesClosed && gap <= S.MAX_CLOSED_GAP + SLACK
      && (closed || !seen);
    if ((away || (hidden && closing && !this.eyesClosed)) && !bridged) {
      events.push(...this.end(this.lastSeen, true), ...this.endGlances(this.lastSeen));
    }
    if (away && seen) {
      if (!bridged) events.push({ kind: 'not visible', start: this.lastSeen, end: time });
      this.stillClosed = this.eyesClosed && closed;
    }
  }
  /** Return the level of the lids, and whether one eye alone is closed. */
  lidLevel(judged, closed) {
    const low = Math.min(...judged), high = Math.max(...judged), open = this.openLevel;
    const wink = judged.length === 2 && low < S.WINK_CLOSED * open
      && high >= S.BLINK_OPEN_LEVEL * open
      && (this.closed.start === null || (!closed && this.wink.start !== null));
    return [wink ? high : mean(judged), wink];
  }
  endGlances(time) {
    return [...this.winks(this.wink.finish(time)), ...this.glances(this.down.finish(time))];
  }
  winks(one) {
    const brief = one && lasts(one, S.WINK_MIN_SECONDS) && !lasts(one, S.WINK_MAX_SECONDS);
    return brief ? [event('wink', one)] : [];
  }
  glances(one) { return one && lasts(one, S.DOWN_SECONDS) ? [event('looks down', one)] : []; }
  yawns(one) { return one && lasts(one, S.YAWN_SECONDS) ? [event('yawn', one)] : []; }
  followMouth(ratio, time) {
    const away = this.hiddenSince != null && time - this.lastSeen > this.maxGap;
    if (ratio === null) return away ? this.yawns(this.yawn.finish(this.lastSeen)) : [];
    const gap = Math.max(S.YAWN_GAP, this.openGap());
    return this.yawns(this.yawn.update(ratio >= S.YAWN_RATIO, time, gap));
  }
  /** Return events of the eyes so that none overlaps another; a closure divides looking down. */
  withoutOverlap(events) {
    const found = [];
    for (const { kind, start, end } of [...events].sort((a, b) => a.end - b.end)) {
      const down = this.down.start;
      if (['blink', 'microsleep', 'sleep'].includes(kind) && down !== null && down < end) {
        found.push(...this.glances([Math.max(down, this.lastEnd), start]));
        this.down.start = end;
      }
      if (end > Math.max(start, this.lastEnd)) {
        found.push({ kind, start: Math.max(start, this.lastEnd), end });
        this.lastEnd = end;
      }
    }
    return found;
  }
  openGap() {
    const slow = this.interval >= S.SLOW_INTERVAL;
    return slow ? Math.min(S.OPEN_GAP, this.interval / 2) : S.OPEN_GAP;
  }
  /** Add a level of the lids; return whether they are closed or held nearly closed. */
  follow(level, closed, time, events, learns) {
    if (learns) this.learn(level, time);
    const below = (share) => closed || level < share * this.openLevel;
    const half = below(this.half.start === null ? S.BLINK_CLOSE_LEVEL : S.BLINK_OPEN_LEVEL);
    const nearly = below(S.NEARLY_CLOSED), held = below(S.HELD_CLOSED);
    this.wideSince = nearly ? null : this.wideSince ?? time;
    const [maxGap, since] = nearly ? [S.NEARLY_CLOSED_GAP, -Infinity]
      : [half ? S.HALF_OPEN_GAP : this.openGap(), this.wideSince];
    this.held.update(held, time, maxGap, since);
    const { start } = this.held;
    if (nearly && start !== null && time - start >= S.HELD_SECONDS - SLACK) {
      closed = true;
      this.closed.start = Math.min(start, this.closed.start ?? start);
    }
    let closure = this.withLids(this.closed.update(closed, time, maxGap, since), time);
    const ended = this.half.update(half, time, this.openGap());
    if (ended && this.closed.start !== null) { // Lids that are open end the closure too.
      const [first, last] = this.closed.finish(time);
      closure = [Math.max(first - S.LID_SECONDS, ended[0]),
        Math.min(last + S.LID_SECONDS, ended[1])];
    }
    events.push(...this.classify(closure, ended));
    return closed;
  }
  end(time, hidden = false) {
    this.held.finish(time);
    this.wideSince = null;
    const opened = this.half.gap !== null || (hidden && this.closed.start !== null);
    const closure = this.withLids(this.closed.finish(time), time);
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
    return events.map(([kind, start, end]) => event(kind, [start, end]));
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
    // Unseen time counts once the eyes were called closed.
    const until = this.wasSeen || this.eyesClosed ? time : this.lastSeen;
    const closure = closed.start === null ? null : [closed.start, closed.end(until)];
    const [start, end] = this.withLids(closure, until) ?? [0, -1], seconds = end - start + SLACK;
    const glance = this.down.start === null ? null : [this.down.start, this.lastSeen];
    const away = !this.everSeen || time - this.lastSeen > maxGap;
    const hidden = away || this.interval > S.MAX_INTERVAL;
    this.state = hidden ? 'not visible' : seconds >= S.SLEEP_SECONDS ? 'asleep'
      : seconds >= S.MICROSLEEP_SECONDS || this.stillClosed ? 'microsleep'
      : glance && lasts(glance, S.DOWN_SECONDS) ? 'looks down'
      : this.drowsy || time < this.drowsyUntil ? 'drowsy' : 'awake';
    this.eyesClosed = S.STATES[this.state].eyes_closed ?? this.eyesClosed;
  }
}
