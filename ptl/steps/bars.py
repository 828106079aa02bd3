"""The bars of all libraries (tqdm's), as lines of progress that `ptl run` shows and that a pod's log can hold.

To be imported before tqdm, which reads these variables once. One that the user has set stays.
"""

import functools
import os
from typing import Any

from ptl.log import MARK, WIDTH
from ptl.units import duration

SECONDS = "10"  # between two lines; a shorter bar has none
BAR = f"[{{bar:{WIDTH}}}] {{percentage:.0f}}% {{remaining}} left, {{desc}}: {{n_fmt}} of {{total_fmt}}\n"
LINES = {
    "TQDM_DELAY": SECONDS,
    "TQDM_MININTERVAL": SECONDS,
    "TQDM_ASCII": "-#",
    "TQDM_BAR_FORMAT": MARK + BAR,
}

for variable, value in LINES.items():
    os.environ.setdefault(variable, value)
# A process that is forked has other variables, and the bars of the one that has imported this.
IS_OURS = os.environ["TQDM_BAR_FORMAT"] == LINES["TQDM_BAR_FORMAT"]


def name(step: str) -> None:
    """Let the bars of this process begin with a step's name, and say the time that is left as a training's bar does."""
    if not IS_OURS:
        return
    from tqdm import std

    bars: Any = std.tqdm  # of which all others are made
    # The variables are read once, before a process that others are forked from knows their steps.
    bars.__init__ = functools.partialmethod(bars.__init__, bar_format=f"{MARK}{step}: {BAR}")
    bars.format_interval = staticmethod(duration)
