"""How much is removed in each iteration, of what, and how many tokens follow: plan() turns it into iterations.

The target is in a user's units: a share, a number of parameters, or a model that fits into some memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from ptl.config.base import LARGEST, MEMORY, NUMBER, Count, Positive, Section, one_error
from ptl.units import quantity

FEWEST = 1000  # parameters to end with: a smaller number is a share that was meant as one of 100
_MEMORY_TEXT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kMGT]|[KMGT]i)B?")
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?%")

# Tokens of an iteration, as a multiple of the last one's.
GROWTH = {"uniform": 1, "doubling": 2, "quadrupling": 4}

Unit = Literal["neurons", "width", "layers", "experts"]
NeuronCriterion = Literal["max", "weight", "taylor", "random"]

Multiple = Annotated[
    Annotated[int, Field(ge=1)] | Literal["auto"],
    one_error("must be a whole number of 1 or more, or auto"),
]


def _share_or_count(target: float) -> float:
    if target >= 1 and (target < FEWEST or not target.is_integer()):
        raise ValueError(
            f"must be a share of the parameters to remove, below 1, or the whole number of parameters to end with, "
            f"{FEWEST} or more"
        )
    return target


def memory_bytes(text: str) -> int:
    """`16GiB`, and so `16 GiB` and `16Gi` -> 16 x 2^30."""
    match = _MEMORY_TEXT.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise ValueError(
            "must be a number with a unit, kB, MB, GB, TB, KiB, MiB, GiB or TiB, for example 16GiB"
        )
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


Number = Annotated[
    float, Field(gt=0, le=LARGEST), AfterValidator(_share_or_count), BeforeValidator(_no_percent)
]
Target = Annotated[
    Annotated[Number, Tag(NUMBER)] | Annotated[MemoryGoal, Tag(MEMORY)],
    Discriminator(lambda target: MEMORY if isinstance(target, MemoryGoal | dict) else NUMBER),
]


class Schedule(Section):
    """How much each iteration removes, and how many tokens each recovery gets."""

    # Argo ends a Workflow whose state is larger than 1 MiB, at 48
    iterations: Annotated[int, Field(ge=1, le=40)] = 4
    """each prunes, recovers and evaluates"""
    target: Target
    """below 1: share of all parameters to remove; 1000 or more: the number of parameters to end with; or a goal"""
    cuts: Literal["uniform", "cubic"] = "cubic"
    """remove equal parts in each iteration, or more in the first ones, on a cubic curve"""
    tokens: Literal["uniform", "doubling", "quadrupling"] = "doubling"
    """equal token budgets, or in each iteration twice or four times those of the last"""
    recovery_tokens: Count
    """tokens of recovery training over all iterations"""


class Width(Section):
    """Sizes to end with; what is left out, the loss on the calibration text decides."""

    hidden: Positive | None = None
    """dimensions of the residual stream: a multiple of the query heads"""
    ffn: Positive | None = None
    """FFN neurons of each layer, or of each expert"""
    kv: Positive | None = None
    """KV heads of each layer; their query heads go with them"""


class Prune(Section):
    """What counts as redundant, and how widths are rounded."""

    # What is removed, and by which score.
    target: Literal["auto", "neurons", "width", "layers", "neurons_then_layers", "experts"] = Field(
        "auto",
        description="what is removed; `neurons`: of each FFN, in a mixture of experts of each expert; `auto`: neurons, "
        "and where these alone would leave the FFN less than 37 % of the parameters, KV heads (each with its query "
        "heads) or hidden size too, by the criterion `taylor` alone; `width`: the same, with sizes of your own in "
        "`width`; `neurons_then_layers` removes layers in the last iteration; `experts` removes whole experts of a "
        "mixture, as many in every layer",
    )
    criterion: Literal[NeuronCriterion, "reap"] = Field(
        "taylor",
        description="how neurons are scored: `max`, `weight`, `taylor` or `random`. With target `experts` how "
        "experts are: `reap` (the default there) or `random`",
    )

    # Widths that GPUs multiply fast, and that can be divided between several.
    width_multiple: Multiple = Field(
        "auto",
        description="round the FFN width, and a pruned hidden size, down to a multiple of this; `auto`: the largest of "
        "128, 64, 8 and 1 that divides it and is at most an eighth of what is left of it. For N GPUs that will share "
        "the model (tensor parallelism) set a multiple of N, for example 128 x N. In a mixture of experts widths are "
        "multiples of 8 whatever is set",
    )

    width: Width = Width()
    """with target `width`: sizes to end with"""

    repair: Count = 0
    """sequences of the calibration text (as far as it has rows) on which after a cut each down_proj is fitted by least
    squares, so that its layer gives what it gave before: for dense models that recover on few tokens; 0: none"""

    @property
    def wanted(self) -> dict[str, int | None] | None:
        """`width` as a dict; None with target `auto`, which removes nothing without which a runtime cannot load it."""
        return self.width.model_dump() if self.target == "width" else None

    @model_validator(mode="before")
    @classmethod
    def _experts_have_a_default_criterion(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("target") == "experts":
            return {"criterion": "reap", **values}
        return values

    @model_validator(mode="after")
    def _criterion_is_one_of_the_target(self) -> Prune:
        if self.target != "width" and self.width != Width():
            raise ValueError("width is for target=width: set it, or leave width out")
        if self.repair and self.target in ("layers", "experts"):
            raise ValueError(f"what target={self.target} removes is not repaired: leave repair out")
        of_targets = {"experts": ("reap", "random"), "width": ("taylor",)}
        possible = of_targets.get(self.target, get_args(NeuronCriterion))
        if self.criterion not in possible:
            raise ValueError(
                f"criterion={self.criterion} does not score what target={self.target} removes: set one of "
                + ", ".join(possible)
            )
        return self


@dataclass(frozen=True)
class Iteration:
    """One iteration of the loop. Shares are exact fractions, so that they add up without rounding."""

    index: int  # 1..iterations
    cut: Fraction  # share of the whole removal that goes in this iteration; all cuts add up to 1
    progress: Fraction  # cuts up to and including this iteration; 1 in the last
    tokens: int  # recovery tokens of this iteration; all add up to schedule.recovery_tokens
    tokens_before: int  # recovery tokens of earlier iterations: where this one's fresh data begins
    unit: Unit  # what is removed
    last: bool  # whether the loop ends with it


def plan(schedule: Schedule, prune: Prune) -> list[Iteration]:
    """The iterations of a run: pure and torch-free.

    The cubic curve is that of gradual pruning (Zhu & Gupta 2017, arXiv 1710.01878, eq. 1): after iteration i of k the
    share 1 - (1 - i/k)^3 of the removal is done. With doubling tokens iteration i has 2^(i-1) / (2^k - 1) of them.
    """
    count = schedule.iterations
    weights = token_weights(schedule)
    # The state after each iteration, the 0th included.
    removed = [_removed_share(schedule, index) for index in range(count + 1)]
    tokens = [
        int(Fraction(sum(weights[:index]), sum(weights)) * schedule.recovery_tokens)
        for index in range(count + 1)
    ]
    return [
        Iteration(
            index,
            cut=removed[index] - removed[index - 1],
            progress=removed[index],
            tokens=tokens[index] - tokens[index - 1],
            tokens_before=tokens[index - 1],
            unit=_unit_of(schedule, prune, index),
            last=index == count,
        )
        for index in range(1, count + 1)
    ]


def token_weights(schedule: Schedule) -> tuple[int, ...]:
    """What each iteration gets of the recovery, relative to the others."""
    growth = GROWTH[schedule.tokens]
    return tuple(growth**index for index in range(schedule.iterations))


def _removed_share(schedule: Schedule, index: int) -> Fraction:
    """Share of the removal that is done after an iteration."""
    uniform = Fraction(index, schedule.iterations)
    return uniform if schedule.cuts == "uniform" else 1 - (1 - uniform) ** 3


def _unit_of(schedule: Schedule, prune: Prune, index: int) -> Unit:
    if prune.target == "auto":
        return "width" if prune.criterion == "taylor" else "neurons"
    if prune.target != "neurons_then_layers":
        return prune.target
    # The control's only iteration is for neurons.
    return "layers" if index == schedule.iterations > 1 else "neurons"


def one_shot(schedule: Schedule) -> Schedule:
    """The control's schedule: one cut to the same size, with all of the recovery tokens."""
    return schedule.model_copy(update={"iterations": 1})


def removal(original_params: int, target: float | MemoryGoal) -> int:
    """Parameters to remove in all: `target` is a share below 1, else the number to end with."""
    assert not isinstance(target, MemoryGoal), "ptl/preflight/target.py makes a number of a memory"
    if target < 1:
        # 0.1 as it is written, not its binary form
        return int(Fraction(str(target)) * original_params)
    return original_params - int(target)
