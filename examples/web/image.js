// Resampling of frames {width, height, data: RGBA bytes}, as OpenCV does it.
export const clip = (value, low, high) => Math.min(Math.max(value, low), high);
/** Round half to even. */
export const round = (x) => (Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

/** Return the [index, weight] pairs of the pixels that make each pixel of a resized axis. */
function taps(from, to) {
  const ratio = from / to;
  return Array.from({ length: to }, (_, i) => {
    const low = ratio > 1 ? i * ratio : Math.fround((i + 0.5) * ratio - 0.5);
    const first = Math.floor(low), near = round(2048 * (low - first));
    const high = Math.min(low + ratio, from);
    const pairs = ratio > 1 ? Math.ceil(high - 1e-3) - first : 2;
    return Array.from({ length: pairs }, (__, k) => (ratio > 1
      ? [first + k, Math.fround((Math.min(first + k + 1, high) - Math.max(first + k, low)) / ratio)]
      : [clip(first + k, 0, from - 1), k ? near : 2048 - near]));
  });
}

/** Resize a part of a frame as cv2.resize: INTER_AREA if it shrinks, else INTER_LINEAR. */
export function resize(frame, [left, top], [fromWidth, fromHeight], [width, height]) {
  const across = taps(fromWidth, width), grows = width >= fromWidth, stride = 4 * width;
  const rows = new Float32Array(stride * fromHeight), data = new Uint8ClampedArray(stride * height);
  for (let y = 0; y < fromHeight; y++) {
    across.forEach((pairs, x) => pairs.forEach(([index, weight]) => {
      const from = 4 * ((top + y) * frame.width + left + index), at = y * stride + 4 * x;
      for (let c = 0; c < 4; c++) rows[at + c] += weight * frame.data[from + c];
    }));
  }
  const rounded = fromWidth === 2 * width ? (sum) => Math.floor(sum + 0.5) : round;
  taps(fromHeight, height).forEach((pairs, y) => {
    for (let x = 0; x < stride; x++) {
      let sum = 0;
      for (const [index, weight] of pairs) {
        const value = rows[index * stride + x];
        sum += grows ? (weight * (value >> 4)) >> 16 : weight * value;
      }
      data[y * stride + x] = grows ? (sum + 2) >> 2 : rounded(Math.fround(sum));
    }
  });
  return { width, height, data };
}

/** Resample a box, turned clockwise by roll, to planes R, G, B at out[offset]; see crop.cut. */
export function cut(frame, box, size, roll, out, offset) {
  const cos = Math.cos(roll), sin = Math.sin(roll);
  const shrink = Math.trunc(Math.min(box[2] - box[0], box[3] - box[1]) / size);
  if (shrink >= 2) { // Average whole blocks of pixels first.
    const spans = [frame.width, frame.height].map((limit, i) => {
      const middle = (box[i] + box[i + 2]) / 2, grown = (Math.abs(cos) + Math.abs(sin)) / 2;
      const [low, high] = [-1, 1].map((sign) => middle + sign * (box[i + 2] - box[i]) * grown);
      const first = Math.max(Math.floor(low), 0);
      return [first, Math.floor((Math.min(limit, Math.ceil(high) + shrink) - first) / shrink)];
    });
    const [first, blocks] = [0, 1].map((k) => spans.map((span) => span[k]));
    if (Math.min(...blocks) > 0) {
      frame = resize(frame, first, blocks.map((count) => count * shrink), blocks);
      box = box.map((value, i) => (value - first[i % 2] + 0.5) / shrink - 0.5);
    }
  }
  // The map from crop to frame in 1/1024 px, rounded to 1/32 px, as warpAffine with INTER_LINEAR.
  const { width, height, data } = frame, area = size * size;
  const stepX = (box[2] - box[0]) / size, stepY = (box[3] - box[1]) / size;
  const cx = Math.fround((box[0] + box[2]) / 2), cy = Math.fround((box[1] + box[3]) / 2);
  for (let y = 0; y < size; y++) {
    const dx = box[0] + stepX / 2 - cx, dy = box[1] + stepY * (y + 0.5) - cy;
    const rowX = round((cos * dx - sin * dy + cx) * 1024) + 16;
    const rowY = round((sin * dx + cos * dy + cy) * 1024) + 16;
    for (let x = 0; x < size; x++, offset++) {
      const px = (rowX + round(cos * stepX * x * 1024)) >> 5, column = px >> 5, u = px & 31;
      const py = (rowY + round(sin * stepX * x * 1024)) >> 5, row = py >> 5, v = py & 31;
      // Weights of the four pixels around; pixels outside of the frame are black.
      const left = column >= 0 && column < width ? 32 - u : 0;
      const right = column >= -1 && column < width - 1 ? u : 0;
      const upper = row >= 0 && row < height ? 32 - v : 0;
      const lower = row >= -1 && row < height - 1 ? v : 0;
      for (let c = 0; c < 3; c++) {
        const at = 4 * (row * width + column) + c, below = at + 4 * width;
        out[offset + c * area] = (upper * ((left * data[at] | 0) + (right * data[at + 4] | 0))
          + lower * ((left * data[below] | 0) + (right * data[below + 4] | 0)) + 512) >> 10;
      }
    }
  }
}
