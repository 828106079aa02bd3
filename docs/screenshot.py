"""A web page -> a PNG by headless Chromium: `python docs/screenshot.py .ptl/latest/report.html docs/report.png`."""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

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
]


def main() -> int:
    """Exit code 0, or 2 where there is no browser or no page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", help="an HTML file, or an address on this machine")
    parser.add_argument("png", type=Path)
    parser.add_argument("--phone", action="store_true", help="390 pixels wide instead of 1100")
    parser.add_argument("--dark", action="store_true", help="ask for the dark colours")
    parser.add_argument("--height", type=int, default=1400, help="pixels of the page that are shown")
    parser.add_argument("--scale", type=float, default=1.0, help="device pixels per CSS pixel")
    args = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print("screenshot: no Chromium found; on Debian: apt-get install chromium", file=sys.stderr)
        return 2
    local = not args.page.startswith(("http://", "https://"))
    if local and not Path(args.page).is_file():
        print(f"screenshot: no file {args.page}; give the path of a report.html", file=sys.stderr)
        return 2
    address = Path(args.page).resolve().as_uri() if local else args.page
    with tempfile.TemporaryDirectory() as folder:
        page, width = address, 390 if args.phone else 1100
        if args.phone:  # Chromium's window is at least 500 pixels wide: a frame in it can be narrower
            frame = Path(folder) / "frame.html"
            frame.write_text(
                f'<body style="margin:0"><iframe src="{address}" style="border:0;width:390px;height:{args.height}px">'
            )
            page = frame.as_uri()
        command = [
            browser,
            *QUIET,
            f"--user-data-dir={folder}/profile",
            f"--window-size={width if not args.phone else 500},{args.height}",
            f"--force-device-scale-factor={args.scale}",
            f"--blink-settings=preferredColorScheme={0 if args.dark else 1}",
            "--virtual-time-budget=2000",
            f"--screenshot={args.png.resolve()}",
            page,
        ]
        subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
