"""The bars of all libraries (tqdm's), as lines of progress that `ptl run` shows and that a pod's log can hold.

To be imported before tqdm, which reads these variables once. One that the user has set stays.
"""

import os

from ptl.log import MARK, WIDTH

SECONDS = "10"  # between two lines; a shorter bar has none
LINES = {
    "TQDM_DELAY": SECONDS,
    "TQDM_MININTERVAL": SECONDS,
    "TQDM_ASCII": "-#",
    "TQDM_BAR_FORMAT": f"{MARK}[{{bar:{WIDTH}}}] {{percentage:.0f}}% {{remaining}} left, "
    "{desc}: {n_fmt} of {total_fmt}\n",
}

for name, value in LINES.items():
    os.environ.setdefault(name, value)
