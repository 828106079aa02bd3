"""Hidden size, FFN width and KV groups together: with which of them a model has so many parameters. Pure.

The FFN goes first, alone. Where that would leave it less than its share of the parameters, KV groups or the hidden size
go too. In a mixture whose neurons stay, the number of its experts takes the FFN's part.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ptl.errors import InputError
from ptl.model.dimensions import MIN_STEPS, MULTIPLES, ModelDimensions, Multiple, experts_for, width_for

FFN_SHARE = 0.37  # of the parameters, that the FFN keeps (docs/results.md, "Which widths?")

Ends = Mapping[str, int | None]  # sizes to end with that a user has set: "hidden", "ffn", "kv"


def candidates(model: ModelDimensions, goal: int, multiple: Multiple, ends: Ends) -> list[ModelDimensions]:
    """Ways to get a model down to at most `goal` parameters, of which its loss chooses one; one or two.

    First that with fewer KV groups, then that with all of them; the FFN alone where it keeps its share. Raises
    InputError for a goal out of reach, and for a size that the model cannot have.
    """
    if goal >= model.params:
        return [model]
    _check(model, ends)
    found: list[ModelDimensions] = []
    for groups in _groups(model, ends):
        narrow = _narrowest(replace(model, groups=groups), model, goal, multiple, ends)
        if narrow is not None and narrow.hidden == model.hidden and narrow.groups == model.groups:
            return [narrow]  # neurons alone
        found += [narrow] if narrow else []
    if found:
        return found[::-1]
    raise InputError(
        f"{goal:,} parameters cannot be reached by width",
        field="schedule.target",
        remedy="let schedule.target remove less, or lower prune.width_multiple or the sizes of prune.width",
    )


def _narrowest(
    fewer: ModelDimensions, model: ModelDimensions, goal: int, multiple: Multiple, ends: Ends
) -> ModelDimensions | None:
    """The widest residual stream beside which the FFN keeps its share; `fewer` is the model with its KV groups."""
    last = None
    for hidden in _hidden_sizes(model, fewer.heads, multiple, ends):
        closed = _closed(replace(fewer, hidden=hidden), goal, multiple, ends)
        if closed is None:
            continue
        last = closed
        if _ffn_share(closed) >= FFN_SHARE or ends.get("ffn"):
            break
    return last


def towards(model: ModelDimensions, end: ModelDimensions, goal: int, multiple: Multiple) -> ModelDimensions:
    """The sizes of one iteration on the way to `end`: the hidden size falls as the parameters do.

    KV groups go as soon as that removes no more than the iteration's part.
    """
    if goal <= end.params:
        return end
    if goal >= model.params:  # an earlier iteration was rounded below it
        return model
    possible = (replace(model, groups=groups) for groups in _divisors(model.groups) if groups >= end.groups)
    fewer = next(narrow for narrow in possible if narrow.params >= goal)
    removed = (model.params - goal) / (model.params - end.params)
    step = _hidden_step(model, fewer.heads, multiple)
    hidden = math.ceil((model.hidden - removed * (model.hidden - end.hidden)) / step) * step
    closed = _closed(replace(fewer, hidden=min(hidden, model.hidden)), goal, multiple, {})
    return closed or end


def _closed(model: ModelDimensions, goal: int, multiple: Multiple, ends: Ends) -> ModelDimensions | None:
    """The model with an FFN that leaves at most `goal` parameters; None where there is none, or it would have to grow.

    Sizes that a user has set need not be used up.
    """
    if ffn := ends.get("ffn"):
        narrow = replace(model, width=ffn)
        return narrow if narrow.params <= goal else None
    if model.params < goal and not any(ends.values()):
        return None
    with contextlib.suppress(InputError):
        if model.narrowable:
            return replace(model, width=width_for(model, goal, multiple))
        return replace(model, experts=experts_for(model, goal))
    return None


def _ffn_share(model: ModelDimensions) -> float:
    """What the FFN has of the parameters, in a mixture all experts."""
    return (model.params - replace(model, width=0).params) / model.params


def _groups(model: ModelDimensions, ends: Ends) -> list[int]:
    """Numbers of KV groups to choose from: all of them, and the next lower number that divides them."""
    if kv := ends.get("kv"):
        return [kv]
    return [model.groups] if "kv" in model.fixed else _divisors(model.groups)[:-3:-1]


def _hidden_sizes(model: ModelDimensions, heads: int, multiple: Multiple, ends: Ends) -> Iterator[int]:
    """Hidden sizes to choose from, the largest first, for so many query heads."""
    if ends.get("hidden") or "hidden" in model.fixed:
        yield ends.get("hidden") or model.hidden
        return
    yield model.hidden
    step = _hidden_step(model, heads, multiple)
    yield from range((model.hidden - 1) // step * step, 0, -step)


def _hidden_step(model: ModelDimensions, heads: int, multiple: Multiple) -> int:
    """What a hidden size is a multiple of: of the query heads in any case, as transformers refuses others."""
    if multiple != "auto":
        return math.lcm(multiple, heads)
    steps = (math.lcm(size, heads) for size in MULTIPLES)
    return next((step for step in steps if model.hidden % step == 0 and model.hidden // step >= MIN_STEPS), heads)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _check(model: ModelDimensions, ends: Ends) -> None:
    """Raise InputError for a size to end with that the model cannot have."""
    sizes = {"hidden": model.hidden, "ffn": model.width, "kv": model.groups}
    fixed = dict(model.fixed)
    if not model.narrowable:
        fixed["ffn"] = "not all of its layers have experts, or these share weights"
    for name, size in ends.items():
        if size is None:
            continue
        if size > sizes[name]:
            raise InputError(
                f"{size} is more than the model's {sizes[name]}", field=f"prune.width.{name}", remedy="lower it"
            )
        if name in fixed and size < sizes[name]:
            raise InputError(
                f"{size} cannot be had: of this architecture it stays {sizes[name]}, as {fixed[name]}",
                field=f"prune.width.{name}",
                remedy="leave it out",
            )
    heads = (ends.get("kv") or model.groups) * model.heads_per_group
    hidden = ends.get("hidden") or model.hidden
    if hidden % heads:
        raise InputError(
            f"{hidden} is no multiple of {heads} query heads, which transformers asks for",
            field="prune.width.hidden",
            remedy=f"set {hidden // heads * heads or heads}",
        )
