"""What a user writes: one YAML file, checked here once and trusted afterwards; plan() turns it into iterations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from ptl import __version__, suggest, yaml_text
from ptl.cluster_config import Resources, Storage
from ptl.errors import InputError
from ptl.location import FOLDER, Folder, Location, typed
from ptl.recover_config import MIN_TOKENS as MIN_TOKENS
from ptl.recover_config import Cpt as Cpt
from ptl.recover_config import DataSource as DataSource
from ptl.recover_config import Decontaminate as Decontaminate
from ptl.recover_config import Distil as Distil
from ptl.recover_config import Grpo as Grpo
from ptl.recover_config import Lora as Lora
from ptl.recover_config import NextToken as NextToken
from ptl.recover_config import RecoverStage as RecoverStage
from ptl.recover_config import Recovery as Recovery
from ptl.recover_config import Reward as Reward
from ptl.recover_config import Stage as Stage
from ptl.recover_config import TrainingData as TrainingData
from ptl.recover_config import TrainingSource as TrainingSource
from ptl.section import Section as Section

S = TypeVar("S", bound=Section)

SHOWN = 200  # characters of a wrong value
FEWEST = 1000  # parameters to end with: a smaller number is a share that was meant as one of 100


class ModelSource(Section):
    """The dense model to compress."""

    path: Location = Field(description="hub id or local folder of a Hugging Face checkpoint (safetensors)")
    revision: str | None = Field(None, description="hub commit; pin it so that a run can be repeated")


class Calibration(Section):
    """The reasoning text on which neurons and layers are scored."""

    data: DataSource = Field(description="where the text comes from")
    num_sequences: int = Field(64, ge=1, description="sequences scored, drawn with the run's seed")
    max_length: int = Field(512, ge=2, description="tokens per sequence; longer ones are cut")
    batch_size: int = Field(16, ge=1, description="sequences per forward pass")
    answers: Literal["given", "self"] = Field(
        "given",
        description="`self`: the current model answers the prompts itself, and its correct answers are scored on",
    )
    max_new_tokens: int = Field(256, ge=1, description="longest answer of its own (answers `self`)")


def _share_or_count(target: float) -> float:
    if target >= 1 and (target < FEWEST or not target.is_integer()):
        raise ValueError(
            f"must be a share of the parameters to remove, below 1, or the whole number of parameters to end with, "
            f"{FEWEST} or more"
        )
    return target


Target = Annotated[float, Field(gt=0, le=2**53), AfterValidator(_share_or_count)]


class Schedule(Section):
    """How much goes in each iteration, and how many tokens each recovery gets."""

    iterations: int = Field(4, ge=1, le=64, description="prune-recover-evaluate rounds")
    target: Target = Field(
        description="below 1: share of all parameters to remove; 1000 or more: the number of parameters to end with",
    )
    cuts: Literal["uniform", "cubic"] = Field("cubic", description="equal cuts, or large ones first on a cubic curve")
    tokens: Literal["uniform", "doubling"] = Field("doubling", description="equal budgets, or twice as much each time")
    recovery_tokens: int = Field(ge=0, description="tokens of recovery training over all iterations")


class Prune(Section):
    """What is redundant, and how widths are rounded."""

    target: Literal["neurons", "layers", "neurons_then_layers", "auto"] = Field(
        "neurons",
        description="what goes; `neurons_then_layers` drops layers in the last `layer_iterations`; `auto` chooses in "
        "each iteration by the measured loss per parameter",
    )
    layer_iterations: int = Field(1, ge=1, description="only with `neurons_then_layers`")
    criterion: Literal["max", "mean", "weight", "taylor", "random"] = Field("max", description="score of a neuron")
    layer_criterion: Literal["max", "block_influence"] = Field("max", description="score of a layer")
    sigma_neuron: float | None = Field(
        None,
        gt=0,
        description="remove only neurons that score below; none: by budget. With criterion `max`: whose removal moves "
        "the layer's output by less than that (Euclidean norm) for every token",
    )
    sigma_layer: float | None = Field(
        None,
        gt=0,
        description="remove only layers that score below; none: by budget. With layer_criterion `max`: which move the "
        "hidden state by less than that (Euclidean norm) in the mean over a sequence's tokens",
    )
    width_multiple: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="round the FFN width down to a multiple of this; `auto`: 128, 64, 8 or 1, the first that goes into "
        "the width at least 8 times, evenly",
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs that will share the model; each width is a multiple of it")
    repair: Literal["off", "ridge", "magnitude", "both"] = Field(
        "off",
        description="after the cut, without training: `ridge` fits down_proj to the uncut layer's output, `magnitude` "
        "scales what later layers add after a layer is gone",
    )
    ridge: float = Field(0.1, gt=0, description="strength of `ridge`, a share of the mean second moment of a neuron")

    @field_validator("repair", mode="before")
    @classmethod
    def _yaml_reads_off_as_false(cls, value: Any) -> Any:
        return "off" if value is False else value


class Task(Section):
    """One benchmark: a task name of lm-evaluation-harness, or the path of a task YAML."""

    name: Location = Field(description="lm-eval task name, or the path of a task YAML")
    metric: str = Field("exact_match", description="the metric of the task that is reported as accuracy")
    num_fewshot: int | None = Field(None, ge=0, description="none: what the task says")
    limit: int | None = Field(None, ge=1, description="first N items; none: all")
    max_new_tokens: int | None = Field(None, ge=1, description="longest answer; none: what the task says (else 256)")


class Speed(Section):
    """How speed is measured: the dense and the final model in turns, in one process, at the end of the loop."""

    batch_sizes: tuple[int, ...] = Field((1, 8, 32), description="sequences generated at once")
    prompt_tokens: int = Field(64, ge=1, description="tokens of each prompt")
    new_tokens: int = Field(32, ge=1, description="tokens generated after each prompt")
    repeats: int = Field(3, ge=0, description="the median is reported; 0: do not measure speed")
    items: int = Field(
        64,
        ge=0,
        description="problems of the first task that each model answers in every repeat, for the seconds per solved "
        "problem; 0: tokens per second only",
    )


class Evaluate(Section):
    """Which benchmarks decide, and how."""

    tasks: tuple[Task, ...] = Field(min_length=1, description="the first one is the run's accuracy")
    backend: Literal["hf", "vllm"] = Field("hf", description="what generates the answers; vllm needs a GPU")
    batch_size: int = Field(64, ge=1, description="items answered at once")
    max_length: int | None = Field(None, ge=2, description="none: the model's own context length")
    chat_template: bool = Field(False, description="put each item through the tokenizer's chat template")
    data_dir: Folder | None = Field(
        None, description="read the tasks' data from files in this folder, not from the hub"
    )
    allow_code: bool = Field(
        False,
        description="run model-written code (humaneval, mbpp), in the sandbox only, and a task YAML's own functions",
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of the intervals of accuracies")
    speed: Speed = Field(Speed(), description="how speed is measured")

    @model_validator(mode="after")
    def _speed_is_measured_with_transformers(self) -> Evaluate:
        if self.backend == "vllm" and self.speed.repeats:
            raise ValueError("backend=vllm needs speed.repeats=0: speed is measured with backend=hf")
        return self


class Gate(Section):
    """Whether an iteration is accepted: each is compared with the dense model and with its parent, item by item."""

    enabled: bool = Field(False, description="false: no iteration is tested, the next begins with what it made")
    margin: float = Field(0.02, ge=0, lt=1, description="loss of accuracy that is tolerated, a share of the items")
    alpha: float = Field(0.05, gt=0, lt=0.5, description="level of each test: how often no real loss is taken for one")
    max_rejections: int = Field(3, ge=1, description="rejections in a row, each halves the cut, before the loop stops")
    strict: bool = Field(False, description="accept only what is shown not inferior; needs many items")


class Images(Section):
    """Which images the steps run in: `<registry>/ptl-<step>:<tag>`."""

    registry: str = Field("", description="for example ghcr.io/you; empty: images of the local engine")
    tag: str = Field(__version__, description="the package's version by default")


class Config(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", description="the pipeline's name")
    model: ModelSource = Field(description="the dense model")
    calibration: Calibration = Field(description="the text on which neurons and layers are scored")
    training: TrainingData = Field(description="what recovery trains on; one source may stand alone")
    schedule: Schedule = Field(description="how much goes in each iteration, and the tokens of each recovery")
    prune: Prune = Field(Prune(), description="what is redundant")
    recover: tuple[RecoverStage, ...] = Field(
        (Cpt(),), min_length=1, description="stages of a recovery, in the order of their work: cpt, distil or grpo"
    )
    evaluate: Evaluate = Field(description="benchmarks, and how they are run")
    gate: Gate = Field(Gate(), description="whether an iteration must hold against the dense model to be accepted")
    control: bool = Field(True, description="add one-shot pruning to the same size with the same total tokens")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="of calibration, training and generation")
    resources: Resources = Field(Resources(), description="what the steps ask of the cluster")
    images: Images = Field(Images(), description="container images of the steps")
    storage: Storage = Field(Storage(), description="where runs are tracked and credentials come from")

    @model_validator(mode="after")
    def _every_stage_trains_in_every_iteration(self) -> Config:
        recovery, total = Recovery(stages=self.recover), self.schedule.recovery_tokens
        for it in plan(self.schedule, self.prune):
            fewest = min(budget for budget in (*recovery.budgets(it.tokens), MIN_TOKENS) if budget is not None)
            if fewest < MIN_TOKENS:
                raise ValueError(
                    f"schedule.recovery_tokens={total} leaves {fewest or 'no'} token for a stage of iteration "
                    f"{it.index}: raise it, or set schedule.tokens=uniform"
                )
        for stage in recovery.stages:
            if isinstance(stage, Grpo):
                steps = plan(self.schedule.model_copy(update={"recovery_tokens": stage.steps}), self.prune)
                if not all(it.tokens for it in steps):
                    raise ValueError(
                        f"recover.steps={stage.steps}, shared out over {len(steps)} iterations, leaves one without a "
                        "step: raise it, or set schedule.tokens=uniform"
                    )
        return self

    @model_validator(mode="after")
    def _layers_fit(self) -> Config:
        both = self.prune.target == "neurons_then_layers"
        if both and self.prune.layer_iterations >= self.schedule.iterations:
            raise ValueError(
                f"prune.layer_iterations={self.prune.layer_iterations} leaves no iteration for neurons: "
                f"it must be below schedule.iterations={self.schedule.iterations}"
            )
        return self


@dataclass(frozen=True)
class Iteration:
    """One round of the loop. Shares are exact fractions, so that they add up without rounding."""

    index: int  # 1..iterations
    cut: Fraction  # share of the whole removal that goes in this round; all cuts add up to 1
    progress: Fraction  # cuts up to and including this round; 1 in the last
    tokens: int  # recovery tokens of this round; all add up to schedule.recovery_tokens
    tokens_before: int  # recovery tokens of earlier rounds: where this round's fresh data begins
    unit: Literal["neurons", "layers", "auto"]
    last: bool


def plan(schedule: Schedule, prune: Prune) -> list[Iteration]:
    """The iterations of a run: pure and torch-free.

    The cubic curve is that of gradual pruning (Zhu & Gupta 2017, arXiv 1710.01878, eq. 1): after round i of k the share
    1 - (1 - i/k)^3 of the removal is done. Doubling gives round i the share 2^(i-1) / (2^k - 1) of the tokens.
    """
    k = schedule.iterations
    rounds = {"neurons": 0, "layers": k, "neurons_then_layers": min(prune.layer_iterations, k - 1), "auto": 0}
    layer_rounds = rounds[prune.target]
    first: Literal["neurons", "auto"] = "auto" if prune.target == "auto" else "neurons"
    iterations, done, spent = [], Fraction(0), 0
    for i in range(1, k + 1):
        progress = Fraction(i, k) if schedule.cuts == "uniform" else 1 - (1 - Fraction(i, k)) ** 3
        share = Fraction(i, k) if schedule.tokens == "uniform" else Fraction(2**i - 1, 2**k - 1)
        until = int(share * schedule.recovery_tokens)
        unit: Literal["neurons", "layers", "auto"] = "layers" if i > k - layer_rounds else first
        iterations.append(Iteration(i, progress - done, progress, until - spent, spent, unit, i == k))
        done, spent = progress, until
    return iterations


def one_shot(schedule: Schedule) -> Schedule:
    """The control's schedule: one cut to the same size, with all of the recovery tokens."""
    return schedule.model_copy(update={"iterations": 1})


