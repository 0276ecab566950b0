"""Chromium on pages of this repository, served by the standard library's static server."""
import contextlib
import functools
import http.server
import pathlib
import shutil
import subprocess
import threading

import pytest

from utils.args import ROOT

WEB = ROOT / "examples" / "web"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and `more`: {start of an address: file or folder elsewhere}."""

    def __init__(self, *args, more, **options):
        self.more = more
        super().__init__(*args, **options)

    def log_message(self, *args):
        pass

    def translate_path(self, path):
        path = path.partition("?")[0]
        for start, target in self.more.items():
            if path.startswith(start):
                return str(pathlib.Path(target, path[len(start):].lstrip("/")))
        return super().translate_path(path)


@contextlib.contextmanager
def serve(more):
    """Serve the repository and `more`; yields the address."""
    handler = functools.partial(_Handler, directory=str(ROOT), more=more)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def chromium():
    """Start Chromium without a window; yields Playwright's browser. Skips where it is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip(f"needs a browser, one of {', '.join(CHROMIUM)}")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def runtime(folder):
    """Return the dist folder of onnxruntime-web; fetch it into `folder` if it is missing."""
    dist = pathlib.Path("node_modules", "onnxruntime-web", "dist")
    if (WEB / dist).is_dir():
        return WEB / dist
    if not shutil.which("npm"):
        pytest.skip("needs npm, or `npm ci` in examples/web")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(WEB / name, folder)
    done = subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder,
                          capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"npm ci failed: {done.stderr.strip()[:200]}")
    return folder / dist
