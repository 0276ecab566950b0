"""Time one face in Chromium: the modules of examples/web, WebAssembly, one thread.

cd examples/web && npm ci
python -m tools.benchmark.browser weights/tiny.int8.onnx --detector yunet.onnx

Prints ms for cropping a frame of 640 x 480 and predicting one face, and with --detector for one
detection in the frame: the least and the median of the runs, and the mean time on the processor,
which other programs change less.
"""
import argparse
import base64
import functools
import http.server
import pathlib
import shutil
import threading

from utils.args import ROOT

SCRIPT = """async ([kind, bytes, runs]) => {
  const ort = await import('/examples/web/node_modules/onnxruntime-web/dist/ort.wasm.min.mjs');
  ort.env.wasm.numThreads = 1;
  const { loadDetector, loadModel } = await import('/examples/web/model.js');
  const file = Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0)), size = 640 * 480 * 4;
  const data = new Uint8ClampedArray(size).map((_, i) => i * 7919 % 251);
  const frame = { width: 640, height: 480, data }, box = [99, 99, 300, 300];
  const model = await (kind === 'detector' ? loadDetector : loadModel)(ort, file), times = [];
  for (let i = 0; i < runs; i++) {
    const start = performance.now();
    await (kind === 'detector' ? model(frame, 1.2) : model.predict(frame, [box], [0]));
    times.push(performance.now() - start);
  }
  return times.sort((a, b) => a - b);
}"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def _processor_time(page):
    """Return the processor time of the page's process in ms."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    metrics = session.send("Performance.getMetrics")["metrics"]
    return 1000 * next(one["value"] for one in metrics if one["name"] == "ProcessTime")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark.browser", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+", help=".onnx files of main.py --export")
    parser.add_argument("--detector", help="a YuNet .onnx file")
    parser.add_argument("--runs", type=int, default=100, help="runs of each file [100]")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("needs chromium or google-chrome, which is not installed")
    handler = functools.partial(_Quiet, directory=str(ROOT))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    files = [("model", path) for path in options.weights]
    files += [("detector", options.detector)] if options.detector else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for kind, path in files:
            page = browser.new_context().new_page()
            page.goto(f"http://127.0.0.1:{server.server_address[1]}/examples/web/style.css")
            content = base64.b64encode(pathlib.Path(path).read_bytes()).decode()
            page.evaluate(SCRIPT, [kind, content, 5])  # Compiles the functions.
            start = _processor_time(page)
            page.evaluate(SCRIPT, [kind, content, 0])
            loaded = _processor_time(page)
            times = page.evaluate(SCRIPT, [kind, content, options.runs])
            spent = (_processor_time(page) - loaded - (loaded - start)) / options.runs
            print(f"{path}: least {times[0]:.1f}, median {times[len(times) // 2]:.1f} ms, "
                  f"on the processor {spent:.1f} ms", flush=True)
        browser.close()
    server.shutdown()


if __name__ == "__main__":
    main()
