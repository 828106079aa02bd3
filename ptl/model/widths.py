"""Hidden size, FFN width and KV groups together: with which of them a model has so many parameters. Pure.

The FFN, in a mixture whose neurons stay the number of its experts, takes what the other two leave of a goal.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ptl.errors import InputError
from ptl.model.dimensions import MIN_STEPS, MULTIPLES, ModelDimensions, Multiple, experts_for, width_for

# Hidden sizes to choose from: the share of the parameters that stays, to these powers
POWERS = (0.0, 0.125, 0.25, 0.375)

Ends = Mapping[str, int | None]  # sizes to end with that a user has set: "hidden", "ffn", "kv"


def candidates(model: ModelDimensions, goal: int, multiple: Multiple, ends: Ends) -> list[ModelDimensions]:
    """Ways to get a model down to at most `goal` parameters, of which its loss chooses one; the hidden sizes fall.

    Raises InputError for a goal out of reach, and for a size that the model cannot have.
    """
    if goal >= model.params:
        return [model]
    _check(model, ends)
    found: list[ModelDimensions] = []
    for groups in _groups(model, ends):
        fewer = replace(model, groups=groups)
        sizes = (replace(fewer, hidden=hidden) for hidden in _hidden_sizes(model, fewer, goal, multiple, ends))
        closed = (_closed(size, goal, multiple, ends) for size in sizes)
        possible = [candidate for candidate in closed if candidate and candidate not in found]
        # With a fixed FFN the hidden size takes what is left: the largest that does.
        found += possible[:1] if ends.get("ffn") else possible
    if found:
        return found
    raise InputError(
        f"{goal:,} parameters cannot be reached by width",
        field="schedule.target",
        remedy="let schedule.target remove less, or lower prune.width_multiple or the sizes of prune.width",
    )


def towards(model: ModelDimensions, end: ModelDimensions, goal: int, multiple: Multiple) -> ModelDimensions:
    """The sizes of one iteration on the way to `end`: the hidden size falls as the parameters do.

    KV groups go as soon as that removes no more than the iteration's part.
    """
    if goal <= end.params:
        return end
    if goal >= model.params:  # an earlier iteration was rounded below it
        return model
    fewer = next(
        fewer
        for groups in _divisors(model.groups)
        if (fewer := replace(model, groups=groups)).params >= goal and groups >= end.groups
    )
    removed = (model.params - goal) / (model.params - end.params)
    step = _hidden_step(model, fewer.heads, end.hidden, multiple)
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


def _groups(model: ModelDimensions, ends: Ends) -> list[int]:
    """Numbers of KV groups to choose from: all of them, and the next lower number that divides them."""
    if kv := ends.get("kv"):
        return [kv]
    return [model.groups] if "kv" in model.fixed else _divisors(model.groups)[:-3:-1]


def _hidden_sizes(
    model: ModelDimensions, fewer: ModelDimensions, goal: int, multiple: Multiple, ends: Ends
) -> Iterator[int]:
    """Hidden sizes to choose from, the largest first; `fewer` has the KV groups of these."""
    if ends.get("hidden") or "hidden" in model.fixed:
        return iter([ends.get("hidden") or model.hidden])
    share = goal / model.params
    step = _hidden_step(model, fewer.heads, int(model.hidden * share ** POWERS[-1]), multiple)
    if ends.get("ffn"):
        return itertools.chain([model.hidden], range(model.hidden // step * step, 0, -step))
    rounded = (max(1, round(model.hidden * share**power / step)) * step for power in POWERS[1:])
    return itertools.chain([model.hidden], (size for size in rounded if size < model.hidden))


def _hidden_step(model: ModelDimensions, heads: int, remaining: int, multiple: Multiple) -> int:
    """What a hidden size is a multiple of: of the query heads in any case, as transformers refuses others."""
    if multiple != "auto":
        return math.lcm(multiple, heads)
    steps = (math.lcm(size, heads) for size in MULTIPLES)
    return next((step for step in steps if model.hidden % step == 0 and remaining // step >= MIN_STEPS), heads)


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
