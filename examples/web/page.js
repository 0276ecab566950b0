// The page: models and sources, and what is shown of a frame.
import { Drowsiness, readEyes } from './drowsiness.js';
import { loadDetector, loadModel, rules } from './model.js';
import { Tracker } from './tracker.js';

const $ = (id) => document.getElementById(id), query = new URLSearchParams(location.search);
const video = $('video'), pen = $('canvas').getContext('2d'), loaded = {}, NONE = [null, null];
const pixels = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
const percent = (value) => (value === null ? '-' : `${Math.round(100 * value)} %`);
const show = (id, text) => { $(id).textContent = text; };
/** `attempt` makes a handler that shows why an action failed. */
const fail = ({ message }) => show('status', message);
const attempt = (action) => (event) => action(event).catch(fail);
let run = 0, ort;

/** Load the model or the detector from a chosen file, else from the address. */
async function load(kind, file) {
  const address = query.get(kind) ?? $(kind).dataset.address;
  if (file || address) {
    show('status', `Loading ${file?.name ?? address}.`);
    const found = file ?? await fetch(address);
    if (found.ok === false) throw Error(`${address}: no such file; choose one under Models`);
    const bytes = new Uint8Array(await found.arrayBuffer());
    loaded[kind] = await (kind === 'model' ? loadModel : loadDetector)(ort, bytes);
  }
  const missing = ['model', 'detector'].filter((one) => !loaded[one]);
  for (const id of ['camera', 'source']) $(id).disabled = missing.length > 0;
  $('files').open = missing.length > 0;
  const wanted = `Choose the ${missing.join(' and the ')} under Models.`;
  show('status', missing.length ? wanted : 'Ready.');
}

/** Wait for an event of the video; fails where it cannot be decoded. */
const next = (name) => new Promise((done, fail) => {
  video.addEventListener(name, done, { once: true });
  video.onerror = () => fail(Error('this film cannot be decoded here; try .webm or .mp4 (H.264)'));
});

/** Yield the seconds of each frame that the camera gives while the last one is done. */
async function* camera(start = performance.now()) {
  for (;;) {
    await new Promise((done) => { video.requestVideoFrameCallback(done); });
    yield (performance.now() - start) / 1000;
  }
}

/** Yield the seconds of each frame of a film, at this many frames a second. */
async function* film(rate) {
  for (let n = 0; n / rate < video.duration && !video.ended; n++) {
    video.currentTime = (n + 0.5) / rate;
    await next('seeked');
    yield n / rate;
  }
}

/** Follow a face through a source until another source is chosen. */
async function watch(source, width, height, times) {
  const mine = run, { model, detector } = loaded, tracker = new Tracker(model, detector);
  const drowsiness = new Drowsiness(), rows = [['event', 'id', 'start', 'end', 'seconds']];
  const report = (events) => events.forEach(({ kind, start, end }) => {
    const row = [kind, start.toFixed(3), end.toFixed(3)], shown = $('events').insertRow(0);
    for (const text of row) shown.insertCell().textContent = text;
    rows.push([kind, 'driver', ...row.slice(1), (end - start).toFixed(3)]);
    $('csv').href = `data:text/csv,${encodeURIComponent(`${rows.join('\r\n')}\r\n`)}`;
  });
  [$('events').textContent, $('csv').href, $('hint').hidden] = ['', 'data:text/csv,', true];
  for (const { canvas } of [pen, pixels]) Object.assign(canvas, { width, height });
  for await (const time of times) {
    if (mine !== run) return;
    const start = performance.now();
    pixels.drawImage(source, 0, 0, width, height);
    const frame = pixels.getImageData(0, 0, width, height);
    const face = await tracker.update(frame, time);
    const eyes = face ? readEyes(face, model, frame) : { openness: NONE, closed: null };
    report(drowsiness.update(eyes.openness, eyes.closed, time, null, eyes.mouth));
    const { state, perclos, blinksPerMinute } = drowsiness, [right, left] = eyes.openness;
    draw(model, face, rules.states.STATES[state].colour);
    const texts = { state, right: percent(right), left: percent(left), perclos: percent(perclos),
      blinks: blinksPerMinute?.toFixed(0) ?? '-', seconds: `${time.toFixed(1)} s`,
      speed: `${Math.round(performance.now() - start)} ms` };
    for (const [id, text] of Object.entries(texts)) show(id, text);
    [$('right-bar').value, $('left-bar').value] = [right ?? 0, left ?? 0];
    $('state').dataset.state = state;
    document.dispatchEvent(new CustomEvent('frame', { detail: { time, face, state, ...eyes } }));
  }
  report(drowsiness.finish());
  show('status', `${tracker.frames} ${tracker.frames === 1 ? 'frame' : 'frames'} done.`);
}

/** Draw the frame, and the landmarks and the crop of its face. */
function draw({ scheme }, face, colour) {
  const width = 1.5 * pen.canvas.width / pen.canvas.clientWidth;
  pen.drawImage(pixels.canvas, 0, 0);
  if (!face) return;
  Object.assign(pen, { lineWidth: width, strokeStyle: `rgb(${colour})`, fillStyle: '#fff' });
  pen.strokeRect(...face.box.map((value, i) => value - (i < 2 ? 0 : face.box[i - 2])));
  for (const [name, region] of Object.entries(scheme.regions)) {
    const line = new Path2D();
    for (const i of region) line.lineTo(...face.points[i]);
    if (/ eye|lips/.test(name)) line.closePath();
    pen.stroke(line);
  }
  for (const [x, y] of face.points) pen.fillRect(x - width, y - width, 2 * width, 2 * width);
}

/** Stop what is running and open the camera, or a chosen image or film. */
async function open({ target: { files } }) {
  run++;
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  video.srcObject = null;
  $('canvas').classList.toggle('mirrored', !files && $('mirror').checked);
  show('status', 'Running.');
  if (files?.[0].type.startsWith('image/')) {
    const image = await createImageBitmap(files[0]);
    await watch(image, image.width, image.height, [0]);
  } else if (files) {
    video.src = URL.createObjectURL(files[0]);
    await next('loadeddata');
    await watch(video, video.videoWidth, video.videoHeight, film(Number($('rate').value)));
  } else {
    const wanted = { video: { width: 640, height: 480 } };
    video.srcObject = await navigator.mediaDevices.getUserMedia(wanted);
    await video.play();
    await watch(video, video.videoWidth, video.videoHeight, camera());
  }
}

$('camera').onclick = $('source').onchange = attempt(open);
for (const kind of ['model', 'detector']) {
  $(kind).onchange = attempt(({ target }) => load(kind, target.files[0]));
}
await attempt(async () => {
  const folder = new URL(query.get('runtime') ?? 'node_modules/onnxruntime-web/dist/', location);
  ort = await import(new URL('ort.wasm.min.mjs', folder)).catch(() => {
    throw Error(`${folder}: no ONNX Runtime; run npm ci, or add ?runtime=FOLDER/ to the address`);
  });
  Object.assign(ort.env.wasm, { wasmPaths: folder.href, numThreads: 1 });
  for (const kind of ['model', 'detector']) await load(kind);
})();
