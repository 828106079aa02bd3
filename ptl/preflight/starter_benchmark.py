"""The benchmark that `ptl init --eval` makes of rows: templates/benchmark.yaml, filled in.

How answers are graded is chosen by the rows' own answers, which are checked before anything is written.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from ptl.config.data import DataSource, columns_of
from ptl.config.run import check
from ptl.data.sources import FILE_KINDS, SourceRow, fill, local_file, numbered_rows
from ptl.errors import InputError
from ptl.json_lines import JSON_LINES
from ptl.preflight.amount import CHARACTERS_PER_TOKEN
from ptl.preflight.starter_rows import LENGTHS, QUESTION, settings_of

TEMPLATE = Path(__file__).parent / "templates/benchmark.yaml"
FIELD = "--eval"
COLUMNS = "--eval-columns"
GRADE = "--grade"

Grade = Literal["number", "text", "boxed"]
BOX = "\\boxed{"
MARK = "####"  # what GSM8K and others write before the result
# With separators of thousands, and a sign unless it is an operator
NUMBER = r"(?:(?<![\w).])-)?(?:\d+(?:(?:,|\{,\})\d{3})*(?:\.\d+)?|\.\d+)"
WHOLE_NUMBER = re.compile(rf"[$€£+]?\s*{NUMBER}\s*%?\.?")  # with its unit
# What the metric removes from both numbers before it compares them, in this order
NOT_OF_A_NUMBER = (
    rf"(?s).*{MARK}",
    r"[^\d.-]",  # units, signs and separators
    r"\.0*$",
    r"(?:(?<=\.\d)|(?<=\.\d\d)|(?<=\.\d{3})|(?<=\.\d{4}))0+$",
    r"(?<![\d.])0+(?=[\d.])",
)
NOT_OF_A_TEXT = (rf"(?s).*{MARK}", r"^\s+", r"[\s.]+$")
# Of a model that answers as a chat: it has not read rows that show how an answer ends.
INSTRUCTIONS = {
    "number": "\nGive the result as the last number of your answer.",
    "text": "\nAnswer with the result alone.",
    "boxed": "\nPlease reason step by step, and put your final answer within \\boxed{}.",
}
RIGHT = {
    "number": "the last number of the answer is the row's",
    "text": "the answer is the row's, but for upper case, white space around it and a full stop",
    "boxed": "what is in the last \\boxed{} of the answer equals the row's, also as a formula",
}
RESERVED = {
    "true",
    "false",
    "none",
    "True",
    "False",
    "None",
    "not",
    "and",
    "or",
    "if",
    "else",
    "in",
    "is",
    "self",
}


@dataclass(frozen=True)
class Benchmark:
    """Rows that a model is scored on."""

    file: Path
    source: DataSource  # with the templates of prompt and answer
    grade: Grade
    num_items: int
    longest: int  # answer, in bytes of UTF-8: letters of some scripts are a token each
    line_break: str  # that no answer has: one, two in a row, or empty where some have both
    note: str = ""  # a warning where most answers are numbers, and all are graded as texts

    @property
    def name(self) -> str:
        """The task's name in scores and reports: the file's in signs that MLflow takes, and none of the harness's."""
        return "own_" + re.sub(r"[^\w-]+", "_", self.file.name.partition(".")[0])

    @property
    def answer(self) -> str:
        """The column of the right answer."""
        return columns_of(self.source.completion)[0]

    @property
    def sentence(self) -> str:
        """What is scored, and when an answer is right."""
        return f"{self.num_items:,} items of {self.file.name}; an answer is right where {RIGHT[self.grade]}"

    def answer_tokens(self, context: int | None, longest_chat: int) -> int:
        """Tokens of the longest answer; `longest_chat`: of an answer of a chat, 0 where prompts are no chats."""
        tokens = next(
            (length for length in LENGTHS if length * CHARACTERS_PER_TOKEN >= 2 * self.longest),
            LENGTHS[-1],
        )
        return longest_chat or min(tokens, (context or 2 * tokens) // 2)

    def task_file(self, config: Path) -> Path:
        """Where its task is written: beside the config, or, with code, in a folder of its own.

        All files below the folder of a task with code belong to the key of its scores.
        """
        if self.grade == "boxed":
            return config.with_name(f"{config.stem}-eval") / "boxed.yaml"
        return config.with_name(f"{config.stem}-eval.yaml")

    def values(self, file: Path, *, chat: bool, answer_tokens: int) -> dict[str, Any]:
        """The values of the template's placeholders, for a task in `file`."""
        prompt = self.source.prompt
        if chat and {"prompt": prompt, "completion": self.source.completion} == QUESTION:
            prompt = "{question}"  # as the model's own answers are asked for
        written = _jinja(prompt)
        if chat:
            written = written.rstrip() + INSTRUCTIONS[self.grade]
        number, text = self.grade == "number", self.grade == "text"
        return {
            "title": self.sentence,
            "name": json.dumps(self.name),
            "format": "parquet" if self.file.suffix == ".parquet" else "json",
            "rows": json.dumps(
                os.path.relpath(self.file.resolve(), file.parent.resolve()), ensure_ascii=False
            ),
            "prompt": json.dumps(written, ensure_ascii=False),
            "answer": json.dumps(self.answer, ensure_ascii=False),
            "delimiter": json.dumps(self.source.completion.partition("{")[0]),
            "until": json.dumps([] if chat else self._ends(prompt)),
            "chat": "" if chat else None,
            "plain": None if chat else "",
            "answer_tokens": answer_tokens,
            "number": "" if number else None,
            "text": "" if text else None,
            "boxed": "" if self.grade == "boxed" else None,
            "pattern": json.dumps(f"({NUMBER})") if number else None,
            "ignored": json.dumps(NOT_OF_A_NUMBER if number else NOT_OF_A_TEXT),
        }

    def _ends(self, prompt: str) -> list[str]:
        """The texts that end an answer of a model that continues a text, and would go on with the next prompt."""
        # One that reasons before a number or a box needs more than the line that the row's answer has.
        line_break = "\n\n" if self.line_break and self.grade != "text" else self.line_break
        words = prompt.partition("{")[0].strip()
        return [text for text in (line_break, words) if text]


def read(
    name: str, columns: str | None, grade: Grade | None, of_data: str | None = None
) -> Benchmark:
    """The benchmark of a file's rows, all of which are checked. Raises InputError that names the option.

    `columns`: PROMPT,ANSWER; None: those `of_data` (--columns) if the rows have them, or those that --data knows by
    name. `grade` None: chosen by the answers.
    """
    source = check(DataSource, {"source": name}, FIELD)
    file = _file(source)
    first = next(iter(numbered_rows(source, FIELD)))
    if (
        columns is None
        and of_data
        and of_data.count(",") == 1
        and {*_names(of_data)} <= first.columns.keys()
    ):
        columns = of_data
    source = source.model_copy(update=_templates(first, columns))
    answers = []
    kinds: dict[str, tuple[str, int]] = {}  # by column, with the first row that has it
    for row in numbered_rows(source, FIELD):
        _check_kinds(row, kinds)
        if not fill(source.prompt, row).strip():
            raise row.error(" has an empty prompt", "leave such rows out")
        answer = fill(source.completion, row).strip()
        if not re.search(r"[^\s.]", _result(answer)):
            raise row.error(
                f" has an empty {columns_of(source.completion)[0]!r}, the answer",
                "leave such rows out",
            )
        answers.append(answer)
    chosen = grade or _grade(answers)
    if chosen == "number":
        _check_numbers(answers, source)
    absent = [text for text in ("\n", "\n\n") if not any(text in answer for answer in answers)]
    longest = max(len(answer.encode()) for answer in answers)
    note = _note(answers) if chosen == "text" and grade is None else ""
    return Benchmark(file, source, chosen, len(answers), longest, absent[0] if absent else "", note)


def _file(source: DataSource) -> Path:
    """The local file of the rows."""
    name = source.source
    remedy = f"give {FILE_KINDS} (of a JSON list: jq -c '.[]' FILE.json > FILE.jsonl)"
    if "://" in name:
        raise InputError(
            f"{name} is no file of this machine", field=FIELD, remedy=f"fetch it, and {remedy}"
        )
    # Of a CSV file, local_file has the line that converts it.
    if not name.endswith((*JSON_LINES, ".parquet", ".csv")):
        raise InputError(
            f"{name} is no .jsonl, .jsonl.gz or .parquet file", field=FIELD, remedy=remedy
        )
    file = local_file(source, FIELD)
    assert file is not None
    return file


def _templates(first: SourceRow, columns: str | None) -> dict[str, str]:
    """Prompt and completion for rows with such columns. Raises InputError that names the option."""
    row = first.columns
    present = f"the rows have {', '.join(sorted(row))}"
    if columns is None:
        try:
            known = settings_of(row, None)
        except InputError as error:
            raise _columns_error(f"missing; {present}") from error
        if "prompt" in known:
            return known
        if "messages" in known.values():
            raise InputError(
                f"the rows are chats ({present}), and a benchmark has one prompt and one right answer",
                field=FIELD,
                remedy="write both into columns, for example: jq -c '{prompt: .messages[0].content, completion: "
                ".messages[-1].content}' OLD > NEW",
            )
        raise _columns_error(f"missing; {present}, and no answer beside the text")
    names = _names(columns)
    absent = [name for name in names if name not in row]
    if len(names) != 2 or absent:
        problem = (
            f"no column {', '.join(map(repr, absent))}" if absent else "two columns are needed"
        )
        raise _columns_error(f"{columns}: {problem}; {present}")
    for name in names:
        if not name.isidentifier() or name in RESERVED:
            raise InputError(
                f"{columns}: no template of a task can name the column {name!r}",
                field=COLUMNS,
                remedy="rename it in the file, with letters, digits and _",
            )
    return settings_of(row, columns)


def _names(columns: str) -> list[str]:
    return [name.strip() for name in columns.split(",")]


def _columns_error(problem: str) -> InputError:
    return InputError(
        problem, field=COLUMNS, remedy=f"give {COLUMNS} PROMPT,ANSWER, two columns of the rows"
    )


def _check_kinds(row: SourceRow, kinds: dict[str, tuple[str, int]]) -> None:
    """Raise InputError where a column holds another kind of value than in an earlier row: the harness reads a table."""
    for name, value in row.columns.items():
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        kind = "number" if is_number else type(value).__name__
        earlier, number = kinds.setdefault(name, (kind, row.number))
        if kind != earlier:
            raise row.error(
                f" has a {kind} in column {name!r}, and row {number} a {earlier}",
                "write the column alike in all rows",
            )


def _result(answer: str) -> str:
    """What follows the mark of a result, or all."""
    return answer.rpartition(MARK)[2].strip()


def _grade(answers: list[str]) -> Grade:
    """By box where every answer has one, by number where every result is one, else by text."""
    if all(BOX in answer for answer in answers):
        return "boxed"
    return "text" if _rows_without_number(answers) else "number"


def _rows_without_number(answers: list[str]) -> list[int]:
    """The numbers of the rows, from 1, whose results are no numbers."""
    return [
        row for row, answer in enumerate(answers, 1) if not WHOLE_NUMBER.fullmatch(_result(answer))
    ]


def _note(answers: list[str]) -> str:
    """A warning that names the first answer that is no number, where more than half of them are some."""
    others = _rows_without_number(answers)
    if 2 * len(others) >= len(answers):
        return ""
    first = _result(answers[others[0] - 1])[:40]
    return (
        f"{FIELD}: row {others[0]} ({first!r}) and {len(others) - 1} more are no numbers, so that all answers are "
        f"compared as texts; correct them, or give {GRADE} text"
    )


def _check_numbers(answers: list[str], source: DataSource) -> None:
    """Raise InputError for the first answer that is no number."""
    others = _rows_without_number(answers)
    if others:
        first = _result(answers[others[0] - 1])[:40]
        raise InputError(
            f"number, and the answer of row {others[0]} of {source.source} is none: {first!r}",
            field=GRADE,
            remedy=f"correct the row, or give {GRADE} text",
        )


def _jinja(template: str) -> str:
    """A template over a row's columns in the words of a task: {{column}}."""
    parts = [
        text + (f"{{{{{column}}}}}" if column is not None else "")
        for text, column, _, _ in Formatter().parse(template)
    ]
    return "".join(parts)
