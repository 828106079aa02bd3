"""The pictures of README and docs, from the newest run: `python docs/screenshots.py [.ptl]` (needs chromium)."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import websocket

from ptl.address import TRAINING

DOCS = Path(__file__).parent
ROOT = DOCS.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    # a mouse: without one charts show their tool bars
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2",
]
START_SECONDS = 120  # for a first answer
DRAW_SECONDS = 15  # for a page; MLflow's charts come last
# MLflow opens a chat beside the first page that a browser sees.
NO_CHAT = (
    "try { localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true') } catch {}"
)


def main(home: Path) -> int:
    """Exit code 0, or 2 where there is no browser or no finished run."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    result = home / "latest/result.json"
    if browser is None or not result.is_file():
        remedy = (
            "run `make demo` first"
            if browser
            else "no Chromium: on Debian, apt-get install chromium"
        )
        print(f"screenshots: no picture was made; {remedy}", file=sys.stderr)
        return 2
    run = json.loads(result.read_text())
    for command in (
        ["benchmarks/depth_report.py"],
        ["-m", "mkdocs", "build", "--quiet", "--strict"],
    ):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with mlflow_ui(home) as address, devtools(browser) as call:
        page = (
            f"{address}/#/experiments/{run['mlflow']['experiment_id']}/runs/{run['mlflow_run_id']}"
        )
        picture(call, (home / "latest/report.html").resolve().as_uri(), "report.png", 1100, 1500)
        picture(call, f"{page}/model-metrics?{TRAINING}", "mlflow.png", 1400, 900)
        picture(call, f"{page}?{TRAINING}", "mlflow-run.png", 1032, 1900)
        picture(call, (ROOT / "site/own-model/index.html").as_uri(), "site.png", 1100, 1100)
    return 0


def picture(call, page: str, name: str, width: int, height: int) -> None:
    """Write a page's upper part to a PNG of the docs."""
    call(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=height,
        deviceScaleFactor=1,
        mobile=False,
    )
    call("Page.navigate", url=page)
    time.sleep(DRAW_SECONDS)
    (DOCS / name).write_bytes(base64.b64decode(call("Page.captureScreenshot")["data"]))
    print(f"wrote docs/{name}", flush=True)


@contextlib.contextmanager
def mlflow_ui(home: Path):
    """The address of a `ptl up --ui` of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with running(
        [sys.executable, "-m", "ptl", "up", "--ui", "--home", str(home), "--mlflow-port", str(port)]
    ):
        answer(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def devtools(browser: str):
    """A function that calls a method of a browser's DevTools protocol."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        note = Path(profile, "DevToolsActivePort")
        with running(
            [
                browser,
                *QUIET,
                f"--user-data-dir={profile}",
                "--remote-debugging-port=0",
                "about:blank",
            ]
        ):
            pages = json.loads(
                answer(lambda: f"http://127.0.0.1:{note.read_text().split()[0]}/json")
            )
            address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
            connection = websocket.create_connection(
                address, suppress_origin=True, timeout=START_SECONDS
            )

            def call(method: str, **parameters):
                connection.send(json.dumps({"id": 1, "method": method, "params": parameters}))
                # Events have no id.
                while "id" not in (message := json.loads(connection.recv())):
                    pass
                return message["result"]

            call("Page.enable")
            call("Page.addScriptToEvaluateOnNewDocument", source=NO_CHAT)
            call(
                "Emulation.setEmulatedMedia",
                features=[{"name": "prefers-color-scheme", "value": "light"}],
            )
            yield call


@contextlib.contextmanager
def running(command: list[str]):
    """A process in the background, as long as the block runs."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def answer(address) -> bytes:
    """What an address answers as soon as it does; a function may have to find it first."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            url = address() if callable(address) else address
            with urllib.request.urlopen(url, timeout=5) as response:
                return response.read()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".ptl").absolute()))
