"""The text of a first config: templates/starter.yaml, filled in, with a comment for each choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from ptl.config.run import Task
from ptl.model.dimensions import ModelDimensions
from ptl.preflight.forecast import HOUR, Forecast
from ptl.preflight.gpus import GIB, GPUS
from ptl.preflight.starter_fit import Choices, peak
from ptl.preflight.starter_presets import (
    Data,
    blank_source_yaml,
    runs_code,
    scalar,
    source_yaml,
    tasks_yaml,
    training_yaml,
)
from ptl.units import billions, decimal_hours, duration

TEMPLATE = Path(__file__).parent / "templates/starter.yaml"
WITHOUT_BF16 = ("t4",)
MARGIN = 3  # a step's timeout over its forecast, whose hours are an estimate
PROCESS = 8  # GiB of a process's memory for Python, CUDA and caches
SHM = 8  # GiB of /dev/shm, which counts as memory


@dataclass(frozen=True)
class Plan:
    """What a config says, but for what depends on the number of GPUs."""

    name: str
    title: str  # of the model, for people: hub id, or the folder's name
    model: str  # hub id, or folder as seen from the config
    revision: str | None
    family: str
    dimensions: ModelDimensions
    itemsize: int  # bytes of a stored weight
    target: float
    memory: str  # the goal that the target follows from, such as 16GiB; empty: there is none
    target_reason: str  # why the target is below the usual one; empty where it is not
    pruned: ModelDimensions  # what the target leaves
    multiple: int  # of the FFN width
    tokens: int
    tokens_reason: str
    max_length: int
    calibration_length: int
    batch_size: int
    learning_rate: float
    lora_rate: float
    gpu: str | None  # kind; None: no GPU
    all_weights: int | None  # GPUs that could train all weights, where an adapter is chosen
    data: Data
    tasks: Sequence[Task]


def text(plan: Plan, choices: Choices, batch_size: int, forecast: Forecast | None = None) -> str:
    """The whole file; without a forecast, the same without what follows from it."""
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    filled = template.substitute(
        header=_header(plan, forecast),
        **_data_fields(plan),
        **_size_fields(plan),
        calibration_batch=choices.calibration_batch,
        learning_rate=rate(plan.lora_rate if choices.lora else plan.learning_rate),
        batch_size=batch_size,
        training_memory=_training_memory(plan, choices),
        evaluate_batch=choices.evaluate_batch,
        resources=_resources(plan, choices, forecast),
    )
    return filled.rstrip() + "\n"


def _data_fields(plan: Plan) -> dict[str, str]:
    """What the file says of model, rows and benchmarks."""
    calibration = plan.data.calibration
    return {
        "name": scalar(plan.name),
        "path": scalar(plan.model),
        "revision": f"\n  revision: {plan.revision} # the hub's main branch as it was today" if plan.revision else "",
        "calibration": source_yaml(calibration, 4) if calibration else blank_source_yaml(4),
        "calibration_comment": f" # {plan.data.comment}" if plan.data.comment else "",
        "training": training_yaml(plan.data),
        "tasks": tasks_yaml(plan.tasks),
        "evaluate_more": _evaluate_more(plan),
    }


def _size_fields(plan: Plan) -> dict[str, str]:
    """What the file says of parameters, of what is removed, and of tokens."""
    return {
        "target": _target(plan),
        "target_reason": plan.target_reason,
        "units": "experts" if plan.dimensions.experts else "neurons",
        "prune": _prune(plan),
        "tokens": f"{plan.tokens:_}",
        "tokens_reason": plan.tokens_reason,
        "calibration_length": str(plan.calibration_length),
        "max_length": str(plan.max_length),
    }


def _target(plan: Plan) -> str:
    if plan.memory:
        return f"{{memory: {plan.memory}}}"
    return f"{plan.target:g}" if plan.target < 1 else f"{int(plan.target):_}"


def _prune(plan: Plan) -> str:
    """The fields of `prune`."""
    before, after = plan.dimensions, plan.pruned
    if not before.experts:
        return (
            f"  width_multiple: auto # here {plan.multiple}: from {before.width:,} to {after.width:,} FFN neurons in "
            f"each of {before.layers} layers"
        )
    return (
        f"  target: experts # from {before.experts} to {after.experts} in each of {before.layers} layers; each token "
        f"is sent to {before.experts_per_token}, as before\n"
        "  criterion: reap # how experts are scored (docs/scores.md)"
    )


def rate(value: float) -> str:
    """8e-06 -> `8e-6`, as people write it."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _header(plan: Plan, forecast: Forecast | None) -> str:
    """What the file is for, and what it will take."""
    before, after = plan.dimensions, plan.pruned
    removed = 100 * (1 - after.params / before.params)
    active = f", {billions(after.active_params)} active" if after.experts else ""
    lines = [
        f"# {plan.title} without {removed:.0f} % of its parameters: from {billions(before.params)} to "
        f"{billions(after.params)} (family {plan.family}{active}).",
    ]
    if forecast is not None:
        card = GPUS[forecast.gpu].memory / GIB
        needs = [f"{stage} {peak(forecast, stage).memory / GIB:.0f}" for stage in ("prune", "recover", "evaluate")]
        gpu_hours = decimal_hours(forecast.gpu_hours)
        wall_clock = duration(forecast.critical_hours * HOUR)
        lines += [
            f"# Estimates for {forecast.count} x {forecast.gpu}, from data sheets; `ptl plan` has every step:",
            f"#   GiB of the {card:.0f} of each GPU: {', '.join(needs)}",
            f"#   time: {wall_clock} from start to end, {gpu_hours} GPU-hours",
        ]
    lines.append("# Check it with `ptl validate`. All fields: `ptl schema`; what is left out has its default.")
    return "\n".join(lines)


