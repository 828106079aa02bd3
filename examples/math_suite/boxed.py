"""Grades answers of mathematics by what is in their last \\boxed{}: the functions that boxed.yaml names."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

BOX = "\\boxed{"
COLUMNS = ("answer", "final_answer", "solution")  # of a reference; the first that a row has
BRACES = re.compile(r"\\.|[{}]", re.S)  # an escaped brace opens and closes nothing
THOUSANDS = r"(?<=\d)(?:\{,\}|,(?:\\!)?)(?=\d{3}(?!\d))"
# separators, units, signs
NO_NUMBER = re.compile(rf"{THOUSANDS}|\\(?:text|mathrm)\{{[^{{}}]*\}}|\\[%$!, ]|[$\s]")
NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:(?:e|\\(?:times|cdot)10\^)\{?([+-]?\d+)\}?)?")


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """What lm-evaluation-harness asks for: 1 where the answer is right."""
    return {"exact_match": int(is_right(results[0], reference(doc)))}


def exact_match(references: Sequence[str], predictions: Sequence[str]) -> float:
    """The same as a metric of lm-evaluation-harness, for a task whose doc_to_target is the right answer."""
    return float(is_right(predictions[0], result(references[0])))


def is_right(text: str, expected: str) -> bool:
    """Whether what is in the last box of an answer is what is expected."""
    answer = last_boxed(text)
    return answer is not None and is_equal(answer, expected)


def reference(doc: Mapping[str, Any]) -> str:
    """A row's right answer: a text or a list of texts, or what is boxed in its solution."""
    value = next(doc[column] for column in COLUMNS if column in doc)
    return result(", ".join(value) if isinstance(value, list) else str(value))


def result(text: str) -> str:
    """What is boxed in a right answer, or all of it."""
    boxed = last_boxed(text)
    return text.strip() if boxed is None else boxed


def last_boxed(text: str) -> str | None:
    """What is in the last box; None where there is no box, or its end is missing."""
    _, box, rest = text.rpartition(BOX)
    depth = 1
    for brace in BRACES.finditer(rest):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if box and not depth:
            return rest[: brace.start()].strip()
    return None


def is_equal(answer: str, expected: str) -> bool:
    """Whether two answers mean the same: as text, as plain numbers, or as formulas."""
    if answer == expected:
        return True
    given, wanted = number(answer), number(expected)
    # math-verify rounds to six decimals: all charges of a few electrons would be equal.
    if given is not None and wanted is not None:
        return math.isclose(given, wanted)
    from math_verify import LatexExtractionConfig, parse, verify

    formulas = [
        parse(f"${BOX}{text}}}$", extraction_config=[LatexExtractionConfig()])
        for text in (expected, answer)
    ]
    return bool(verify(*formulas))


def number(text: str) -> float | None:
    """A plain number, also 4.5e33, 4.5 \\times 10^{33}, 10{,}000 or 5 \\text{ cm}; None for anything else."""
    match = NUMBER.fullmatch(NO_NUMBER.sub("", text))
    return float(f"{match[1]}e{match[2] or 0}") if match else None
