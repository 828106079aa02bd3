"""YAML that somebody wrote: what no config needs is an error with its line, not a traceback or an endless expansion."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import yaml

from ptl.errors import InputError

BYTES = 1 << 18  # of a file; the longest config that is shipped has 3 kB
VALUES = 10_000  # with each alias counted as what it stands for
DEPTH = 32
DIGITS = 400  # of one number; Python refuses to read 4,300
UNSTORABLE = re.compile("[\\0\\ud800-\\udfff]")  # no UTF-8 file or database takes them


def load(text: str, where: str, kind: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The value of a YAML text; `kind` may know more tags. Raises InputError that begins with `where`."""
    if len(text) > BYTES:
        raise InputError(f"{where} is longer than {BYTES >> 10} KiB, which no config is")
    try:
        loader = kind(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _measure(node, where, {}, 1)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except InputError:
        raise
    except RecursionError as error:
        raise InputError(f"{where} is nested too deeply") from error
    except Exception as error:  # PyYAML's constructors leak a dozen kinds, for example for `2026-13-01`
        raise InputError(f"{where} is not valid YAML: {error}") from error


def _measure(node: yaml.Node, where: str, known: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    """Number of values below a node, aliases expanded, and its height; each node is visited once."""
    line = f"{where}, line {node.start_mark.line + 1}"
    if id(node) in known:
        return known[id(node)]
    if depth > DEPTH:  # also where an anchor holds itself
        raise InputError(f"{line} is nested more than {DEPTH} deep")
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, line)
        children: list[yaml.Node] = []
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node, line)
        children = [child for pair in node.value for child in pair]
    else:
        children = node.value
    measures = [_measure(child, where, known, depth + 1) for child in children]
    count = 1 + sum(values for values, _ in measures)
    height = 1 + max((below for _, below in measures), default=0)
    if count > VALUES or height > DEPTH:
        raise InputError(f"{line} holds more than {VALUES:,} values, or more than {DEPTH} levels, by its aliases")

    known[id(node)] = count, height
    return known[id(node)]


def _check_scalar(node: yaml.ScalarNode, line: str) -> None:
    if UNSTORABLE.search(node.value):
        raise InputError(f"{line} has a character that no file can hold ({node.value[:40]!r}); remove it")
    if node.tag == "tag:yaml.org,2002:int" and len(node.value) > DIGITS:
        raise InputError(f"{line} is a number of {len(node.value):,} digits; give a smaller one")


def _check_keys(node: yaml.MappingNode, line: str) -> None:
    names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        raise InputError(f"{line}: {twice[0]!r} is there twice in one section; remove one")