def removal(original_params: int, target: float) -> int:
    """Parameters to remove in all: `target` is a share below 1, else the number to end with."""
    if target < 1:
        return int(Fraction(str(target)) * original_params)
    return original_params - int(target)


def essentials(config: Config) -> dict[str, Any]:
    """The config without what is a default anyway: every step of a compiled pipeline carries these bytes.

    There is no null in it, which Kubeflow does not know. Paths below the working directory are relative to it: the
    steps run there on one machine, and in their images' own, which hold the examples.
    """
    options: Any = {"mode": "json", "exclude_defaults": True, "exclude_none": True, "context": {FOLDER: Path.cwd()}}
    data = config.model_dump(**options)
    # A stage's method is the default of its class, but says which class it is.
    stages = [stage.model_dump(**options) for stage in config.recover]
    methods = [{"method": stage.method} for stage in config.recover]
    return data | {"recover": [method | stage for method, stage in zip(methods, stages, strict=True)]}


def pairs(option: str, entries: Sequence[str]) -> dict[str, Any]:
    """Options of the form NAME=VALUE, the values read as YAML. Raises InputError that names the option."""
    found = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals:
            raise InputError(f"{option} {entry}: must be NAME=VALUE, for example seed=1")
        found[name] = yaml_text.load(value, f"{option} {name}: the value")
    return found


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read and check a config file; its paths are relative to it, those in overrides to the working directory.

    Raises InputError that names every wrong field, its value and the allowed range.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f"config: no file {path}; give the path of a YAML file")
        with path.open(encoding="utf-8") as file:
            raw = yaml_text.load(file.read(yaml_text.BYTES + 1), f"config: {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config: {str(path)[:200]} cannot be read: {error}"[:500]) from error
    if not isinstance(raw, dict):
        raise InputError(f"config: {path} must hold a mapping of fields, found {type(raw).__name__}")
    for dotted, value in (overrides or {}).items():
        _assign(raw, dotted, typed(value))
    return check(Config, raw, str(path), folder=path.absolute().parent)


