// What is drawn: the mesh over the picture, and the strip charts of the last minute.
const WINDOW = 60, GAP = 1; // Seconds; a line is not drawn across a gap.

export function drawFaces(canvas, { size, faces }, regions, { mirror, mesh, colourOf }) {
  const [width, height] = size ?? [4, 3], ratio = devicePixelRatio;
  // As many pixels as the screen shows, so that lines are sharp.
  const scale = ratio * Math.min(canvas.clientWidth / width, canvas.clientHeight / height);
  Object.assign(canvas, { width: width * scale, height: height * scale });
  const context = canvas.getContext("2d"), flip = (x) => mirror ? width - x : x;
  const at = (x, y) => [flip(x) * scale, y * scale];
  for (const { box: [left, top, right, bottom], points, ...face } of faces) {
    const side = (right - left) * scale, dot = Math.max(1.4 * ratio, side / 130);
    Object.assign(context, { strokeStyle: colourOf(face), lineWidth: 2 * ratio });
    context.beginPath();
    context.roundRect(...at(mirror ? right : left, top), side, (bottom - top) * scale, side / 24);
    context.stroke();
    context.lineWidth = ratio;
    for (const region of mesh ? regions : []) {
      const path = region.points.map((i) => at(points[2 * i], points[2 * i + 1]));
      context.strokeStyle = context.fillStyle = `rgb(${region.colour})`;
      context.beginPath();
      path.forEach((point) => context.lineTo(...point));
      if (region.closed) context.closePath();
      context.stroke();
      context.beginPath();
      path.forEach(([x, y]) => { context.moveTo(x, y); context.arc(x, y, dot, 0, 7); });
      context.fill();
    }
  }
}

export class Chart { // Of canvases {canvas, low, high, keys of the samples}.
  constructor(canvases) { Object.assign(this, { canvases, samples: [] }); }

  add(sample) { // {time, shut, and a value for each key, where it is known}
    this.samples.push(sample);
    while (this.samples[0].time < sample.time - WINDOW - GAP) this.samples.shift();
    this.draw();
  }

  spans() { // [from, to] in seconds of closed eyes, to the first sample with open ones.
    const spans = [];
    this.samples.forEach(({ time, shut }, i) => {
      if (i && this.samples[i - 1].shut) spans.at(-1)[1] = time;
      else if (shut) spans.push([time, time]);
    });
    return spans;
  }

  draw() {
    const css = getComputedStyle(document.documentElement), spans = this.spans();
    const end = this.samples.at(-1)?.time ?? 0;
    for (const { canvas, low, high, keys } of this.canvases) {
      const width = canvas.width = canvas.clientWidth * devicePixelRatio;
      const height = canvas.height = canvas.clientHeight * devicePixelRatio;
      const context = canvas.getContext("2d"), x = (time) => (1 - (end - time) / WINDOW) * width;
      context.fillStyle = css.getPropertyValue("--shade");
      spans.forEach(([a, b]) => context.fillRect(x(a), 0, Math.max(2, x(b) - x(a)), height));
      context.lineWidth = 1.6 * devicePixelRatio;
      for (const key of keys) {
        context.strokeStyle = css.getPropertyValue(`--${key}`);
        context.beginPath();
        let before = -Infinity;
        for (const { time, [key]: value } of this.samples.filter((one) => one[key] != null)) {
          const y = height * (1 - Math.min(1, Math.max(0, (value - low) / (high - low))));
          context[time - before < GAP ? "lineTo" : "moveTo"](x(time), y);
          before = time;
        }
        context.stroke();
      }
      const list = spans.map(([from, to]) => `${from.toFixed(2)} to ${to.toFixed(2)} s`);
      canvas.setAttribute("aria-label", `Eyes closed: ${list.join(", ") || "not seen"}`);
    }
  }
}
