"""What people read on the terminal: lines of progress, and tables.

`ptl run` shows those lines of a step's output that begin with the mark, and logs all others.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TextIO

from ptl.units import duration

MARK = "ptl: "
INTERVAL = 30.0  # seconds between lines of a bar, where it does not reach the next tenth
WIDTH = 10  # characters of a bar
BAR = re.compile(r"\[#*-*\] ")  # ASCII: a log's encoding may have nothing else
ONE_UP = "\x1b[1A\x1b[2K"  # to the start of the line above, which is erased

# columns of one in a pipe, which has no width: rich would take 80 and wrap the last cells
TABLE_WIDTH = 140

Show = Callable[[str], None]  # a line to whoever watches


def say(step: str, text: str) -> None:
    """Print one line of progress of a step."""
    print(f"{MARK}{step}: {text}", flush=True)


def doing(work: str) -> None:
    """Say on the standard error what a command begins with: libraries and servers may take seconds before it prints."""
    print(f"{work} ...", file=sys.stderr, flush=True)


def progress_bar(show: Show) -> Callable[[float, str], None]:
    """A function of the share of the work that is done and a note; it shows both with the time left.

    A log gets a line at the beginning, after the first update, at each tenth and every 30 s.
    """
    begun = shown = (2.0, 0.0)  # share and time of the first line, and of the last one

    def update(share: float, note: str) -> None:
        nonlocal begun, shown
        now = time.monotonic()
        left = ""
        # A later stage begins at nothing again.
        if share < shown[0]:
            begun = (share, now)
        elif shown != begun and int(share * 10) == int(shown[0] * 10) and now - shown[1] < INTERVAL:
            return
        elif begun[0] < share < 1:
            left = f" {duration((now - begun[1]) / (share - begun[0]) * (1 - share))} left,"
        shown = (share, now)
        show(f"[{'#' * int(share * WIDTH):-<{WIDTH}}] {share:.0%}{left}{note}")

    return update


def on_terminal(terminal: TextIO) -> Show:
    """Print lines; those of a bar take each other's place on a terminal, and elsewhere end a silence of 30 s."""
    below_bar = False
    printed = -INTERVAL  # time of the last line

    def show(line: str) -> None:
        nonlocal below_bar, printed
        is_bar = BAR.search(line) is not None
        if terminal.isatty() and is_bar:
            # A line that wraps could not be taken back.
            line = (ONE_UP if below_bar else "") + line[: shutil.get_terminal_size().columns - 1]
        # A second less: bars wait as long.
        elif is_bar and time.monotonic() - printed < INTERVAL - 1:
            return
        below_bar, printed = is_bar, time.monotonic()
        print(line, file=terminal, flush=True)

    return show


def table_text(
    title: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Collection[str] = (),
) -> str:
    """A table as text for this terminal; the columns of `numbers` are right-justified."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for heading in headings:
        table.add_column(
            heading,
            justify="right" if heading in numbers else "left",
            no_wrap=heading == headings[0],
        )
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()