def check(section: type[S], raw: dict[str, Any], where: str, *, folder: Path | None = None) -> S:
    """Validate a mapping; pydantic's errors become one InputError with a line for each field.

    Relative paths are taken from `folder`; without one they stay as they are.
    """
    try:
        return section.model_validate(raw, context=folder and {FOLDER: folder})
    except ValidationError as error:
        lines = [_explain(section, each) for each in _causes(error)]
        raise InputError("\n".join([f"{where}: wrong values", *lines])) from error


def _causes(error: ValidationError) -> list[Any]:
    """Without what follows from the others: a list whose entries are wrong counts as empty."""
    return [each for each in error.errors() if each["type"] != "too_short" or not each["input"]]


def _explain(section: type[Section], error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"]) or "config"
    if error["type"] == "extra_forbidden":
        meant = " or ".join(suggest.fields(section, error["loc"]))
        remedy = f"did you mean {meant}?" if meant else "remove it, or see `ptl schema` for the fields there are"
        return f"  {field}: unknown field; {remedy}"
    if error["type"] == "missing":
        return f"  {field}: missing; add it"
    message = error["msg"].removeprefix("Value error, ")
    value = "" if isinstance(error["input"], dict) else f"{_shown(error['input'])}: "
    return f"  {field}: {value}{message}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"


def _assign(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        section = raw.get(name, {})
        if isinstance(section, list):
            raise InputError(f"--set {dotted}: {name} is a list; give it whole: --set '{name}=[{{...}}]'")
        if not isinstance(section, dict):
            raise InputError(f"--set {dotted}: {name} is not a section")
        raw[name] = dict(section)  # a copy: sections with one YAML anchor are one object
        raw = raw[name]
    raw[last] = value
