"""What a user writes: one YAML file, checked here once and trusted afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, NonNegativeInt, ValidationError, model_validator

from ptl import __version__
from ptl.config import image_names, yaml_text
from ptl.config.base import (
    FOLDER,
    Label,
    Location,
    Positive,
    Section,
    error_lines,
    one_error,
    typed,
)
from ptl.config.chat import NO_CHAT, Chat
from ptl.config.cluster import TRAINED, Resources, Storage
from ptl.config.data import Sources, TrainingData
from ptl.config.export import Export
from ptl.config.recover import MIN_TOKENS, RecoverStage, Recovery
from ptl.config.schedule import Prune, Schedule, plan
from ptl.errors import InputError

S = TypeVar("S", bound=Section)

ImageName = Literal[
    "prune", "recover", "evaluate", "evaluate-vllm", "export-gguf", "export-compressed-tensors"
]
ImageDigest = Annotated[
    Annotated[str, Field(pattern=image_names.DIGEST)],
    one_error(
        "must be a digest: sha256: and 64 hexadecimal digits, as `ptl images digests` prints them"
    ),
]


class ModelSource(Section):
    """The dense model to compress."""

    path: Location
    """hub id, or local folder of a Hugging Face checkpoint (safetensors)"""
    revision: str | None = None
    """hub commit; pin it so that a run can be repeated"""


class Calibration(Section):
    """The text on which neurons and layers are scored: of reasoning, and of what else the model is to keep."""

    data: Sources
    """where the text comes from, a source or several by `weight`: what none of them needs is pruned"""
    answers: Literal["given", "self"] = "given"
    """`self`: the answers of `training.answers: self`, with prompts and thoughts, in the place of rows with prompts"""
    num_sequences: Positive = 64
    """number of sequences to score on, divided among the sources by weight as far as they have rows"""
    max_length: int = Field(512, ge=2)
    """tokens per sequence; longer ones are truncated"""
    batch_size: Positive = 16
    """sequences per forward pass"""


class Task(Section):
    """One benchmark: a task name of lm-evaluation-harness, or the path of a task YAML."""

    name: Location
    """lm-eval task name, or the path of a task YAML"""
    metric: str = "exact_match"
    """metric of the task that is reported as the accuracy"""

    # What the task's YAML says holds unless it is set here.
    num_fewshot: NonNegativeInt | None = None
    """few-shot examples; default: as the task says"""
    limit: Positive | None = None
    """use only the first N items; default: all"""
    max_new_tokens: Positive | None = None
    """tokens of the longest answer; default: as the task says, otherwise 256"""
    samples: Positive = 1
    """answers to each item, sampled as its generation_config.json says; the accuracy is their mean (avg@n)"""


class Speed(Section):
    """How speed is measured: the dense and the final model take turns in one process at the end of the loop."""

    batch_sizes: tuple[Positive, ...] = Field((1, 8, 32), min_length=1)
    """sequences generated at once"""
    repeats: NonNegativeInt = 3
    """measurements, of which the median is reported; 0: do not measure speed"""

    prompt_tokens: ClassVar[int] = 64  # of each prompt
    new_tokens: ClassVar[int] = 32  # generated after each prompt
    # Answers to the first task that each model gives in every repeat, for the seconds per solved problem: a smaller
    # model may also answer at greater length.
    items: ClassVar[int] = 64


class Evaluate(Section):
    """Which benchmarks are scored, and how."""

    # What is measured.
    tasks: tuple[Task, ...] = Field(min_length=1)
    """the first one is the run's accuracy"""

    # How the answers are generated.
    backend: Literal["hf", "vllm"] = "hf"
    """what generates the answers: hf on one GPU, vllm on all of a step, beginning the next item as soon as one ends"""
    batch_size: Positive = 64
    """items answered at once"""
    max_length: int | None = Field(None, ge=2)
    """tokens of prompt and answer; default: the model's own context length"""

    # What a task may read and run.
    data_dir: Location | None = None
    """read the tasks' data from files in this folder instead of the hub"""
    allow_code: bool = False
    """allow model-written code (humaneval, mbpp), in the sandbox only, and functions of a task YAML, outside it"""

    # What is reported beside the accuracy.
    retention: Location | None = None
    """local .jsonl file with a column `text`, whose perplexity is watched; default: English prose that ships"""
    confidence: ClassVar[float] = 0.95  # level of the intervals of accuracies
    speed: Speed = Speed()
    """how speed is measured"""

    @model_validator(mode="after")
    def _vllm_measures_no_speed(self) -> Evaluate:
        if self.backend == "vllm" and self.speed.repeats:
            raise ValueError(
                "backend=vllm needs speed.repeats=0: speed is measured with backend=hf"
            )
        return self


