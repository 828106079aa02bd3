"""Accept, reject or stop: paired statistics over the items of a benchmark, and the decision. Pure functions.

Three statements about a candidate against a reference, over the same items, with a margin m and a level alpha:

- *inferior*: the accuracy fell by more than m, and the exact one-sided McNemar test calls the fall real (p <= alpha).
  However many items change between two evaluations of the same model, each is as likely a regression as an
  improvement, and the test's exact significance level is at most alpha: they are called inferior with a probability of
  at most alpha.
- *not inferior*: the lower bound of the paired bootstrap (one-sided, level alpha) lies above -m.
- *unclear*: neither; the items are too few for the margin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Literal

from ptl.config import Gate
from ptl.errors import InputError

Verdict = Literal["not inferior", "unclear", "inferior"]
Item = Mapping[str, Any]  # a line of items.jsonl: task, id, prompt_digest, correct, ...
RESAMPLES = 10_000
REACHED = "target reached"
NOT_TESTED: Literal["not tested"] = "not tested"  # the decision on every iteration of a run without the gate


@dataclass(frozen=True)
class Paired:
    """Two models on the same items."""

    items: int
    reference: float  # accuracy, 0..1
    candidate: float
    regressions: int  # right before, wrong now
    improvements: int  # wrong before, right now
    difference: float  # candidate - reference
    low: float  # bounds of the difference, each one-sided at level alpha: together a 1 - 2 alpha interval
    high: float
    p_different: float  # exact McNemar, two-sided
    p_worse: float  # exact McNemar, one-sided: the candidate is worse
    margin: float
    alpha: float
    verdict: Verdict


@dataclass(frozen=True)
class State:
    """What an accepted model carries to the next iteration (`Pointer.gate`)."""

    cap: int | None = None  # most parameters that the next cut may remove; none: as planned
    rejections: int = 0  # in a row
    stopped: bool = False  # nothing more is tried: later steps pass their input through
    reason: str = ""  # why it stopped

    @staticmethod
    def load(raw: Mapping[str, Any]) -> State:
        """From a pointer; {} is the state at the start. Raises InputError for fields that are not known."""
        unknown = set(raw) - {field.name for field in fields(State)}
        if unknown:
            raise InputError(f"gate: unknown fields {sorted(unknown)} in the pointer; it is of another version of ptl")
        return State(**raw)

    def dump(self) -> dict[str, Any]:
        """For the pointer."""
        return asdict(self)


@dataclass(frozen=True)
class Decision:
    """The verdict on one iteration, and the state that goes on with the model that goes on."""

    decision: Literal["accepted", "rejected", "stopped", "not tested"]
    reason: str
    numbers: dict[str, Any]
    state: State

    @property
    def keep(self) -> Literal["candidate", "parent"]:
        """Which model the next iteration gets."""
        return "candidate" if self.decision in ("accepted", NOT_TESTED) else "parent"


def check_structure(settings: Gate, compiled: bool) -> None:
    """Raise InputError where a run's parameter switches the gate: what waits for what was compiled for `compiled`."""
    if settings.enabled != compiled:
        raise InputError(
            f"gate.enabled: {str(settings.enabled).lower()}, but this pipeline was compiled with the gate "
            f"{'on' if compiled else 'off'}, which decides what its steps wait for; set gate.enabled in the config, "
            "and compile and submit it again"
        )


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927): (low, high) within 0..1."""
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} correct of {n}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = correct / n, z * z / n
    center = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return (0.0 if correct == 0 else max(0.0, center - half)), (1.0 if correct == n else min(1.0, center + half))


def mcnemar(regressions: int, improvements: int) -> tuple[float, float]:
    """McNemar's exact test on the items that changed: (p two-sided, p one-sided for "worse")."""
    changed = regressions + improvements
    p_worse = _upper_tail(changed, regressions)
    return min(1.0, 2 * min(p_worse, _upper_tail(changed, improvements))), p_worse


