"""Takes the program out of a chat's answer, for mbpp_chat.yaml."""

from collections.abc import Sequence
from typing import Any

from ptl.recovery.rewards import program


def build_predictions(resps: Sequence[Sequence[str]], docs: Sequence[Any]) -> list[list[str]]:
    """The programs of the answers to each problem, as the harness asks its filters for them."""
    return [[program(answer) for answer in answers] for answers in resps]
