"""Tables for the terminal, all made in one way."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence

PIPE_WIDTH = 140  # columns: a pipe has no width, and rich would take 80 and wrap the last cells


def table_text(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Collection[str] = ()
) -> str:
    """A table as text for this terminal; the columns of `numbers` are right-justified."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in numbers else "left", no_wrap=heading == headings[0])
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()
