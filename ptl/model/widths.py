"""Hidden size, FFN width and KV groups together: with which of them a model has so many parameters. Pure.

The FFN goes first, alone. Where that would leave it less than its share of the parameters, KV groups or the hidden size
go too. In a mixture whose neurons stay, the number of its experts takes the FFN's part.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ptl.errors import InputError
from ptl.model.dimensions import MIN_STEPS, MULTIPLES, ModelDimensions, Multiple, experts_for, width_for

FFN_SHARE = 0.37  # of the parameters, that the FFN keeps (docs/results.md, "Which widths?")
QUERIES = 0.4  # of the hidden size, that all query heads together keep: KV heads do not go in every iteration anew

Ends = Mapping[str, int | None]  # sizes to end with that a user has set: "hidden", "ffn", "kv"


def candidates(model: ModelDimensions, goal: int, multiple: Multiple, ends: Ends | None) -> list[ModelDimensions]:
    """Ways to get a model down to at most `goal` parameters, of which its loss chooses one; one or two.

    First that with fewer KV groups, then that with all of them; the FFN alone where it keeps its share, and without
    `ends` where a runtime would not load another. Raises InputError for a goal out of reach, and for a size that the
    model cannot have.
    """
    if goal >= model.params:
        return [model]
    if ends is None:
        ends = {"hidden": model.hidden, "kv": model.groups} if model.square else {}
    _check(model, ends)
    found: list[ModelDimensions] = []
    for groups in _groups(model, ends):
        narrow = _balanced(model, groups, goal, multiple, ends)
        if narrow is None:
            continue
        is_ffn = narrow == replace(model, width=narrow.width, experts=narrow.experts)
        if is_ffn and (ends.get("ffn") or _ffn_share(narrow) >= FFN_SHARE):
            return [narrow]
        found.append(narrow)
    if found:
        # Not less than the goal, where another is just that.
        return [sizes for sizes in found if _has_cut_ffn(sizes, model)][::-1] or found[::-1]
    raise InputError(
        f"{goal:,} parameters cannot be reached by width",
        field="schedule.target",
        remedy="let schedule.target remove less, or lower prune.width_multiple or the sizes of prune.width",
    )


def towards(model: ModelDimensions, end: ModelDimensions, goal: int, multiple: Multiple) -> ModelDimensions:
    """The sizes of one iteration on the way to `end`, none below its own: the hidden size falls as the parameters do.

    KV groups go as soon as that removes no more than the iteration's part, or the FFN would get too narrow.
    """
    if goal <= end.params:
        return end
    if goal >= model.params:  # an earlier iteration was rounded below it
        return model
    removed = (model.params - goal) / (model.params - end.params)
    hidden = model.hidden - removed * (model.hidden - end.hidden)
    possible = [groups for groups in _divisors(model.groups) if groups >= end.groups]
    most = next(groups for groups in possible if replace(model, groups=groups).params >= goal)
    for groups in possible[possible.index(most) :: -1]:
        step = _step(model, groups * model.heads_per_group, multiple)
        # Not below the goal before the FFN is pruned: the gate may allow for no more.
        rounded = range(math.ceil(hidden / step) * step, model.hidden, step)
        start = next(
            (size for size in rounded if replace(model, groups=groups, hidden=size).params >= goal), model.hidden
        )
        for size in (start, *range((start - 1) // step * step, end.hidden - 1, -step)):
            sizes = _closed(replace(model, groups=groups, hidden=size), goal, multiple)
            # An FFN below that of the end could not get there.
            if sizes is not None and sizes.width >= end.width and sizes.experts >= end.experts:
                return sizes
    return end


def _balanced(model: ModelDimensions, groups: int, goal: int, multiple: Multiple, ends: Ends) -> ModelDimensions | None:
    """With so many KV groups, the largest hidden size beside which the FFN keeps its share; None: out of reach."""
    last = None
    for hidden in _hidden_sizes(model, groups, multiple, ends):
        narrow = replace(model, groups=groups, hidden=hidden, width=ends.get("ffn") or model.width)
        closed = narrow if narrow.params <= goal else None if ends.get("ffn") else _closed(narrow, goal, multiple)
        last = closed or last
        # Below this hidden size an FFN that need not be cut gets no larger share.
        if closed is not None and (narrow.params <= goal or _ffn_share(closed) >= FFN_SHARE):
            break
    return last


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


def _has_cut_ffn(sizes: ModelDimensions, model: ModelDimensions) -> bool:
    return sizes.width < model.width or sizes.experts < model.experts


def _groups(model: ModelDimensions, ends: Ends) -> list[int]:
    """Numbers of KV groups to choose from: all of them, and the next lower number that divides them."""
    if kv := ends.get("kv"):
        return [kv]
    fewer = [] if "kv" in model.fixed else _divisors(model.groups)[-2:-1]
    per_group = model.heads_per_group * model.head_size
    return [model.groups, *(groups for groups in fewer if groups * per_group >= QUERIES * model.hidden)]


def _hidden_sizes(model: ModelDimensions, groups: int, multiple: Multiple, ends: Ends) -> Iterator[int]:
    """Hidden sizes to choose from, the largest first."""
    if ends.get("hidden") or "hidden" in model.fixed:
        return iter([ends.get("hidden") or model.hidden])
    heads = groups * model.heads_per_group
    step = _step(model, heads, multiple)
    # Of KV heads that a user has set, the query heads need not divide today's.
    today = [model.hidden] if groups == model.groups or model.hidden % heads == 0 else []
    return itertools.chain(today, range((model.hidden - 1) // step * step, 0, -step))


def _step(model: ModelDimensions, heads: int, multiple: Multiple) -> int:
    """What a hidden size is a multiple of: in any case of what transformers and torch ask for."""
    least = _least_step(model, heads)
    if multiple != "auto":
        return math.lcm(multiple, least)
    steps = (math.lcm(size, least) for size in MULTIPLES)
    return next((step for step in steps if model.hidden % step == 0 and model.hidden // step >= MIN_STEPS), least)


def _least_step(model: ModelDimensions, heads: int) -> int:
    """The query heads, which transformers wants to divide it, and in a mixture what rows of experts need."""
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
    heads = (ends.get("kv") or model.groups) * model.heads_per_group
    for name, step in (("hidden", _least_step(model, heads)), ("ffn", model.least_multiple)):
        size = ends.get(name) or step
        if size % step:
            raise InputError(
                f"{size} is no multiple of {step} (the query heads; of 8 in a mixture of experts)",
                field=f"prune.width.{name}",
                remedy=f"set {size // step * step or step}",
            )