class Gate(Section):
    """The gate accepts or rejects iterations: each is compared with the dense model and its parent, item by item."""

    enabled: bool = False
    """false: no iteration is tested, and the next one starts from its result"""

    # The test of one iteration: paired, and one-sided.
    margin: float = Field(0.02, ge=0, lt=1)
    """drop in accuracy that is tolerated, as a share of the items"""
    alpha: float = Field(0.05, gt=0, lt=0.5)
    """significance level of each test: how often a drop is reported where there is none"""

    # What follows from its result.
    # in a row, after which the loop stops; each of them halves the cut
    max_rejections: ClassVar[int] = 3
    strict: bool = False
    """accept only what is shown to be not inferior; needs many items"""
    retention: float | None = Field(None, gt=1)
    """reject what is shown to raise the perplexity of `evaluate.retention` above this factor; default: only report"""

    @model_validator(mode="after")
    def _holds_only_where_it_decides(self) -> Gate:
        if self.retention and not self.enabled:
            raise ValueError("gate.retention needs gate.enabled=true: set both")
        return self


class Images(Section):
    """Which images the steps run in: `<registry>/ptl-<image>:<tag>`, or `<registry>/ptl-<image>:<tag>@<digest>`."""

    registry: str = ""
    """for example ghcr.io/you; empty: images of the local engine"""
    tag: str = __version__
    """image tag; default: the package's version"""
    digests: dict[ImageName, ImageDigest] = Field({})
    """sha256 digest of each image: the steps run in exactly these, whatever the tag means by then"""

    def of(self, step: str) -> str:
        """The image of a step."""
        digest = self.digests.get(image_names.IMAGE_OF[step])  # type: ignore[call-overload]
        return image_names.image(step, self.registry, self.tag, digest)


