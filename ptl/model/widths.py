"""Hidden size, FFN width and KV heads together: with which of them a model has so many parameters. Pure.

The FFN goes first, alone. Where that would leave it less than its share of the parameters, KV heads or the hidden size
go too. In a mixture whose neurons stay, the number of its experts takes the FFN's part.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ptl.errors import InputError
from ptl.model.dimensions import (
    MULTIPLES,
    ModelDimensions,
    Multiple,
    experts_for,
    resolve_multiple,
    width_for,
)

FFN_SHARE = 0.37  # of the parameters, that the FFN keeps (docs/results.md, "Which widths?")
# of the parameters asked for: with fewer, by multiples that are coarse for it, other sizes are better
ROUNDED = 0.9

Wanted = Mapping[str, int | None]  # sizes to end with that a user has set: "hidden", "ffn", "kv"


@dataclass(frozen=True)
class ComparedWidths:
    """Sizes to end the loop with, of which a prune step takes one: by the loss after the cut, where that tells."""

    hidden: int  # dimensions of the residual stream
    width: int  # FFN neurons of each layer, or of each expert
    kv_heads: int  # of each layer
    experts: int | None  # of each layer; None: a dense model
    loss: float  # of a token of the calibration text
    taken: bool


def candidates(
    model: ModelDimensions, goal: int, multiple: Multiple, wanted: Wanted | None
) -> list[ModelDimensions]:
    """Ways to get a model down to at most `goal` parameters, of which its loss chooses one; one or two.

    First that with fewer KV heads, then that with all of them; the FFN alone where it keeps its share, and without
    `wanted` where a runtime would not load another. Raises InputError for a goal out of reach, and for a size that the
    model cannot have.
    """
    if goal >= model.params:
        return [model]
    is_whole = wanted is None and model.square
    if wanted is None:
        wanted = {"hidden": model.hidden, "kv": model.kv_heads} if is_whole else {}
    _check(model, wanted)
    _check_goal(model, wanted, goal)
    found: list[ModelDimensions] = []
    for kv_heads in _kv_heads(model, wanted):
        narrow = _balanced(model, kv_heads, goal, multiple, wanted)
        if narrow is None:
            continue
        is_ffn = narrow == replace(model, width=narrow.width, experts=narrow.experts)
        if is_ffn and (wanted.get("ffn") or _ffn_share(narrow) >= FFN_SHARE):
            return [narrow]
        found.append(narrow)
    if found:
        found = found[::-1]
        # Not less than the goal, where another is just that.
        return [
            sizes for sizes in found if sizes.width < model.width or sizes.experts < model.experts
        ] or found
    raise InputError(
        f"{goal:,} parameters cannot be reached by width",
        field="schedule.target",
        remedy="let schedule.target remove less, or "
        + (
            "set prune.target=width, with which llama.cpp or vLLM may not load it"
            if is_whole
            else "lower prune.width_multiple or the sizes of prune.width"
        ),
    )


def towards(
    model: ModelDimensions, end: ModelDimensions, goal: int, multiple: Multiple
) -> ModelDimensions:
    """The sizes of one iteration on the way to `end`, none below its own: the hidden size falls as the parameters do.

    KV heads go as soon as that removes no more than the iteration's part, or the FFN would get too narrow.
    """
    if goal <= end.params:
        return end
    if goal >= model.params:  # an earlier iteration was rounded below it
        return model
    removed = (model.params - goal) / (model.params - end.params)
    hidden = model.hidden - removed * (model.hidden - end.hidden)
    possible = [kv_heads for kv_heads in _divisors(model.kv_heads) if kv_heads >= end.kv_heads]
    most = next(
        kv_heads for kv_heads in possible if replace(model, kv_heads=kv_heads).params >= goal
    )
    for kv_heads in possible[possible.index(most) :: -1]:
        step = _step(model, kv_heads * model.heads_per_kv_head, multiple, end.hidden)
        # Not below the goal before the FFN is pruned: the gate may allow for no more.
        rounded = range(math.ceil(hidden / step) * step, model.hidden, step)
        start = next(
            (
                size
                for size in rounded
                if replace(model, kv_heads=kv_heads, hidden=size).params >= goal
            ),
            model.hidden,
        )
        for size in (start, *range((start - 1) // step * step, end.hidden - 1, -step)):
            sizes = _closed(replace(model, kv_heads=kv_heads, hidden=size), goal, multiple)
            # An FFN below that of the end could not get there.
            if sizes is not None and sizes.width >= end.width and sizes.experts >= end.experts:
                return sizes
    return end


def _balanced(
    model: ModelDimensions, kv_heads: int, goal: int, multiple: Multiple, wanted: Wanted
) -> ModelDimensions | None:
    """With so many KV heads, the largest hidden size beside which the FFN keeps its share; None: out of reach."""
    rounded = last = None
    for hidden in _hidden_sizes(model, kv_heads, multiple, wanted):
        narrow = replace(
            model, kv_heads=kv_heads, hidden=hidden, width=wanted.get("ffn") or model.width
        )
        if narrow.params <= goal:  # an FFN that need not be cut gets no larger share
            last = narrow if last is None or narrow.params >= ROUNDED * goal else last
            break
        closed = None if wanted.get("ffn") else _closed(narrow, goal, multiple)
        if closed is not None and _ffn_share(closed) >= FFN_SHARE:
            if closed.params >= ROUNDED * goal:
                return closed
            rounded = rounded or closed
        last = closed or last
    return rounded or last


def _closed(model: ModelDimensions, goal: int, multiple: Multiple) -> ModelDimensions | None:
    """The model with the widest FFN, or most experts, that leave at most `goal` parameters; None: out of reach."""
    with contextlib.suppress(InputError):
        if model.narrowable:
            return replace(model, width=width_for(model, goal, multiple))
        return replace(model, experts=experts_for(model, goal))
    return None


def _ffn_share(model: ModelDimensions) -> float:
    """What the FFN has of the parameters, in a mixture all experts."""
    return 1 - replace(model, width=0).params / model.params


def _kv_heads(model: ModelDimensions, wanted: Wanted) -> list[int]:
    """Numbers of KV heads to choose from: all of them, and the next lower number that divides them."""
    if kv := wanted.get("kv"):
        return [kv]
    return [model.kv_heads, *([] if "kv" in model.fixed else _divisors(model.kv_heads)[-2:-1])]


def _hidden_sizes(
    model: ModelDimensions, kv_heads: int, multiple: Multiple, wanted: Wanted
) -> Iterator[int]:
    """Hidden sizes to choose from, the largest first."""
    if wanted.get("hidden") or "hidden" in model.fixed:
        return iter([wanted.get("hidden") or model.hidden])
    heads = kv_heads * model.heads_per_kv_head
    step = _step(model, heads, multiple)
    # Of KV heads that a user has set, the query heads need not divide today's.
    today = [model.hidden] if kv_heads == model.kv_heads or model.hidden % heads == 0 else []
    return itertools.chain(today, range((model.hidden - 1) // step * step, 0, -step))


def _step(model: ModelDimensions, heads: int, multiple: Multiple, end: int | None = None) -> int:
    """What a hidden size is a multiple of: in any case of what transformers and torch ask for.

    On the way to an `end`, which was chosen of the dense model's, of what that is a multiple of.
    """
    least = _least_step(model, heads)
    if end is None or multiple != "auto":
        return resolve_multiple(model.hidden, model.hidden, multiple, least)
    steps = (math.lcm(size, least) for size in MULTIPLES)
    return next((step for step in steps if model.hidden % step == end % step == 0), least)


def _least_step(model: ModelDimensions, heads: int) -> int:
    """The query heads, which transformers wants to divide it, and in a mixture what rows of experts need."""
    return math.lcm(heads, model.least_multiple)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _check_goal(model: ModelDimensions, wanted: Wanted, goal: int) -> None:
    """Raise InputError where the sizes that a user has set remove more than the target: the last iteration would."""
    hidden, width, kv_heads = (wanted.get(name) for name in ("hidden", "ffn", "kv"))
    least = replace(
        model,
        hidden=hidden or model.hidden,
        width=width or model.width,
        kv_heads=kv_heads or model.kv_heads,
    )
    if least.params < ROUNDED * goal:
        raise InputError(
            f"the sizes of prune.width leave {least.params:,} parameters or fewer, and schedule.target {goal:,}",
            field="schedule.target",
            remedy=f"set {least.params} or less, or raise the sizes",
        )


def _check(model: ModelDimensions, wanted: Wanted) -> None:
    """Raise InputError for a size to end with that the model cannot have."""
    sizes = {"hidden": model.hidden, "ffn": model.width, "kv": model.kv_heads}
    fixed = dict(model.fixed)
    if not model.narrowable:
        fixed["ffn"] = "not all of its layers have experts, or these share weights"
    for name, size in wanted.items():
        if size is None:
            continue
        if size > sizes[name]:
            raise InputError(
                f"{size} is more than the model's {sizes[name]}",
                field=f"prune.width.{name}",
                remedy="lower it",
            )
        if name in fixed and size < sizes[name]:
            raise InputError(
                f"{size} cannot be had: of this architecture it stays {sizes[name]}, as {fixed[name]}",
                field=f"prune.width.{name}",
                remedy="leave it out",
            )
    heads = (wanted.get("kv") or model.kv_heads) * model.heads_per_kv_head
    for name, step in (("hidden", _least_step(model, heads)), ("ffn", model.least_multiple)):
        size = wanted.get(name) or step
        if size % step and size != sizes[name]:
            raise InputError(
                f"{size} is no multiple of {step} (the query heads; of 8 in a mixture of experts)",
                field=f"prune.width.{name}",
                remedy=f"set {size // step * step or step}",
            )
