"""Targets in a user's units: a share, a number of parameters, or a model that fits into some memory."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from ptl.config.base import LARGEST, Positive, Section
from ptl.units import quantity

FEWEST = 1000  # parameters to end with: a smaller number is a share that was meant as one of 100
BY_GOAL = 0.0  # as the pipeline's parameter `target`: its parameter `goal` says it
_MEMORY = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kMGT]|[KMGT]i)B?")
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?%")
# Kinds of target, which pydantic puts into the location of a field.
NUMBER, MEMORY = TAGS = ("<number>", "<memory>")


def _share_or_count(target: float) -> float:
    if target >= 1 and (target < FEWEST or not target.is_integer()):
        raise ValueError(
            f"must be a share of the parameters to remove, below 1, or the whole number of parameters to end with, "
            f"{FEWEST} or more"
        )
    return target


def memory_bytes(text: str) -> int:
    """`16GiB`, and so `16 GiB` and `16Gi` -> 16 x 2^30."""
    match = _MEMORY.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise ValueError("must be a number with a unit, kB, MB, GB, TB, KiB, MiB, GiB or TiB, for example 16GiB")
    return int(quantity(match[1] + match[2]))


def _memory(value: Any) -> str:
    """The text as it was written, checked; a number without a unit is text too, so that one error says what to do."""
    text = str(value)
    memory_bytes(text)
    return text


def _no_percent(value: Any) -> Any:
    """Refuse `40%` with the share that was meant."""
    match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    share = float(match[1]) / 100 if match else 0
    if 0 < share < 1:
        raise ValueError(f"must be a share of the parameters to remove: write {share:g}")
    return value


class MemoryGoal(Section):
    """Weights and KV cache together fit into so much memory."""

    memory: Annotated[str, BeforeValidator(_memory)]
    """for example 16GiB; for weights and KV cache, without activations and the runtime's own memory"""
    sequences: Positive = 1
    """sequences that are answered at once"""
    tokens: Positive | None = None
    """tokens of each in the KV cache; default: 4096, or the model's context length if that is shorter"""
    # Of weights and KV cache, whatever the dtype of the checkpoint.
    dtype: ClassVar[str] = "bfloat16"
    itemsize: ClassVar[int] = 2  # bytes of a number

    @property
    def bytes(self) -> int:
        """The memory."""
        return memory_bytes(self.memory)


Number = Annotated[float, Field(gt=0, le=LARGEST), AfterValidator(_share_or_count), BeforeValidator(_no_percent)]
Target = Annotated[
    Annotated[Number, Tag(NUMBER)] | Annotated[MemoryGoal, Tag(MEMORY)],
    Discriminator(lambda target: MEMORY if isinstance(target, MemoryGoal | dict) else NUMBER),
]
