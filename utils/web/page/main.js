// The page: controls, messages of the server, figures, events and the alarm.
import { Link } from "./link.js";
import { Chart, drawFaces } from "./view.js";

const $ = (id) => document.getElementById(id);
const about = await (await fetch("about")).json(), live = about.source === null;
const link = new Link($("video"), handle);
const chart = new Chart([{ canvas: $("eyes"), low: -0.04, high: 1.04, keys: ["left", "right"] },
  { canvas: $("turn"), low: -60, high: 60, keys: ["yaw"] }]);
let regions = [], lines = [], shown = null, state = {}, rung = {}, sound, rate, latency, before;

const show = (texts) => { for (const id in texts) $(id).textContent = texts[id]; };
const percent = (value) => value == null ? "–" : `${Math.round(100 * value)} %`;
const smooth = (old, value) => old === undefined ? value : 0.9 * old + 0.1 * value;
const colour = (name) => about.states[name] && `rgb(${about.states[name].colour})`;
const say = (text, bad) => { show({ link: text }); $("link").className = bad ? "bad" : ""; };

function handle(message, took, jpeg) {
  const { type, reason } = message;
  if (type === "model") ({ regions } = message);
  if (type === "events") addEvents(message.lines);
  if (type === "refused" || type === "ended") say(reason, type === "refused");
  if (type === "stopped") link.close();
  if (type === "closed") show({ start: "Start camera", rate: "–", latency: "–" });
  if (type === "closed") say(reason || "stopped", reason);
  if (type === "still") figures(shown = message);
  if (type === "frame" && (!live || link.stream)) addFrame(shown = message, took, jpeg);
  redraw();
}

function redraw() {
  const mirror = $("mirror").checked && shown?.type !== "still";
  $("stage").classList.toggle("mirror", mirror);
  drawFaces($("overlay"), shown ?? { faces: [] }, regions, { mirror, mesh: $("mesh").checked,
    colourOf: ({ id }) => id === shown.person?.id && colour(shown.person.state) || "#dde5ec" });
}

async function paint(picture) { // A still or a frame of the server's source, in place of the video.
  const image = await createImageBitmap(picture), { width, height } = image;
  Object.assign($("picture"), { width, height, hidden: false });
  $("picture").getContext("2d").drawImage(image, 0, 0);
  $("video").hidden = $("hint").hidden = true;
  return image;
}

function addFrame(message, took, jpeg) {
  const now = performance.now(), { person, time } = message, face = figures(message);
  if (jpeg) paint(jpeg);
  rate = before && smooth(rate, now - before);
  before = now;
  latency = smooth(latency, live ? took : message.ms);
  show({ rate: rate ? Math.round(1000 / rate) : "–", latency: Math.round(latency) });
  chart.add({ time, shut: face?.closed || about.states[person?.state]?.closed,
    right: face?.openness_right, left: face?.openness_left, yaw: face?.pose?.[0] });
  ring(person?.state, time);
}

function figures({ faces, person, time }) { // Of the person who is watched, else of the first face.
  const face = faces.find(({ id }) => !person || id === person.id);
  const name = person?.state ?? (!face ? "no face" : face.closed ? "eyes closed" : "face");
  if (name !== state.name) state = { name, since: time };
  $("state").style.setProperty("--state", colour(name) ?? "var(--dim)");
  show({ word: name, since: person ? `${(time - state.since).toFixed(1)} s` : "",
    perclos: percent(person?.perclos), blinks: person?.blinks_per_minute?.toFixed(0) ?? "–",
    right: percent(face?.openness_right), left: percent(face?.openness_left),
    pose: face?.pose?.map((angle) => `${Math.round(angle)}°`).join(" ") ?? "–" });
  return face;
}

function addEvents(added) { // CSV lines as of demo.py --events.
  lines.push(...added);
  for (const [kind, , ...times] of added.map((line) => line.trim().split(","))) {
    const row = Object.assign($("rows").insertRow(0), { className: kind });
    row.insertCell().textContent = kind;
    for (const seconds of times) row.insertCell().textContent = Number(seconds).toFixed(2);
  }
  const blinks = lines.filter((line) => line.startsWith("blink")).map((line) => line.split(",")[4]);
  const mean = blinks.reduce((sum, seconds) => sum + 1000 * seconds, 0) / blinks.length;
  show({ count: lines.length, blink: blinks.length ? `${Math.round(mean)} ms` : "–" });
  $("save").disabled = !lines.length;
}

function ring(name, time) { // When: see utils/drowsiness/alarm.py.
  const { alarm, closed } = about.states[name] ?? {};
  const asleep = closed == null ? rung.asleep : name === "asleep", repeats = closed ?? asleep;
  rung = { ...(rung.name === name ? rung : { name, since: time }), asleep };
  const due = rung.last !== undefined ? repeats && time - rung.last >= 1
    : alarm != null && (repeats || time - rung.since >= alarm);
  if (!due || (rung.last = time, !$("alarm").checked)) return;
  const tone = new OscillatorNode(sound, { frequency: 880 });
  tone.connect(sound.destination);
  tone.start();
  tone.stop(sound.currentTime + 0.25);
}

async function start() {
  if (link.stream) return link.add({ stop: true }); // Answered by events that have not ended.
  [lines, shown, state, rung, chart.samples, before, rate, latency] = [[], null, {}, {}, []];
  $("rows").replaceChildren();
  addEvents([]);
  $("picture").hidden = $("hint").hidden = !($("video").hidden = false);
  say("asking for the camera");
  await link.start($("weights").value).then(
    () => show({ start: "Stop", link: "connected" }),
    (error) => link.close(`no camera: ${error.message}`));
}

async function still(file) {
  if (!live || !file) return;
  const image = await paint(file).catch(() => say(`${file.name}: not a picture`, true));
  if (image && link.stream) link.close();
  if (image) shown = null, link.open($("weights").value), link.add(image), say(file.name);
}

$("weights").append(...about.weights.map((name) => new Option(name)));
$("start").onclick = start;
$("save").onclick = () => Object.assign(document.createElement("a"), { download: "events.csv",
  href: URL.createObjectURL(new Blob([about.header, ...lines], { type: "text/csv" })) }).click();
$("file").onchange = ({ target }) => still(target.files[0]);
$("weights").onchange = ({ target }) => link.add({ weights: target.value });
for (const id of ["mirror", "mesh"]) $(id).onchange = onresize = redraw;
$("alarm").onchange = () => { sound ??= new AudioContext(); };
$("stage").ondragover = (event) => event.preventDefault();
$("stage").ondrop = (event) => still(event.preventDefault() ?? event.dataTransfer.files[0]);
onkeydown = (event) => {
  const id = { m: "mirror", p: "mesh", a: "alarm", s: "save", " ": "start" }[event.key];
  if (!id || event.ctrlKey || event.metaKey || event.target.closest("button, select")) return;
  event.preventDefault(); // Space would scroll.
  $(id).click();
};
$("start").hidden = $("upload").hidden = $("hint").hidden = $("weights").disabled = !live;
if (!live) link.open(), $("mirror").click();
say(live ? "ready" : about.source);
