"""YAML that somebody wrote: what no config needs is an error with its line, not a traceback or an endless expansion."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from ptl.errors import InputError

BYTES = 1 << 18  # of a file; the longest config that is shipped has 3 kB
VALUES = 10_000  # with each alias counted as what it stands for


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


def load(
    text: str, where: str, kind: type[yaml.SafeLoader] = yaml.SafeLoader, *, field: str = ""
) -> Any:
    """The value of a YAML text; `kind` may know more tags. Raises InputError whose problem begins with `where`."""
    if len(text) > BYTES:
        raise InputError(
            f"{where} is longer than {BYTES >> 10} KiB, which no config is", field=field
        )
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
    # PyYAML's constructors leak a dozen kinds, for example for `2026-13-01`
    except Exception as error:
        raise InputError(f"{where} is not valid YAML: {error}", field=field) from error


def _check(root: yaml.Node) -> None:
    """Raise InputError that begins with a line. What an alias names counts again each time, but only up to VALUES."""
    visited, waiting = 0, [root]
    while waiting:
        node = waiting.pop()
        visited += 1
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            waiting += [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
        if visited + len(waiting) > VALUES:  # an anchor that holds itself never ends
            raise InputError(
                f"line {node.start_mark.line + 1} holds more than {VALUES:,} values, or its aliases do"
            )


def _check_keys(node: yaml.MappingNode) -> None:
    """PyYAML keeps the last of two equal keys without a word."""
    counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
    del counts["<<"]  # merges may be several
    repeated = min((name for name, count in counts.items() if count > 1), default=None)
    if repeated is not None:
        raise InputError(
            f"line {node.start_mark.line + 1}: {repeated!r} appears twice in one section",
            remedy="remove one",
        )
