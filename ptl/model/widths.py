"""Hidden size, FFN width and KV groups together: with which of them a model has so many parameters. Pure.

The FFN, in a mixture whose neurons stay the number of its experts, takes what the other two leave of a goal.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
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
        possible = list(filter(None, (_closed(size, goal, multiple, ends) for size in sizes)))
        # With a fixed FFN the hidden size takes what is left: the largest that does.
        found += possible[:1] if ends.get("ffn") else possible
    if not any(ends.values()):
        found = found or _largest(model, goal, multiple)
    if found:
        return found
    raise InputError(
        f"{goal:,} parameters cannot be reached by width",
        field="schedule.target",
        remedy="let schedule.target remove less, or lower prune.width_multiple or the sizes of prune.width",
    )


def towards(model: ModelDimensions, end: ModelDimensions, goal: int, multiple: Multiple) -> ModelDimensions:
    """The sizes of one iteration on the way to `end`, none below its own: the hidden size falls as the parameters do.

    KV groups go as soon as that removes no more than the iteration's part, or where the FFN would get too narrow.
    """
    if goal <= end.params:
        return end
    if goal >= model.params:  # an earlier iteration was rounded below it
        return model
    most = next(
        groups
        for groups in _divisors(model.groups)
        if groups >= end.groups and replace(model, groups=groups).params >= goal
    )
    removed = (model.params - goal) / (model.params - end.params)
    hidden = model.hidden - removed * (model.hidden - end.hidden)
    for groups in reversed([groups for groups in _divisors(model.groups) if end.groups <= groups <= most]):
        fewer = replace(model, groups=groups)
        step = _hidden_step(model, fewer.heads, end.hidden, multiple)
        start = min(math.ceil(hidden / step) * step, model.hidden)
        for sizes in _fitting(fewer, range(start, end.hidden - 1, -step), goal, multiple):
            # An FFN below that of the end could not get there.
            if sizes.width >= end.width and sizes.experts >= end.experts:
                return sizes
    return end


def _largest(model: ModelDimensions, goal: int, multiple: Multiple) -> list[ModelDimensions]:
    """For each number of KV groups the largest hidden size that does, half of the model's or more.

    The FFN of a small model may be too narrow to take just what is left: these may be below the goal.
    """
    found: list[ModelDimensions] = []
    for groups in _groups(model, {}):
        fewer = replace(model, groups=groups)
        step = _hidden_step(model, fewer.heads, 0, multiple)
        sizes = [size for size in _down(model, step) if 2 * size >= model.hidden]
        found += itertools.islice(_fitting(fewer, sizes[: 1 if "hidden" in model.fixed else None], goal, multiple), 1)
    return found


def _fitting(model: ModelDimensions, sizes: Iterable[int], goal: int, multiple: Multiple) -> Iterator[ModelDimensions]:
    """The model with these hidden sizes, each with the widest FFN that leaves at most `goal` parameters."""
    for hidden in sizes:
        narrow = replace(model, hidden=hidden)
        if narrow.params <= goal:
            yield narrow
        elif closed := _closed(narrow, goal, multiple, {}):
            yield closed


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
        return _down(model, step)
    rounded = dict.fromkeys(max(1, round(model.hidden * share**power / step)) * step for power in POWERS[1:])
    return itertools.chain([model.hidden], (size for size in rounded if size < model.hidden))


def _down(model: ModelDimensions, step: int) -> Iterator[int]:
    """All hidden sizes from the model's on."""
    return itertools.chain([model.hidden], range((model.hidden - 1) // step * step, 0, -step))


def _hidden_step(model: ModelDimensions, heads: int, remaining: int, multiple: Multiple) -> int:
    """What a hidden size is a multiple of: in any case of what torch and transformers need."""
    least = _least_step(model, heads)
    if multiple != "auto":
        return math.lcm(multiple, least)
    steps = (math.lcm(size, least) for size in MULTIPLES)
    return next((step for step in steps if model.hidden % step == 0 and remaining // step >= MIN_STEPS), least)


def _least_step(model: ModelDimensions, heads: int) -> int:
    """What transformers needs, the query heads, and in a mixture what torch needs, as for the widths of experts."""
    return math.lcm(heads, model.least_multiple)


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
    step = _least_step(model, (ends.get("kv") or model.groups) * model.heads_per_group)
    hidden = ends.get("hidden") or model.hidden
    if hidden % step:
        raise InputError(
            f"{hidden} is no multiple of {step}: of the query heads, and in a mixture of experts of 8",
            field="prune.width.hidden",
            remedy=f"set {hidden // step * step or step}",
        )
