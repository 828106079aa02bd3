"""Verifiable rewards: whether an answer is right, decided by comparing or by running it, never by another model."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ptl.config import Reward
from ptl.errors import InputError

FINAL = re.compile(r"(?m)^#### (-?[\d,]*\.?\d+)\s*$")
BLOCK = re.compile(r"```(?:python|py)?\n(.*?)(?:```|\Z)", re.S)

Scores = list[float | None]  # None: the reference cannot be read, so the answer is not judged
Score = Callable[[Sequence[str], Sequence[str], Reward], Scores]


def final_answer(answers: Sequence[str], references: Sequence[str], reward: Reward) -> Scores:
    """1 where the number that stands alone on the last `#### ` line equals the reference's, digit for digit."""
    return [1.0 if (given := number(answer)) and given == number(f"#### {ref.rpartition('####')[2].strip()}") else 0.0
            for answer, ref in zip(answers, references, strict=True)]  # fmt: skip


def number(text: str) -> str | None:
    """The last `#### <number>` line's number, without thousands separators; None where there is none."""
    found = FINAL.findall(text)
    return found[-1].replace(",", "") if found else None


def math(answers: Sequence[str], references: Sequence[str], reward: Reward) -> Scores:
    r"""1 where math-verify finds the answer equal to the reference (`\boxed{}`, LaTeX, or a plain number)."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # math-verify's time limits are signals, which only the main thread may set
    limits = {} if threading.current_thread() is threading.main_thread() else {"parsing_timeout": None}
    verify_limits = {"timeout_seconds": None} if limits else {}
    ways = [LatexExtractionConfig(), ExprExtractionConfig()]

    def one(answer: str, reference: str) -> float | None:
        wanted = parse(_as_math(reference), extraction_config=ways, **limits)
        if not wanted:
            return None
        given = parse(_answer_part(answer), extraction_config=ways, **limits)
        return float(verify(wanted, given, **verify_limits))

    return [one(answer, reference) for answer, reference in zip(answers, references, strict=True)]


def code(answers: Sequence[str], references: Sequence[str], reward: Reward) -> Scores:
    """1 where the tests pass on the answer's Python (its first fenced block, else all of it), in the sandbox."""
    from ptl.sandbox import run_many

    pairs = [(program(answer), tests) for answer, tests in zip(answers, references, strict=True)]
    return [float(outcome.passed) for outcome in run_many(pairs)]


def program(answer: str) -> str:
    """The Python in an answer."""
    block = BLOCK.search(answer)
    return block.group(1) if block else answer


def well_formed(answers: Sequence[str], references: Sequence[str], reward: Reward) -> Scores:
    """1 where the whole answer matches the pattern."""
    pattern = re.compile(reward.pattern)
    return [float(pattern.fullmatch(answer) is not None) for answer in answers]


REWARDS: dict[str, Score] = {"final_answer": final_answer, "math": math, "code": code, "format": well_formed}


def reference_template(reward: Reward) -> str:
    """What of a row an answer is compared with."""
    return {"code": reward.tests, "format": ""}.get(reward.name, reward.answer)


def check_patterns(rewards: Sequence[Reward]) -> None:
    """Raise InputError for a pattern that is no regular expression."""
    for reward in rewards:
        try:
            re.compile(reward.pattern)
        except re.error as error:
            raise InputError(
                f"recover.rewards.pattern: {reward.pattern!r} is no regular expression: {error}"
            ) from error


def text_of(completion: Any) -> str:
    """A completion's text; for chats trl gives a list with one message."""
    return completion if isinstance(completion, str) else str(completion[0]["content"])


def _as_math(reference: str) -> str:
    """A reference as math-verify reads it: the final answer of a worked solution, a bare LaTeX answer in dollars."""
    final = reference.rpartition("####")[2].strip().replace(",", "") if "####" in reference else reference.strip()
    return final if any(mark in final for mark in ("$", "\\boxed")) or len(final) > 200 else f"${final}$"


def _answer_part(answer: str) -> str:
    """What follows the last `####`, where the model marks its answer so; else all of it."""
    marked = answer.rpartition("####")[2].strip()
    return f"${marked.replace(',', '')}$" if "####" in answer and marked else answer