@lru_cache(maxsize=1024)
def paired_bootstrap(
    regressions: int, improvements: int, items: int, alpha: float, seed: int = 0
) -> tuple[float, float]:
    """Bounds of the accuracy difference, each one-sided at level alpha, by resampling the items.

    Half an item is added to each of the four cells of the paired table (Agresti & Min 2005), so that a few items
    without a change are not taken for certainty.
    """
    import numpy as np

    same = items - regressions - improvements
    cells = np.array([regressions + 0.5, improvements + 0.5, same + 1.0])
    drawn = np.random.default_rng(seed).multinomial(items, cells / cells.sum(), size=RESAMPLES)  # [resamples, 3]
    low, high = np.quantile((drawn[:, 1] - drawn[:, 0]) / items, [alpha, 1 - alpha])
    return float(low), float(high)


def paired(reference: Sequence[int], candidate: Sequence[int], margin: float, alpha: float, seed: int = 0) -> Paired:
    """Compare two lists of 0/1 outcomes of the same items in the same order."""
    n = len(reference)
    if n == 0 or n != len(candidate):
        raise ValueError(f"{n} and {len(candidate)} outcomes")
    regressions = sum(1 for old, new in zip(reference, candidate, strict=True) if old > new)
    improvements = sum(1 for old, new in zip(reference, candidate, strict=True) if new > old)
    low, high = paired_bootstrap(regressions, improvements, n, alpha, seed)
    p_different, p_worse = mcnemar(regressions, improvements)
    return Paired(
        items=n,
        reference=sum(reference) / n,
        candidate=sum(candidate) / n,
        regressions=regressions,
        improvements=improvements,
        difference=(improvements - regressions) / n,
        low=low,
        high=high,
        p_different=p_different,
        p_worse=p_worse,
        margin=margin,
        alpha=alpha,
        verdict=verdict_of(regressions, improvements, n, margin, alpha, seed),
    )


def verdict_of(regressions: int, improvements: int, items: int, margin: float, alpha: float, seed: int = 0) -> Verdict:
    """The statement that the numbers allow; see the top of this module."""
    if regressions - improvements > margin * items and mcnemar(regressions, improvements)[1] <= alpha:
        return "inferior"
    return "not inferior" if paired_bootstrap(regressions, improvements, items, alpha, seed)[0] > -margin else "unclear"


def power(
    items: int, drop: float, churn: float, margin: float, alpha: float, trials: int = 2000, seed: int = 0
) -> dict[Verdict, float]:
    """How often each verdict falls when the accuracy truly drops by `drop`, by simulation.

    `churn` is the share of the items that are regressions, and again that are improvements, beside the drop: two
    models of equal accuracy seldom solve the same items.
    """
    import numpy as np

    cells = [churn + drop, churn, 1 - 2 * churn - drop]
    counts: dict[Verdict, float] = {"inferior": 0, "unclear": 0, "not inferior": 0}
    for regressions, improvements, _ in np.random.default_rng(seed).multinomial(items, cells, size=trials):
        counts[verdict_of(int(regressions), int(improvements), items, margin, alpha)] += 1 / trials
    return counts


def match(reference: Sequence[Item], candidate: Sequence[Item], task: str | None = None) -> tuple[list[int], list[int]]:
    """Outcomes of two evaluations, item by item, of one task or all. Raises InputError for other items or prompts."""
    old, new = (
        {(str(i["task"]), str(i["id"])): i for i in items if task in (None, i["task"])}
        for items in (reference, candidate)
    )
    if not old or not new:
        raise InputError("compare: no items with a 0/1 outcome; evaluate a task that has an accuracy")
    if old.keys() != new.keys():
        example = sorted(old.keys() ^ new.keys())[0]
        raise InputError(
            f"compare: different items ({len(old)} and {len(new)}; for example {example[0]} item {example[1]} is in "
            "one only); evaluate both with the same tasks and the same limit"
        )
    for key, item in old.items():
        if item["prompt_digest"] != new[key]["prompt_digest"]:
            raise InputError(
                f"compare: the prompts of {key[0]} item {key[1]} differ; evaluate both with the same task version, "
                "few-shot examples, seed and chat template"
            )
    return [int(i["correct"]) for i in old.values()], [int(new[key]["correct"]) for key in old]


