"""Verifiable rewards: whether an answer is right, decided by comparing or by running it, never by another model."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ptl.config.data import Reward

FINAL = re.compile(r"(?m)^#### (-?[\d,]*\.?\d+)\s*$")
FORMULA = re.compile(r"(?<!\\)\$|\\boxed")
CODE_BLOCK = re.compile(r"```((?:\w[^\n`]*)?)[^\S\n]*\n(.*?)(?:```|\Z)", re.S)
PYTHON = ("", "py", "py3", "python", "python3")  # tags of a block
LONGEST_BARE_ANSWER = 200  # characters; longer text is not taken for a formula

RewardValues = list[float | None]  # None: the reference cannot be read, so the answer is not judged
Texts = Sequence[str]
LogMetric = Callable[[str, float], None]  # trl's, by name and value of a batch


def final_answer_reward(answers: Texts, references: Texts, reward: Reward) -> RewardValues:
    """1 where the number that stands alone on the last `#### ` line equals the reference's, digit for digit."""
    values: RewardValues = []
    for answer, reference in zip(answers, references, strict=True):
        number = final_number(answer)
        # a reference may be a bare number or a worked solution
        expected = final_number(f"#### {_after_marker(reference)}")
        values.append(float(number is not None and number == expected))
    return values


def final_number(text: str) -> str | None:
    """The last `#### <number>` line's number, without thousands separators; None where there is none."""
    numbers = FINAL.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def math_reward(answers: Texts, references: Texts, reward: Reward) -> RewardValues:
    r"""1 where math-verify finds the answer equal to the reference (`\boxed{}`, LaTeX, or a plain number)."""
    return list(map(_math_value, answers, references))


def _math_value(answer: str, reference: str) -> float | None:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # seconds, as by default; math-verify's time limits are signals, which only the main thread may set
    limit: Any = 5 if threading.current_thread() is threading.main_thread() else None
    notations = [LatexExtractionConfig(), ExprExtractionConfig()]
    # a reference may be a worked solution; empty where nothing is read
    expected = parse(
        _formula(_after_marker(reference)), extraction_config=notations, parsing_timeout=limit
    )
    if not expected:
        return None
    # what follows the last `####`, where the model marks its answer so; else all of it
    conclusion = _after_marker(answer)
    formula = _formula(conclusion) if "####" in answer and conclusion else answer
    concluded = parse(formula, extraction_config=notations, parsing_timeout=limit)
    return float(verify(expected, concluded, timeout_seconds=limit))


def code_reward(
    answers: Texts, references: Texts, reward: Reward, log_metric: LogMetric | None = None
) -> RewardValues:
    """1 where the tests pass on the answer's Python (its first block of Python, else all of it), in the sandbox.

    `log_metric` gets the share of answers whose code ran out of time, which count as wrong.
    """
    from ptl.sandbox.runner import run_many

    outcomes = run_many(zip(map(program, answers), references, strict=True))
    if log_metric:
        log_metric(
            "code_timeouts",
            sum(outcome.status == "timeout" for outcome in outcomes) / len(outcomes),
        )
    return [float(outcome.passed) for outcome in outcomes]


def program(answer: str) -> str:
    """The Python in an answer: its first block that says no other language, else all of it."""
    # a block that is not closed was ended by the limit of tokens
    blocks = (code for tag, code in CODE_BLOCK.findall(answer) if tag.strip().lower() in PYTHON)
    return next(blocks, answer.lstrip())


def format_reward(answers: Texts, references: Texts, reward: Reward) -> RewardValues:
    """1 where the complete answer matches the pattern."""
    pattern = re.compile(reward.pattern)
    matches = map(pattern.fullmatch, answers)
    return [float(match is not None) for match in matches]


# by the name of a Reward in the config
REWARDS = {
    "final_answer": final_answer_reward,
    "math": math_reward,
    "code": code_reward,
    "format": format_reward,
}


def text_of(completion: Any) -> str:
    """A completion's text; for chats trl gives a list with one message."""
    if isinstance(completion, str):
        return completion
    return str(completion[0]["content"])


def _after_marker(text: str) -> str:
    """What follows the last `####`; all of a text without one."""
    return text.rpartition("####")[2].strip()


def _formula(text: str) -> str:
    """A bare answer in dollars, as LaTeX."""
    return text if FORMULA.search(text) or len(text) > LONGEST_BARE_ANSWER else f"${text}$"
