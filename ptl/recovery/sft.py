"""Recovery on an exact number of tokens of the training data, by trl's SFTTrainer: `cpt`, and what `distil` shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ptl.config.recover import Lora, RecoverStage
from ptl.data import decontamination
from ptl.data.sequences import IGNORED, Tokens, training_chunk
from ptl.model import checkpoint, experts, pretrained
from ptl.recovery import training
from ptl.recovery.job import RecoverReport, RecoveryJob


def cpt(src: Path, dst: Path, settings: RecoverStage, job: RecoveryJob) -> RecoverReport:
    """Continual pre-training: next-token loss on the training data."""
    return train(src, dst, settings, job, sft_trainer())


def train(
    src: Path, dst: Path, settings: RecoverStage, job: RecoveryJob, trainer_class: Any
) -> RecoverReport:
    """Train `src` on exactly the stage's tokens by a kind of SFTTrainer and write the result to `dst`."""
    tokenizer = pretrained.load_tokenizer(src)
    arguments = sft_arguments(settings, job)
    # before the weights are read: a wrong row is reported at once
    dataset, details = training_dataset(tokenizer, settings, job, arguments)
    model = training.load(src)
    if settings.lora is not None:
        # the Trainer's seed comes later than the adapters' first values
        torch.manual_seed(job.budget.seed)
        model = with_adapters(model, settings.lora)
    # merged adapters and spread optimizers leave no state that pruning could slice
    sharded = training.is_sharded(settings)
    carries_state = settings.carry_moments and settings.lora is None and not sharded
    stored = src / checkpoint.STATE
    state = stored if carries_state and stored.is_file() else None
    # the dataset is read once, in the order of its rows
    steps = math.ceil(len(dataset) / settings.batch_size)
    curve = training.learning_rate_curve(settings, job.budget, steps, state is not None)
    trainer = training.with_curve(trainer_class, curve)(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        # sharded: the Trainer makes it, from parameters that it shards first
        optimizers=(None if sharded else training.optimizer_for(model, settings, state), None),
        callbacks=[training.watch(job)],
    )
    keeps_state = carries_state and job.keep_optimizer_state
    return training.run(trainer, src, dst, settings, job, steps, details, with_state=keeps_state)


def sft_trainer() -> Any:
    """trl's SFTTrainer; on a CPU with the model's own loss in place of trl's.

    trl's is for GPUs, where it scores only the positions with a label and never holds all logits. On a CPU it scores
    all positions, and each for entropy and top token too, which costs a third of a step.
    """
    from transformers import Trainer
    from trl import SFTTrainer

    if torch.cuda.is_available():
        return SFTTrainer

    class PlainLoss(SFTTrainer):  # type: ignore[misc,unused-ignore]
        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            # the model's own loss has the routers' added once for each micro-batch, trl's their mean
            if self.aux_loss_enabled:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            # zero for a batch of one token; trl's loss does the same
            if num_items_in_batch is not None:
                num_items_in_batch = num_items_in_batch.clamp(min=1)
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    return PlainLoss


def with_adapters(model: Any, lora: Lora) -> Any:
    """LoRA adapters on all linear layers but the output layer (Hu et al. 2021, arXiv 2106.09685).

    And on experts and routers, which are parameters of other modules: peft adapts them by itself in some families only.
    """
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=2 * lora.rank,
            target_modules="all-linear",
            target_parameters=_expert_parameters(model),
            task_type="CAUSAL_LM",
        ),
    )


def _expert_parameters(model: Any) -> list[str]:
    """How the names of the weights of experts and routers end; empty for a dense model."""
    endings = (*experts.FUSED, f"{experts.ROUTER}.weight", "mlp.router.weight")
    names = [name for name, _ in model.named_parameters()]
    return [ending for ending in endings if any(name.endswith(f".{ending}") for name in names)]


def training_dataset(
    tokenizer: Any, settings: RecoverStage, job: RecoveryJob, arguments: Any
) -> tuple[Any, dict[str, Any]]:
    """The tokenized sequences of the stage's budget, packed if the settings say so, and details for the report.

    With several processes there are as many as fill their batches.
    """
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    budget = job.budget
    assert budget.tokens is not None
    # rows that share text with a benchmark's items are left out
    leak_filter = decontamination.build(job.data.decontaminate, job.benchmark_items)
    chunk = training_chunk(
        job.data,
        tokenizer,
        settings.max_length,
        seed=budget.seed,
        earlier=budget.earlier,
        budget=budget.tokens,
        leak_filter=leak_filter,
        chat=job.chat,
    )
    # for the step's metadata
    details: dict[str, Any] = {
        "sequences": len(chunk),
        "cut_sequences": sum(tokens.cut for tokens in chunk),
        "passed_over": sum(tokens.passed_over for tokens in chunk),
        "passes": max(tokens.passes for tokens in chunk),
        "processes": arguments.world_size,
    }
    if leak_filter is not None:
        details["decontaminated"] = leak_filter.report()
    if settings.accumulation > 1 and not settings.packing:
        chunk = _alike_together(chunk, settings.batch_size)
    dataset = Dataset.from_dict(
        {
            "input_ids": [tokens.ids for tokens in chunk],
            "labels": [tokens.labels(settings.loss) for tokens in chunk],
        }
    )
    if settings.packing:
        dataset = pack_dataset(dataset, settings.max_length, "bfd")
    # otherwise accelerate repeats sequences of the first batch, and the token count is no longer exact
    missing = -len(dataset) % (arguments.per_device_train_batch_size * arguments.world_size)
    if arguments.world_size > 1 and missing:
        dataset = _filled_up(dataset, missing, tokenizer.eos_token_id)
    return dataset, details


def _alike_together(rows: Sequence[Tokens], batch_size: int) -> list[Tokens]:
    """The rows of each optimizer step by length, so that its passes pad them least; the steps stay the same.

    But for a mixture's routers: their loss is a mean over passes.
    """
    steps = [rows[begin : begin + batch_size] for begin in range(0, len(rows), batch_size)]
    return [row for step in steps for row in sorted(step, key=lambda tokens: len(tokens.ids))]


def _filled_up(dataset: Any, count: int, token: int) -> Any:
    """The dataset with `count` more sequences of one token without a label, which train nothing."""
    from datasets import Dataset, concatenate_datasets

    row = {"input_ids": [token], "labels": [IGNORED]}
    if "seq_lengths" in dataset.column_names:  # packed
        row["seq_lengths"] = [1]
    empty = Dataset.from_list([row] * count, features=dataset.features)
    return concatenate_datasets([dataset, empty])


def sft_arguments(settings: RecoverStage, job: RecoveryJob) -> Any:
    """trl's SFTConfig of a stage."""
    from trl import SFTConfig

    config = SFTConfig(
        **training.arguments(settings, job),
        weight_decay=settings.weight_decay,
        num_train_epochs=1,
        max_length=settings.max_length,
        packing=settings.packing,
        # the sequences come tokenized, truncated and packed
        dataset_kwargs={"skip_prepare_dataset": True},
        # they come shuffled, and in the same batches for any number of processes
        train_sampling_strategy="sequential",
        include_num_input_tokens_seen="non_padding",
    )
    return training.on_one_gpu(config)
