// The camera and the WebSocket: one message is in flight, and the newest frame is sent next.
const FRAME = 0, STILL = 1, SIDE = 640, STILL_SIDE = 1600, PATIENCE = 15000;
const WHY = { 1001: "the server has ended", 1006: "the server cannot be reached" };

export class Link {
  constructor(video, handle) {
    // handle(message, latency in ms, JPEG or false) also gets {type: "closed", reason}.
    Object.assign(this, { video, handle, shot: document.createElement("canvas"), tasks: [] });
    this.newest = this.socket = this.stream = null;
  }

  open(weights) {
    if (this.socket) return;
    const socket = this.socket = new WebSocket("watch");
    this.busy = false;
    this.tasks = weights ? [{ weights }] : [];
    Object.assign(socket, { binaryType: "arraybuffer", onopen: () => this.pump() });
    socket.onmessage = ({ data }) => this.receive(data);
    socket.onclose = ({ code, reason }) =>
      this.socket === socket && this.close(reason || WHY[code] || "");
  }

  async start(weights) {
    if (!navigator.mediaDevices)
      throw new Error("browsers give it to pages of https:// and http://localhost only");
    this.stream = await navigator.mediaDevices.getUserMedia(
      { video: { width: { ideal: 640 }, height: { ideal: 480 }, facingMode: "user" } });
    this.stream.getVideoTracks()[0].onended = () => this.close("the camera was taken away");
    this.video.srcObject = this.stream;
    await this.video.play();
    this.origin = null;
    this.open(weights);
    const seen = (now, frame) => {
      if (!this.stream) return;
      this.newest = frame.captureTime ?? frame.presentationTime ?? now;
      this.pump();
      this.video.requestVideoFrameCallback(seen);
    };
    this.video.requestVideoFrameCallback(seen);
  }

  add(task) { // A command, or a picture to process.
    this.tasks.push(task);
    this.pump();
  }

  pump() {
    const { video, socket, newest } = this, task = this.busy ? null : this.tasks[0];
    if (this.busy || socket?.readyState !== WebSocket.OPEN || !task && newest === null) return;
    this.busy = true;
    this.sent = performance.now();
    this.timer = setTimeout(() => this.close("the server does not answer"), PATIENCE);
    this.tasks.shift(); // The task, if there is one.
    if (task instanceof ImageBitmap) this.send(STILL, 0, task, task.width, task.height, STILL_SIDE);
    else if (task) socket.send(JSON.stringify(task));
    else {
      this.newest = null;
      this.origin ??= newest;
      const time = (newest - this.origin) / 1000;
      this.send(FRAME, time, video, video.videoWidth, video.videoHeight, SIDE);
    }
  }

  send(kind, time, image, width, height, side) {
    const { shot, socket } = this, scale = Math.min(1, side / Math.max(width, height));
    Object.assign(shot, { width: width * scale, height: height * scale });
    shot.getContext("2d").drawImage(image, 0, 0, shot.width, shot.height);
    shot.toBlob((jpeg) => socket.send(new Blob([Uint8Array.of(kind), Float64Array.of(time), jpeg])),
      "image/jpeg", 0.9);
  }

  receive(data) {
    const latency = performance.now() - this.sent, picture = typeof data !== "string";
    const length = picture ? new DataView(data).getUint32(0, true) : 0;
    const json = picture ? new TextDecoder().decode(new Uint8Array(data, 4, length)) : data;
    const message = JSON.parse(json);
    this.handle(message, latency, picture && new Blob([new Uint8Array(data, 4 + length)]));
    if (message.type === "events") return; // Another message follows.
    clearTimeout(this.timer);
    this.busy = false;
    this.pump();
  }

  close(reason = "") {
    const { socket, stream } = this;
    clearTimeout(this.timer);
    this.stream = this.newest = this.socket = null;
    stream?.getTracks().forEach((track) => track.stop());
    socket?.close();
    this.handle({ type: "closed", reason });
  }
}
