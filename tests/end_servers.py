"""Stops the servers that are noted below a folder, as soon as the process that started this one has ended."""

import sys
from pathlib import Path

sys.stdin.read()  # it is closed when that process ends, however it ends

from ptl.local import servers  # noqa: E402 - until then nothing is needed

for note in Path(sys.argv[1]).rglob("*.service.json"):
    servers.stop(note.parents[1], note.name.removesuffix(".service.json"))
