"""The part of the config for recovery: its stages."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from ptl.config.base import Location, Positive, Section, one_error
from ptl.config.data import DataSource, Reward, TrainingData

MIN_TOKENS = 2  # of a stage in one iteration: the first token of a text is predicted from nothing

TOLERANCE = 1e-9  # of a sum of shares
Decay = Annotated[
    Annotated[float, Field(ge=0, le=1)] | Literal["each"],
    one_error("must be a share from 0 to 1, or each"),
]


class Lora(Section):
    """Train low-rank adapters on the linear layers instead of all weights; they are merged before saving."""

    rank: Positive = 16
    """rank of each adapter's two matrices; the update is scaled by 2"""


# The methods that a field is of; one that is not here is of all.
ON_TEXT = ("cpt", "distil")  # exact numbers of tokens of the training data
METHODS_OF = {
    **dict.fromkeys(("max_length", "loss", "decay", "carry_moments", "lora"), ON_TEXT),
    "packing": ("cpt",),
    **dict.fromkeys(("teacher", "mix"), ("distil",)),
    "temperature": ("distil", "grpo"),
    **dict.fromkeys(("steps", "num_generations", "max_completion_length", "beta"), ("grpo",)),
    **dict.fromkeys(("prompts", "rewards", "guard_prompts"), ("grpo",)),
}
GRPO_DEFAULTS = {"learning_rate": 1e-6, "batch_size": 64, "warmup_steps": 3, "weight_decay": 0.0}


