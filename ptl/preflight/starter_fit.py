"""How a model is trained, pruned and scored on the GPUs that are there: the first choice whose forecast fits.

Cheaper choices in time come first: all weights before an adapter, a copy on each GPU before sharding, no recomputing of
activations before recomputing, one forward pass per optimizer step before several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ptl.config.dag import stage_of
from ptl.config.recover import Lora
from ptl.config.run import Config
from ptl.errors import InputError
from ptl.preflight import forecast
from ptl.preflight.forecast import Forecast, StepForecast
from ptl.preflight.forecast_model import sequence_length
from ptl.preflight.gpus import GIB, GPUS

ROOM = 0.85  # share of a GPU's memory that a choice may need: the forecast does not know every buffer
LOGITS = 8.0  # bytes of a logit in training, with its gradient; the forecast of a recovery leaves them out
COUNTS = (1, 2, 4, 8)  # GPUs that are tried where no number is given
LARGER_COUNTS = (2, 4, 8, 16, 32)
SMALL = 10**9  # parameters up to which activations may stay in memory
BATCHES = (64, 32, 16, 8, 4, 2, 1)  # of scoring and evaluation


@dataclass(frozen=True)
class Choices:
    """What depends on the GPUs; the values of a config for a machine without any are the defaults."""

    gpus: int = 0  # of a recovery
    sharding: str = "none"
    lora: bool = False
    checkpointing: bool = False
    accumulation: int = 1
    calibration_batch: int = 16
    evaluate_batch: int = 64


@dataclass(frozen=True)
class Machine:
    """What is chosen for."""

    gpu: str  # kind
    config: Config  # with any choices, and with a model that is on this machine
    params: int
    vocabulary: int

    def batch(self, gpus: int) -> int:
        """Rows of an optimizer step: the config's, in equal parts for so many GPUs."""
        rows = self.config.recover[0].batch_size
        return max(1, rows // gpus) * gpus


def fit(machine: Machine, count: int | None) -> Choices:
    """The best choices for `count` GPUs, or for the fewest that train all weights. Raises InputError where none fit."""
    # A whole model, or a layer of it, on each GPU, however many there are.
    scored = _first(machine, "prune", [Choices(gpus=1, calibration_batch=batch) for batch in BATCHES[2:]])
    evaluated = _first(machine, "evaluate", [replace(scored, evaluate_batch=batch) for batch in BATCHES])
    counts = COUNTS if count is None else (count,)
    trainings = [*_training(machine, counts, lora=False), *_training(machine, counts, lora=True)]
    trained = _first(machine, "recover", trainings)
    return replace(
        trained,
        calibration_batch=scored.calibration_batch,
        evaluate_batch=evaluated.evaluate_batch,
    )


def gpus_for_all_weights(machine: Machine) -> int | None:
    """The fewest GPUs of this kind that could train all weights; None: more than a few dozen."""
    candidates = _training(machine, LARGER_COUNTS, lora=False)
    return next((choices.gpus for choices in candidates if _fits(machine, "recover", choices)), None)


def peak(run: Forecast, stage: str) -> StepForecast:
    """The step of that stage that needs most memory."""
    return max((step for step in run.steps if stage_of(step.step) == stage), key=lambda step: step.memory)


def _training(machine: Machine, counts: Iterable[int], *, lora: bool) -> Iterator[Choices]:
    for gpus in counts:
        modes = ("none", "fsdp") if gpus > 1 else ("none",)
        checkpointing = (False, True) if machine.params <= SMALL else (True,)
        rows = machine.batch(gpus) // gpus  # of an optimizer step on one GPU
        accumulations = [number for number in range(1, rows + 1) if rows % number == 0]
        for sharding, recomputed, accumulation in product(modes, checkpointing, accumulations):
            yield Choices(gpus, sharding, lora, recomputed, accumulation)


def _first(machine: Machine, stage: str, candidates: Sequence[Choices]) -> Choices:
    """The first that fits. Raises InputError where none does."""
    needs = []
    for choices in candidates:
        needed = _memory(machine, stage, choices)
        if needed <= ROOM * GPUS[machine.gpu].memory:
            return choices
        needs.append(needed)
    raise _too_small(machine, stage, min(needs))


def _fits(machine: Machine, stage: str, choices: Choices) -> bool:
    return _memory(machine, stage, choices) <= ROOM * GPUS[machine.gpu].memory


def _memory(machine: Machine, stage: str, choices: Choices) -> float:
    """Bytes on the fullest GPU in the steps of a stage."""
    run = forecast.forecast(_with(machine, choices), machine.gpu, choices.gpus)
    needed = peak(run, stage).memory
    if stage == "recover":
        rows = machine.batch(choices.gpus) // choices.gpus // choices.accumulation
        tokens = rows * sequence_length(machine.config.recover[0])
        needed += LOGITS * tokens * machine.vocabulary
    return needed


def _with(machine: Machine, choices: Choices) -> Config:
    """The config with these choices."""
    config = machine.config
    stage = config.recover[0].model_copy(
        update={
            "batch_size": machine.batch(choices.gpus),
            "sharding": choices.sharding,
            "lora": Lora() if choices.lora else None,
            "gradient_checkpointing": choices.checkpointing,
            "accumulation": choices.accumulation,
        }
    )
    return config.model_copy(
        update={
            "calibration": config.calibration.model_copy(update={"batch_size": choices.calibration_batch}),
            "recover": (stage,),
            "evaluate": config.evaluate.model_copy(update={"batch_size": choices.evaluate_batch}),
        }
    )


def _too_small(machine: Machine, stage: str, needed: float) -> InputError:
    """The error for a stage that needs more than there is, even `needed` bytes on each GPU at the least."""
    larger = [kind for kind, gpu in GPUS.items() if needed <= ROOM * gpu.memory]
    remedies = [f"name a larger GPU ({', '.join(larger)})"] if larger else []
    if stage == "evaluate":
        remedies.append("write a config with evaluate.backend: vllm, which divides the model among the GPUs")
    more = gpus_for_all_weights(machine) if stage == "recover" else None
    if more:
        remedies.append(f"give --gpus {more}")
    return InputError(
        f"{stage} needs about {needed / GIB:.0f} GiB on each GPU with the smallest batches, which leaves too little of "
        f"the {GPUS[machine.gpu].memory / GIB:.0f} GiB of {machine.gpu}",
        field="--gpu",
        remedy=", or ".join(remedies) or "start from a smaller model",
    )