class Config(Section):
    """A whole run."""

    name: Label
    """the pipeline's name"""

    # What the loop does with which model and data.
    model: ModelSource
    """the dense model"""
    chat: Chat = NO_CHAT
    """how the model is served: with or without its chat template"""
    calibration: Calibration
    """the text on which neurons and layers are scored"""
    training: TrainingData
    """what recovery trains on; a single source needs no list"""
    schedule: Schedule
    """how much each iteration removes, and the tokens of each recovery"""
    prune: Prune = Prune()
    """what counts as redundant, and how widths are rounded"""
    recover: tuple[RecoverStage, ...] = Field((RecoverStage(),), min_length=1)
    """stages of each recovery, in order: cpt, distil or grpo"""
    evaluate: Evaluate
    """benchmarks, and how they are run"""
    gate: Gate = Gate()
    """whether an iteration is tested before the next one starts from it"""
    control: bool = True
    """add the control: one-shot pruning to the same size, with the same tokens in total"""
    export: tuple[Export, ...] = ()
    """exports of the final checkpoint for other runtimes, each made and evaluated by a step of its own"""
    seed: int = Field(0, ge=0, le=2**31 - 1)
    """seed of calibration, training and generation"""

    # Where and in what it runs.
    resources: Resources = Resources()
    """what the steps request from the cluster"""
    images: Images = Images()
    """container images of the steps"""
    storage: Storage = Storage()
    """where runs are tracked, and where credentials come from"""

    def image_names(self) -> list[str]:
        """The images that the steps of this run need."""
        return [self.images.of(step) for step in (*image_names.IMAGES, *self.optional_images())]

    def optional_images(self) -> list[str]:
        """The images of this run that only some runs need, names of image_names.OPTIONAL."""
        steps = ["evaluate-vllm"] if self.evaluate.backend == "vllm" else []
        formats = dict.fromkeys(export.format for export in self.export)  # each once
        return [*steps, *(f"export-{name}" for name in formats)]

    def undivided_batch(self, gpus: int) -> str:
        """Which batch cannot be divided among nodes with so many GPUs, in a sentence; empty where all can."""
        nodes = self.resources.nodes_of(TRAINED)
        for stage in self.recover:
            processes = nodes * (stage.processes or max(1, gpus))
            if stage.batch_size % (stage.accumulation * processes):
                return (
                    f"recover.batch_size={stage.batch_size} must be a multiple of accumulation={stage.accumulation} "
                    f"times the {processes} processes of {nodes} nodes"
                )
        return ""

    def check_batches_on_cluster(self) -> None:
        """Raise InputError where the accelerators that a run on a cluster requests cannot divide a batch."""
        undivided = self.undivided_batch(self.resources.accelerators_of(TRAINED))
        if undivided:
            raise InputError(
                undivided, remedy="change it, or resources.accelerators and resources.steps.recover"
            )

    @model_validator(mode="after")
    def _every_stage_trains_in_every_iteration(self) -> Config:
        recovery = Recovery(stages=self.recover)
        # Early iterations of a doubling budget get little, and a stage only its share of it.
        for iteration in plan(self.schedule, self.prune):
            # None: a grpo stage that only its steps limit.
            budgets = [
                budget for budget in recovery.budgets(iteration.tokens) if budget is not None
            ]
            fewest = min(budgets, default=MIN_TOKENS)
            if fewest < MIN_TOKENS:
                raise ValueError(
                    f"schedule.recovery_tokens={self.schedule.recovery_tokens} leaves {fewest or 'no'} token for a "
                    f"stage of iteration {iteration.index}: raise it, or set schedule.tokens=uniform"
                )
        for stage in self.recover:
            if stage.method != "grpo":
                continue
            # Steps are shared out over the iterations as tokens are.
            shared_out = self.schedule.model_copy(update={"recovery_tokens": stage.steps})
            if not all(iteration.tokens for iteration in plan(shared_out, self.prune)):
                raise ValueError(
                    f"recover.steps={stage.steps}, shared out over {self.schedule.iterations} iterations, "
                    "leaves one without a step: raise it, or set schedule.tokens=uniform"
                )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        # The GPUs of a node may be others than this machine's, or none: one process is the least.
        undivided = self.undivided_batch(gpus=1) if self.resources.nodes_of(TRAINED) > 1 else ""
        if undivided:
            raise ValueError(undivided)
        data, writes_answers = self.calibration, self.training.answers == "self"
        if data.answers == "self" and not writes_answers:
            raise ValueError(
                "calibration.answers=self takes the answers of training.answers=self: set both"
            )
        if data.answers == "self" and all(source.format == "text" for source in data.data):
            raise ValueError(
                "calibration.answers=self takes the place of rows with prompts: give calibration.data one of them"
            )
        has_chats = any(source.format == "messages" for source in self.training.sources)
        if writes_answers and has_chats and not self.chat.enabled:
            raise ValueError(
                "training.answers=self needs chat.enabled=true for sources of format messages: set it"
            )
        reads_answers = data.answers == "self" or any(
            stage.method != "grpo" for stage in self.recover
        )
        if writes_answers and not reads_answers:
            raise ValueError(
                "training.answers=self: grpo writes answers of its own, nothing reads these: set given"
            )
        is_sampled = any(task.samples > 1 for task in self.evaluate.tasks)
        if is_sampled and any(export.format == "gguf" for export in self.export):
            raise ValueError(
                "evaluate.tasks has samples, and answers of an export to gguf are greedy: remove one"
            )
        if self.prune.target == "neurons_then_layers" and self.schedule.iterations == 1:
            raise ValueError(
                "prune.target=neurons_then_layers needs schedule.iterations=2 or more: the last is for layers"
            )
        names = [export.name for export in self.export]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"export has {twice} twice: remove one")
        # One image by its digest beside another by its tag could be of two builds.
        digests, optional = self.images.digests, self.optional_images()
        absent = image_names.without_digest(digests, optional)
        if digests and absent:
            command = f"ptl images digests{image_names.with_options(optional)}"
            raise ValueError(
                f"images.digests has none of {', '.join(absent)}: take what `{command}` prints, or remove all"
            )
        return self


