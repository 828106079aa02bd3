"""Write prompts of HumanEval's form: functions of Python's standard library without their bodies, to complete.

functions.jsonl.gz beside this file has those of CPython 3.11.7, under LICENSE.python. `python functions.py` writes it.
"""

import ast
import gzip
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

DOCSTRING = range(80, 500)  # characters: says what to do, and leaves room for an answer
LONGEST = 800  # characters of a function, which the model can write
SKIPPED = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "tkinter",
    "turtledemo",
}
FILE = Path(__file__).with_name("functions.jsonl.gz")


def functions(folder: Path) -> Iterator[str]:
    """Public functions with a docstring, up to its end."""
    for file in sorted(folder.rglob("*.py")):
        if SKIPPED & set(file.relative_to(folder).parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
            nodes = ast.parse(text).body
        except (SyntaxError, UnicodeDecodeError):  # examples of what Python refuses
            continue
        lines = text.split("\n")  # as ast counts them: str.splitlines also splits at a form feed
        for node in nodes:
            if (
                not isinstance(node, ast.FunctionDef)
                or node.name.startswith("_")
                or node.decorator_list
            ):
                continue
            first, *rest = node.body
            if not rest or len(ast.get_docstring(node) or "") not in DOCSTRING:
                continue
            if len("\n".join(lines[node.lineno - 1 : node.end_lineno])) <= LONGEST:
                yield "\n".join(lines[node.lineno - 1 : first.end_lineno])


def main() -> None:
    found = dict.fromkeys(functions(Path(sysconfig.get_path("stdlib"))))  # once each
    text = "".join(json.dumps({"function": function}) + "\n" for function in found)
    # without a time, so that the same rows are the same file
    FILE.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
