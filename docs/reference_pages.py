"""The pages of all fields of a config and of all commands, from the code, whenever the documentation is built."""

import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import typer  # noqa: E402

from ptl.cli.app import app  # noqa: E402
from ptl.config.base import Section  # noqa: E402
from ptl.config.run import Config  # noqa: E402

CONFIG_HEAD = """\
# Every field of a config

A config is one YAML file. Paths in it are relative to its own folder, and those in `--set` to the working directory.
`--set schedule.target=0.3` overrides a field by its dotted name; `recover.0.method` is that of a list's first entry. An
unknown field is an error that names the one you may have meant. What is common to most runs is in
[your own model in five steps](own-model.md).

**In your editor**: `ptl validate --schema > config.schema.json`, and as the first line of a config
`# yaml-language-server: $schema=config.schema.json`. Set the editor's YAML version to 1.1
(`"yaml.yamlVersion": "1.1"` in VS Code): in YAML 1.2, `500_000` is a text.
"""
COMMANDS_HEAD = """\
# Every command

`ptl COMMAND --help` shows the same in the terminal. Exit codes: 0 done; 1 the work failed; 2 the input was wrong; 130
and 143 interrupted by Ctrl-C or SIGTERM. With `--wait`, `ptl submit` and `ptl retry` add 3 (the gate was not passed)
and 4 (timeout).
"""
# Headings of the groups of commands; those that are not here have their own names.
FIRST_PANEL = "On this machine"
PANELS = {"Cluster": "On Kubeflow"}

Rows = list[tuple[str, ...]]


def config_page() -> str:
    """Every field of the config, section by section."""
    places: dict[type[Section], list[str]] = {}
    for section, path in _sections(Config, ""):
        if path not in places.setdefault(section, []):
            places[section].append(path)
    headings = _headings(places)
    links = {section.__name__: _anchor(heading) for section, heading in headings.items()}
    parts = [CONFIG_HEAD]
    for section, paths in places.items():
        parts.append(f"## {headings[section]}\n")
        parts.append(_introduction(section, paths))
        parts.append(
            _table(("field", "value", "default", "meaning"), list(_fields(section, links)))
        )
    return "\n".join([*parts, ""])


def _sections(section: type[Section], path: str) -> Iterator[tuple[type[Section], str]]:
    """Every section with the dotted name under which a config has it."""
    yield section, path
    for name, annotation in inspect.get_annotations(section, eval_str=True).items():
        inner = f"{path}.{name}" if path else name
        for found in _sections_in(annotation):
            yield from _sections(found, inner)


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _headings(places: dict[type[Section], list[str]]) -> dict[type[Section], str]:
    """The dotted name in a config; with or without it the class, where one of them has several of the other."""
    headings = {}
    for section, paths in places.items():
        words = _words(section.__name__).capitalize()
        is_alone = sum(paths == other for other in places.values()) == 1
        if section is Config:
            headings[section] = "The whole config"
        elif len(paths) > 1:
            headings[section] = words
        else:
            headings[section] = paths[0] if is_alone else f"{paths[0]}: {words.lower()}"
    return headings


def _words(name: str) -> str:
    """`data source` of DataSource."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


def _introduction(section: type[Section], paths: list[str]) -> str:
    text = inspect.getdoc(section) or ""
    if len(paths) > 1:
        text += f"\n\nIn {', '.join(f'`{path}`' for path in paths)}."
    base = next(
        (base.__name__ for base in section.__mro__[1:] if base.__name__ == "DataSource"), ""
    )
    if base:
        text += "\n\nIts fields beside those of a [data source](#data-source):"
    return f"{text}\n"


def _fields(section: type[Section], links: dict[str, str]) -> Iterator[tuple[str, ...]]:
    """The rows of a section's own fields; those of its bases are in their tables."""
    schema = section.model_json_schema()
    # A section that may be written in several forms describes its full form first.
    schema = schema.get("anyOf", [schema])[0]
    if "$ref" in schema:
        schema = section.model_json_schema()["$defs"][section.__name__]
    required = schema.get("required", [])
    for name in inspect.get_annotations(section):
        if name not in section.model_fields:
            continue
        prop = schema["properties"][name]
        default = "required" if name in required else _default(prop)
        yield (
            f"`{name}`",
            _kind(prop, links),
            default,
            " ".join((section.model_fields[name].description or "").split()),
        )


