"""YAML that somebody wrote: what no config needs is an error with its line, not a traceback or an endless expansion."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from ptl.errors import InputError

BYTES = 1 << 18  # of a file; the longest config that is shipped has 3 kB
VALUES = 10_000  # with each alias counted as what it stands for
DEPTH = 32
DIGITS = 400  # of one number; Python refuses to read 4,300
UNSTORABLE = re.compile("[\\0\\ud800-\\udfff]")  # no UTF-8 file or database takes them


def load_file(path: Path, *, field: str) -> Any:
    """The value of a YAML file. Raises InputError."""
    try:
        if not path.is_file():
            raise InputError(f"no file {path}", field=field, remedy="give the path of a YAML file")
        # One character more than is allowed: a file of any length is refused at once.
        with path.open(encoding="utf-8") as file:
            text = file.read(BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)[:200]} cannot be read: {error}"[:500], field=field) from error
    return load(text, str(path), field=field)


def load(text: str, where: str, kind: type[yaml.SafeLoader] = yaml.SafeLoader, *, field: str = "") -> Any:
    """The value of a YAML text; `kind` may know more tags. Raises InputError whose problem begins with `where`."""
    if len(text) > BYTES:
        raise InputError(f"{where} is longer than {BYTES >> 10} KiB, which no config is", field=field)
    try:
        loader = kind(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node)  # before any of its aliases is expanded
        return loader.construct_document(node)
    except InputError as error:  # of a line
        raise InputError(f"{where}, {error.problem}", field=field, remedy=error.remedy) from error
    except RecursionError as error:
        raise InputError(f"{where} is nested too deeply", field=field) from error
    except Exception as error:  # PyYAML's constructors leak a dozen kinds, for example for `2026-13-01`
        raise InputError(f"{where} is not valid YAML: {error}", field=field) from error


def _check(root: yaml.Node) -> None:
    """Raise InputError that begins with a line. What an alias names counts again each time, but only up to VALUES."""
    visited, waiting = 0, [(root, 1)]
    while waiting:
        node, depth = waiting.pop()
        visited += 1
        line = f"line {node.start_mark.line + 1}"
        if depth > DEPTH:  # also where an anchor holds itself
            raise InputError(f"{line} is nested more than {DEPTH} deep")
        children: list[yaml.Node] = []
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node, line)
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node, line)
            children = [child for pair in node.value for child in pair]
        else:
            children = node.value
        waiting += [(child, depth + 1) for child in children]
        if visited + len(waiting) > VALUES:
            raise InputError(f"{line} holds more than {VALUES:,} values, or its aliases do")


def _check_scalar(node: yaml.ScalarNode, line: str) -> None:
    if UNSTORABLE.search(node.value):
        raise InputError(f"{line} has a character that no file can hold ({node.value[:40]!r})", remedy="remove it")
    digits = len(node.value)
    if node.tag == "tag:yaml.org,2002:int" and digits > DIGITS:
        raise InputError(f"{line} is a number of {digits:,} digits", remedy="give a smaller one")


def _check_keys(node: yaml.MappingNode, line: str) -> None:
    """PyYAML keeps the last of two equal keys without a word."""
    counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
    del counts["<<"]  # merges may be several
    repeated = min((name for name, count in counts.items() if count > 1), default=None)
    if repeated is not None:
        raise InputError(f"{line}: {repeated!r} appears twice in one section", remedy="remove one")