def _training_memory(plan: Plan, choices: Choices) -> str:
    """The fields of a recovery that say how it fits on its GPUs."""
    if not choices.gpus:
        return ""
    lines = []
    if choices.accumulation > 1:
        lines.append(f"accumulation: {choices.accumulation} # forward passes for one optimizer step")
    if plan.gpu not in WITHOUT_BF16:
        lines.append("dtype: bfloat16 # of the forward and backward pass; weights are trained in float32")
    if choices.checkpointing:
        lines.append("gradient_checkpointing: true # less memory, a third more time")
    if choices.sharding != "none":
        lines.append(f"sharding: {choices.sharding} # weights and optimizer state are divided among the GPUs")
    if choices.lora:
        more = f"; {plan.all_weights} GPUs would train all weights" if plan.all_weights else ""
        lines.append(f"lora: {{rank: 64}} # adapters, as all weights do not fit on this GPU{more}")
    lines.append("save_steps: 200 # optimizer steps between training checkpoints, from which a crashed step resumes")
    return "".join(f"    {line}\n" for line in lines)


def _evaluate_more(plan: Plan) -> str:
    lines = []
    if runs_code(plan.tasks):
        lines.append("allow_code: true # these tasks run what the model writes, in ptl's sandbox")
    if plan.data.calibration and plan.data.calibration.format == "messages":
        lines.append("chat_template: true # the items as chats, which the model is trained on here")
    return "".join(f"  {line}\n" for line in lines)


def _resources(plan: Plan, choices: Choices, forecast: Forecast | None) -> str:
    """What a cluster is asked for; nothing without GPUs."""
    if not choices.gpus:
        return ""
    steps = forecast.steps if forecast else ()
    hours = 1 + math.ceil(MARGIN * max((step.hours for step in steps), default=0.0))
    kept = max((step.work.host_memory for step in steps), default=0) / GIB  # hidden states of a prune step
    # At most one process for each GPU; of a recovery each reads the model in float32, and one collects it again.
    processes = SHM + PROCESS * choices.gpus
    weights = plan.dimensions.params / GIB  # GiB at one byte each
    memory = _rounded(processes + kept + 2 * weights * plan.itemsize)
    training = _rounded(processes + 4 * weights * (choices.gpus + 1))
    lines = [
        "",
        "# For a cluster; `ptl run` on one machine takes the GPUs that it sees.",
        "resources:",
        "  accelerator: nvidia.com/gpu",
        f"  accelerators: {choices.gpus} # {plan.gpu}, of a recovery and of an evaluation; pruning takes one",
        "  control: after # so many GPUs are enough; `beside`, the default, takes twice as many, and less time",
        f"  # node_selector: {{nvidia.com/gpu.product: ...}} # if there are others than {plan.gpu}",
        f"  memory: {memory}Gi # of the host, as below: estimates on the safe side",
        f"  shm: {SHM}Gi # /dev/shm; it counts as memory",
        f"  timeout: {hours * 3600:_} # {hours} hours for each attempt of a step; it resumes from its checkpoints",
        "  tolerations:",
        "    - {key: nvidia.com/gpu, effect: NoSchedule}",
        "  steps:",
        f"    recover: {{memory: {training}Gi}} # each process reads the weights in float32",
        "# images: {registry: registry.example.com/team} # to where you have pushed the images (docs/images.md)",
    ]
    return "\n".join(lines)


def _rounded(gib: float) -> int:
    """Up to a multiple of 8 GiB."""
    return -(-int(gib + 1) // 8) * 8
