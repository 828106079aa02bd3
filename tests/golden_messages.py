"""Golden files. Of messages: a paragraph is what a user writes, and below it all that is said to that.

PTL_UPDATE_GOLDEN=1 writes the files anew; read the diff.
"""

import os
import shlex
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"


def check(name, answer, /, **values):
    """Compare `answer(*words)` of the first line of each paragraph with the rest of the paragraph.

    `values` are in the file by their names, as `<id>`.
    """

    def said(line):
        for placeholder, value in values.items():
            line = line.replace(f"<{placeholder}>", str(value))
        text = answer(*shlex.split(line))
        for placeholder, value in values.items():
            text = text.replace(str(value), f"<{placeholder}>")
        return text.rstrip()

    lines = [
        paragraph.partition("\n")[0] for paragraph in (FOLDER / name).read_text().split("\n\n")
    ]
    expect(name, "\n\n".join(f"{line}\n{said(line)}" for line in lines) + "\n")


def expect(name, text):
    """The text is that of a golden file."""
    if os.environ.get("PTL_UPDATE_GOLDEN"):
        (FOLDER / name).write_text(text)
    assert text == (FOLDER / name).read_text()