def _kind(prop: dict[str, Any], links: dict[str, str], word: str = "section") -> str:
    """What values a field takes, from its part of the schema."""
    if "$ref" in prop:
        name = prop["$ref"].rpartition("/")[2]
        return f"[{word or _words(name)}](#{links[name]})"
    options = [
        option
        for option in prop.get("anyOf", prop.get("oneOf", []))
        if option.get("type") != "null"
    ]
    if options:
        # Of several sections each by its name.
        word = "section" if sum("$ref" in option for option in options) == 1 else ""
        return " or ".join(_kind(option, links, word) for option in options)
    if "enum" in prop or "const" in prop:
        values = prop.get("enum") or [prop["const"]]
        # YAML reads off as false.
        return ", ".join(f"`{_text(value)}`" for value in values if value is not False)
    if prop["type"] == "array":
        return f"list: {_kind(prop['items'], links)}"
    if prop["type"] == "object":
        return f"mapping to {_kind(prop['additionalProperties'], links)}"
    return f"{TYPES[prop['type']]} {_range(prop)}".rstrip()


TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "`true`, `false`",
}
ENDLESS = 2**31 - 1  # no user comes near it
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _range(prop: dict[str, Any]) -> str:
    limits = {sign: prop[key] for key, sign in LIMITS.items() if key in prop}
    if limits.get("≤", 0) >= ENDLESS:
        del limits["≤"]
    if set(limits) == {"≥", "≤"}:
        return f"{_text(limits['≥'])} to {_text(limits['≤'])}"
    return ", ".join(f"{sign} {_text(limit)}" for sign, limit in limits.items())


def _default(prop: dict[str, Any]) -> str:
    value = prop.get("default")
    if value is None or value in ([], {}):
        return ""
    if isinstance(value, dict):
        return "see there"
    if isinstance(value, list) and isinstance(value[0], dict):
        value = _short(value)
    return f"`{_text(value)}`" if value != "" else "empty"


def _short(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of a list by what names them: the method of a stage, the name and weight of a reward."""
    return [
        {key: entry[key] for key in ("method", "name", "weight") if key in entry}
        for entry in entries
    ]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | dict):
        return json.dumps(value).replace('"', "")
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def commands_page() -> str:
    """Every command with its arguments and options."""
    parts = [COMMANDS_HEAD]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    panels: dict[str, list[str]] = {}
    for name, command in commands.items():
        panel = command.rich_help_panel
        title = PANELS.get(panel, panel) if isinstance(panel, str) else FIRST_PANEL
        panels.setdefault(title, []).extend(_command(name, command))
    for title, lines in panels.items():
        parts += [f"## {title}\n", *lines]
    return "\n".join([*parts, ""])


def _command(name: str, command: Any) -> list[str]:
    arguments = [
        parameter for parameter in command.params if parameter.param_type_name == "argument"
    ]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    shown = [
        argument.name.upper() if argument.required else f"[{argument.name.upper()}]"
        for argument in arguments
    ]
    usage = " ".join(["ptl", name, *shown])
    parts = [f"### ptl {name}\n", f"`{usage}`\n", f"{_paragraphs(command.help)}\n"]
    rows: Rows = [(f"`{argument.name.upper()}`", "", argument.help or "") for argument in arguments]
    rows += [(_names(option), _option_default(option), option.help or "") for option in options]
    if rows:
        parts.append(_table(("argument or option", "default", "meaning"), rows))
    return parts


def _paragraphs(text: str) -> str:
    return inspect.cleandoc(text)


def _names(option: Any) -> str:
    names = [*option.opts, *option.secondary_opts]
    return ", ".join(f"`{name}`" for name in names)


def _option_default(option: Any) -> str:
    if option.required:
        return "required"
    value = option.default
    if callable(value) or value in (None, False, "", [], ()):
        return ""
    return f"`{_text(value)}`"


def _table(headings: tuple[str, ...], rows: Rows) -> str:
    lines = [" | ".join(cell.replace("|", r"\|") for cell in row) for row in (headings, *rows)]
    first, *others = [f"| {line} |\n" for line in lines]
    return "".join([first, f"{'|---' * len(headings)}|\n", *others])


def _anchor(heading: str) -> str:
    """As Python-Markdown's `toc` makes it."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


PAGES = {"config-reference.md": config_page, "commands.md": commands_page}


def on_files(files: Any, *, config: Any) -> Any:
    """The pages among those of the documentation (a hook of MkDocs)."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, name, content=page()))
    return files