def goal(current_params: int, planned_goal: int, state: Mapping[str, Any] | None = None) -> int:
    """Parameters to end the next cut with: as planned, but no more than the cap away from the current model."""
    now = State.load(state or {})
    if now.stopped:
        return current_params
    wanted = planned_goal if now.cap is None else max(planned_goal, current_params - now.cap)
    return min(current_params, wanted)


def decide(
    settings: Gate,
    state: State,
    *,
    params: int,
    target_params: int,
    parent_params: int | None = None,
    baseline: Paired | None = None,
    parent: Paired | None = None,
    smallest_cut: int | None = 1,
) -> Decision:
    """The verdict on a candidate that was cut from its parent, the last accepted model.

    `params` of the candidate, and `target_params` to end with. When the gate is enabled it needs the parent:
    `parent_params`, and `baseline` and `parent`, which compare the candidate with the dense model and with its parent.
    `smallest_cut` is the least number of parameters that the next cut of the parent can remove, None where it can
    remove nothing. A rejected candidate halves the cut for the next iteration; after `max_rejections` in a row, or when
    half the cut is below the smallest, the loop stops with the parent: a smaller step would be rounded up to one that
    was just rejected. An accepted candidate doubles that limit: one early rejection does not hold the whole run.
    """
    numbers: dict[str, Any] = {"params": params, "target_params": target_params}
    if state.stopped:
        return Decision("stopped", "the loop had stopped: nothing was tried", numbers, state)
    if not settings.enabled:  # every iteration runs: the last ones may train without a cut left to make
        return Decision(NOT_TESTED, "the gate is off", numbers, state)
    if baseline is None or parent is None or parent_params is None:
        raise ValueError("the gate needs the parent's size and the comparisons with the baseline and with the parent")
    numbers["parent_params"] = parent_params
    cut = parent_params - params
    compared = {"baseline": baseline, "parent": parent}
    numbers |= {name: asdict(pair) for name, pair in compared.items()}
    for name, pair in compared.items():
        if pair.verdict == "inferior" or (settings.strict and pair.verdict != "not inferior"):
            return _reject(settings, state, cut, smallest_cut, f"{describe(pair)} against the {name}", numbers)
    reason = f"{describe(baseline)} against the baseline"
    cap = None if state.cap is None else 2 * state.cap
    if params <= target_params:
        return Decision("accepted", f"{reason}; {REACHED}", numbers, State(cap, 0, True, REACHED))
    return Decision("accepted", reason, numbers, State(cap, 0, False))


def describe(pair: Paired) -> str:
    """One comparison in words, with its numbers."""
    return (
        f"{pair.verdict}: {100 * pair.difference:+.1f} points ({100 * pair.low:+.1f} to {100 * pair.high:+.1f}, "
        f"margin {100 * pair.margin:g}, p worse {pair.p_worse:.2g}, {pair.items:,} items)"
    )


def _reject(
    settings: Gate, state: State, cut: int, smallest_cut: int | None, why: str, numbers: dict[str, Any]
) -> Decision:
    rejections, cap = state.rejections + 1, cut // 2
    numbers = numbers | {"smallest_cut": smallest_cut}
    stop = ""
    if rejections >= settings.max_rejections:
        stop = f"{rejections} rejection{'s in a row' * (rejections > 1)}"
    elif smallest_cut is None or cap < max(1, smallest_cut):
        least = "nothing is left to cut" if smallest_cut is None else f"the smallest cut is {smallest_cut:,} parameters"
        stop = f"no smaller step left ({least})"
    after = State(cap, rejections, bool(stop), stop)
    what = f"{stop}: stopped" if stop else f"next cut at most {cap:,} parameters"
    return Decision("rejected", f"{why}; {what}", numbers, after)


def _upper_tail(n: int, k: int) -> float:
    """P(X >= k) of a fair coin thrown n times, exact."""
    return sum(math.comb(n, i) for i in range(k, n + 1)) / 2**n
