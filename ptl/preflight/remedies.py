"""What makes a step fit on its GPUs: forecast before `ptl plan` names it, and before `ptl init` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from ptl.model.dimensions import ModelDimensions
from ptl.preflight.forecast import FULL, Forecast
from ptl.preflight.forecast_model import GIB, GPUS, NO_GPU
from ptl.units import listed

BATCHES = (64, 32, 16, 8, 4, 2, 1)

Changes = dict[str, Any]  # of a config, by section and field; of `recover` in every stage


def warnings(run: Forecast) -> list[str]:
    """A sentence for each kind of step that does not fit: the remedy is the same for all of a kind."""
    sentences = []
    for stage in run.gpus:
        large = [step for step in run.of(stage) if not step.fits]
        if large:
            steps, needed = (
                listed([step.step for step in large]),
                max(step.memory for step in large) / GIB,
            )
            where, owner = (
                ("on each GPU", run.kind) if run.kind != NO_GPU else ("of memory", "this machine")
            )
            sentences.append(
                f"{steps}: up to {needed:.0f} GiB {where}, {owner} has {run.gpu.gib:.0f} GiB: {_remedy(stage, run)}"
            )
    return sentences


def largest(run: Forecast, stage: str) -> ModelDimensions:
    """The largest model that a kind of step reads."""
    if stage == "prune":
        return run.shape.dimensions
    return max((step.model for step in run.of(stage)), key=lambda model: model.params)


def _remedy(stage: str, run: Forecast) -> str:
    """The fewest changes with which all steps of a kind fit on these GPUs; else what would need other ones."""
    model = largest(run, stage)
    changes = smallest_change(stage, model, run)
    if changes is not None:
        return _written(changes)
    kinds = larger_gpus(stage, model, run)
    if run.kind == NO_GPU:
        larger = f"a GPU ({kinds})" if kinds else "GPUs (--gpu, --count)"
        return f"no setting makes it fit here: take {larger}, or start from a smaller model"
    remedies = []
    if stage == "evaluate":
        remedies.append(f"give it more GPUs with {_written({'evaluate.backend': 'vllm'})}")
    if stage == "recover":
        remedies.append("give it more GPUs or nodes with recover.sharding: fsdp")
        if all(each.method != "grpo" and each.lora is None for each in run.config.recover):
            remedies.append("set recover.lora")
    if kinds:
        remedies.append(f"take a larger GPU ({kinds})")
    return f"no setting makes it fit on these GPUs: {', or '.join(remedies or ['start from a smaller model'])}"


def _written(changes: Changes) -> str:
    """Changes as a config has them; with vLLM, whose speed ptl does not measure, also what else must change."""
    beside = {"evaluate.speed.repeats": 0} if "evaluate.backend" in changes else {}
    return " and ".join(
        f"{field}: {str(value).lower()}" for field, value in {**changes, **beside}.items()
    )


def smallest_change(
    stage: str, model: ModelDimensions, run: Forecast, share: float = FULL
) -> Changes | None:
    """The first of the smallest changes with which a step takes at most a share of a GPU's memory.

    Empty where nothing must change; None where none is enough.
    """
    every = sorted(_choices(_settings(stage, run)), key=len)
    return next(
        (changes for changes in every if changed(run, changes).fits(stage, model, share)), None
    )


def _choices(fields: dict[str, list[Any]]) -> Iterator[Changes]:
    """All combinations of values, also with fields as they are."""
    for values in product(*((None, *offered) for offered in fields.values())):
        yield {field: value for field, value in zip(fields, values, strict=True) if value}


def larger_gpus(stage: str, model: ModelDimensions, run: Forecast, share: float = FULL) -> str:
    """The kinds of GPU on which a step would fit; empty where it would on none."""
    fitting = (
        kind
        for kind in GPUS
        if smallest_change(stage, model, replace(run, kind=kind), share) is not None
    )
    return ", ".join(fitting)


def _settings(stage: str, run: Forecast) -> dict[str, list[Any]]:
    """What makes a kind of step smaller on the same GPUs: the field that costs least comes last, its values first."""
    config = run.config
    if stage == "prune":
        return {
            "calibration.batch_size": [
                rows for rows in BATCHES if rows < config.calibration.batch_size
            ]
        }
    if stage == "evaluate":
        batches = [rows for rows in BATCHES if rows < config.evaluate.batch_size]
        backends = [] if run.kind == NO_GPU else ["vllm"]
        return {"evaluate.backend": backends, "evaluate.batch_size": batches}
    # A batch is divided evenly among forward passes and GPUs.
    largest_batch = max(each.batch_size for each in config.recover)

    def divides(number: int) -> bool:
        return all(each.batch_size % (number * run.training(each)) == 0 for each in config.recover)

    passes = list(filter(divides, range(2, largest_batch + 1)))
    shardings = [] if run.kind == NO_GPU else ["fsdp"]
    return {
        "recover.sharding": shardings,
        "recover.accumulation": passes,
        "recover.gradient_checkpointing": [True],
    }


def changed(run: Forecast, changes: Changes) -> Forecast:
    """The same run with other settings."""
    config = run.config
    for name, value in changes.items():
        section, _, field = name.partition(".")
        before: Any = getattr(config, section)
        if section == "recover":
            after: Any = tuple(stage.model_copy(update={field: value}) for stage in before)
        else:
            after = before.model_copy(update={field: value})
        config = config.model_copy(update={section: after})
    return replace(run, config=config)
