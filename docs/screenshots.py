"""The pictures of README and docs, from the newest run: `python docs/screenshots.py [.ptl]` (needs chromium)."""

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
    "--blink-settings=preferredColorScheme=1",
    "--virtual-time-budget=20000",  # milliseconds until the picture; MLflow's pages draw for some seconds
]


def main(home: Path) -> int:
    """Exit code 0, or 2 where there is no browser or no finished run."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    result = home / "latest/result.json"
    if browser is None or not result.is_file():
        remedy = "run `make demo` first" if browser else "no Chromium: on Debian, apt-get install chromium"
        print(f"screenshots: no picture was made; {remedy}", file=sys.stderr)
        return 2
    run = json.loads(result.read_text())
    for command in (["benchmarks/depth_report.py"], ["-m", "mkdocs", "build", "--quiet", "--strict"]):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with mlflow_ui(home) as address:
        page = f"{address}/#/experiments/{run['mlflow']['experiment_id']}/runs/{run['mlflow_run_id']}"
        picture(browser, (home / "latest/report.html").resolve().as_uri(), "report.png", 1100, 1500)
        picture(browser, f"{page}/model-metrics?{TRAINING}", "mlflow.png", 1400, 900)
        picture(browser, f"{page}?{TRAINING}", "mlflow-run.png", 1032, 1900)
        picture(browser, (ROOT / "site/own-model/index.html").as_uri(), "site.png", 1100, 1100)
    return 0


@contextlib.contextmanager
def mlflow_ui(home: Path):
    """The address of an `ptl ui` of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ptl", "ui", "--home", str(home), "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def picture(browser: str, page: str, name: str, width: int, height: int) -> None:
    """Write a page's upper part, in CSS pixels, to a PNG of the docs."""
    with tempfile.TemporaryDirectory() as profile:
        size = [f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={DOCS / name}"]
        subprocess.run([browser, *QUIET, *size, page], check=True, timeout=300, capture_output=True)
    print(f"wrote docs/{name}")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".ptl").absolute()))