def essentials(config: Config) -> dict[str, Any]:
    """The config without what is a default anyway: every step of a compiled pipeline carries these bytes.

    There is no null in it, which Kubeflow does not know. Paths below the working directory are relative to it: the
    steps run there on one machine, and in their images' own, which hold the examples.
    """
    options: Any = {
        "mode": "json",
        "exclude_defaults": True,
        "exclude_none": True,
        "context": {FOLDER: Path.cwd()},  # to which paths are made relative
    }
    settings = config.model_dump(**options)
    # also where all are defaults
    settings["recover"] = [stage.model_dump(**options) for stage in config.recover]
    return settings


def pairs(option: str, entries: Sequence[str]) -> dict[str, Any]:
    """Options of the form NAME=VALUE, the values read as YAML. Raises InputError that names the option."""
    values: dict[str, Any] = {}
    for entry in entries:
        # A value may have further equals signs in it.
        name, equals, text = entry.partition("=")
        if not equals:
            raise InputError("must be NAME=VALUE, for example seed=1", field=f"{option} {entry}")
        values[name] = yaml_text.load(text, "the value", field=f"{option} {name}")
    return values


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read and check a config file; its paths are relative to it, those in overrides to the working directory.

    Raises InputError that names every wrong field, its value and the allowed range.
    """
    path = Path(path)
    settings = yaml_text.load_file(path, field="config")
    if not isinstance(settings, dict):
        raise InputError(
            f"{path} must hold a mapping of fields, found {type(settings).__name__}", field="config"
        )
    # Overrides are checked with the file, so that fields which need each other can be set together.
    for dotted, value in (overrides or {}).items():
        assign(settings, dotted, typed(value))
    return check(Config, settings, str(path), folder=path.absolute().parent)


def assign(settings: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the field that a dotted name means, as `--set` does: `recover.0.method` is of a list's first entry.

    Sections that are missing are added.
    """
    *parents, last = dotted.split(".")
    section: Any = settings
    for name in parents:
        key = _key(section, name, dotted)
        inner = section.get(key, {}) if isinstance(section, dict) else section[key]
        # A target may be a number or a section.
        if isinstance(inner, int | float) and not isinstance(inner, bool):
            inner = {}
        if not isinstance(inner, dict | list):
            raise InputError(f"{name} is not a section", field=f"--set {dotted}")
        section[key] = inner.copy()  # sections with one YAML anchor are one object
        section = section[key]
    section[_key(section, last, dotted)] = value


def _key(section: dict[str, Any] | list[Any], name: str, dotted: str) -> Any:
    """The key of a part of a dotted name: a field's name, or the index of an entry that a list has."""
    if isinstance(section, dict):
        return name
    if name.isascii() and name.isdecimal() and int(name) < len(section):
        return int(name)
    raise InputError(
        f"{name} is no entry of a list of {len(section)}",
        field=f"--set {dotted}",
        remedy="number its entries from 0, or give the list whole: --set 'NAME=[{...}]'",
    )


def check(
    section: type[S], settings: dict[str, Any], where: str, *, folder: Path | None = None
) -> S:
    """Validate a mapping; pydantic's errors become one InputError with a line for each field.

    Relative paths are taken from `folder`; without one they stay as they are.
    """
    try:
        return section.model_validate(settings, context=folder and {FOLDER: folder})
    except ValidationError as error:  # which lists all wrong fields, and so does ours
        raise InputError(
            "\n".join(["wrong values", *error_lines(section, error)]), field=where
        ) from error