class RecoverStage(Section):
    """One stage of a recovery: continual pre-training, distillation, or reinforcement learning (GRPO, 2402.03300)."""

    method: Literal["cpt", "distil", "grpo"] = "cpt"
    """`cpt`: continual pre-training; `distil`: forward KL to a teacher, mixed with the next-token loss; `grpo`:
    reinforcement learning with verifiable rewards"""

    # One optimizer step of AdamW.
    learning_rate: float = Field(3e-4, gt=0, lt=1)
    """peak learning rate, after the warm-up; grpo: 1e-6"""
    batch_size: Positive = 16
    """sequences per optimizer step, over all processes; grpo: 64"""
    accumulation: Positive = 1
    """forward passes into which one optimizer step is split"""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's decoupled weight decay; grpo: 0"""
    warmup_steps: NonNegativeInt = 10
    """optimizer steps over which the learning rate rises from 0; grpo: 3"""
    # How a chain of stages divides the iteration's tokens.
    share: float | None = Field(None, gt=0, le=1)
    """share of the iteration's recovery tokens; default: an equal part of what the other stages leave"""
    # Memory, and several GPUs.
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the forward and backward passes; `bfloat16` is for GPUs, and for CPUs that have it"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    processes: Positive | None = None
    """training processes, of each node; default: one for each GPU"""
    sharding: Literal["none", "fsdp"] = "none"
    """with several GPUs: a complete copy on each, or FSDP over all of them (full shard)"""
    save_steps: Positive = 50
    """optimizer steps between training checkpoints"""

    # Training on text. At inference the model reads prompts and writes answers.
    max_length: int = Field(512, ge=2)
    """cpt and distil: tokens per sequence; longer ones are truncated"""
    loss: Literal["completion", "all"] = "completion"
    """cpt and distil: train on the answer only, or on all tokens"""
    decay: Decay = 0.5
    """cpt and distil: share of the run's recovery over which the learning rate decays, at its end; `each`: in each
    iteration anew"""
    carry_moments: bool = True
    """cpt and distil: carry the optimizer state to the next iteration, pruned together with the weights"""
    lora: Lora | None = None
    """cpt and distil: train low-rank adapters; default: all weights"""
    packing: bool = False
    """cpt: join sequences to max_length (loss `all` only)"""

    # Distillation: what the student learns from, and how much of the loss that is.
    teacher: Location | None = None
    """distil: local folder or hub id; default: the run's original model"""
    mix: float = Field(0.5, ge=0, le=1)
    """distil: weight of the next-token loss; the KL gets the rest"""
    temperature: PositiveFloat = 1.0
    """distil: softens both distributions, and the loss is scaled to compensate; grpo: of the sampled answers"""

    # Reinforcement learning.
    steps: Positive = 240
    """grpo: most optimizer steps of the whole run, distributed over the iterations like the tokens"""
    num_generations: int = Field(8, ge=2)
    """grpo: answers to each prompt, which are compared with each other"""
    max_completion_length: Positive = 512
    """grpo: tokens of the longest answer"""
    beta: NonNegativeFloat = 0.01
    """grpo: weight of the KL to the model with which training started"""
    prompts: DataSource | None = None
    """grpo: where the prompts come from; default: the first source of `training`"""
    rewards: tuple[Reward, ...] = Field(
        (Reward(name="math", weight=0.9), Reward(name="format", weight=0.1)), min_length=1
    )
    """grpo: parts of an answer's reward, added up by weight"""
    guard_prompts: NonNegativeInt = 32
    """grpo: training stops if none of the first so many prompts is solved; 0: no check"""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("method") == "grpo":
            return GRPO_DEFAULTS | raw
        return raw

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        for name in self.model_fields_set:
            methods = METHODS_OF.get(name, (self.method,))
            if self.method not in methods:
                raise ValueError(
                    f"{name} is no field of {self.method} but of {' and '.join(methods)}: remove it"
                )
        # Packed sequences are one text after another.
        if self.packing and self.loss == "completion":
            raise ValueError(
                "packing=true needs loss=all: packed sequences have no separate prompt; set one of the two"
            )
        return self

    @model_validator(mode="after")
    def _answers_fit(self) -> Self:
        # The answers to one prompt are in one batch.
        if self.method == "grpo" and self.batch_size % self.num_generations:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of num_generations={self.num_generations}"
            )
        # A well-formed answer need not be right.
        if all(reward.name == "format" for reward in self.rewards):
            raise ValueError(
                "rewards need one that verifies the answer: final_answer, math or code"
            )
        return self

    @model_serializer(mode="wrap")
    def _fields_of_the_method(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only the method's fields; its name and its own defaults even where defaults are left out."""
        fields = {"method": self.method}
        if self.method == "grpo":
            fields |= {name: getattr(self, name) for name in GRPO_DEFAULTS}
        for name, value in dump(self).items():
            if self.method in METHODS_OF.get(name, (self.method,)):
                fields[name] = value
        return fields

    def prompt_source(self, training: TrainingData) -> DataSource:
        """Where the prompts come from."""
        return (self.prompts or training.sources[0]).prompts_only


class Recovery(Section):
    """The stages of one recovery, one after another."""

    stages: tuple[RecoverStage, ...] = Field(min_length=1)
    """the stages, in order"""

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        shares = [stage.share for stage in self.stages if stage.share is not None]
        total = sum(shares)
        others = self._stages_without_share()
        # as floats, decimal fractions do not add up exactly
        if others and total > 1 - TOLERANCE:
            raise ValueError(
                f"the shares of the stages add up to {total:g}, which leaves nothing for the others"
            )
        if shares and not others and abs(total - 1) > TOLERANCE:
            raise ValueError(f"the shares of the stages add up to {total:g}; they must add up to 1")
        # What earlier budgets have read is found by reading it again, cut at the same length.
        lengths = {stage.max_length for stage in self.stages if stage.method != "grpo"}
        if len(lengths) > 1:
            raise ValueError(
                f"stages of cpt and distil read the same rows: give them one max_length, not {sorted(lengths)}"
            )
        return self

    def _stages_without_share(self) -> list[RecoverStage]:
        """The stages that divide what the shares leave; grpo needs no tokens of its own, its steps limit it."""
        return [stage for stage in self.stages if stage.share is None and stage.method != "grpo"]

    def budgets(self, tokens: int) -> tuple[int | None, ...]:
        """Tokens of each stage; they add up to `tokens`. None: a grpo stage that only its steps limit."""
        # as fractions: 0.1 as a float is a little more than a tenth
        rest = 1 - sum((Fraction(str(stage.share or 0)) for stage in self.stages), Fraction(0))
        num_others = len(self._stages_without_share())
        budgets: list[int | None] = []
        share_so_far = Fraction(0)
        spent = 0
        for stage in self.stages:
            if stage.share is not None:
                share_so_far += Fraction(str(stage.share))
            elif stage.method != "grpo":
                share_so_far += rest / num_others
            else:
                budgets.append(None)
                continue
            # rounding the sum, not each share, keeps the total exact
            end = min(tokens, round(share_so_far * tokens))
            budgets.append(end - spent)
            spent = end
        return tuple(budgets)
