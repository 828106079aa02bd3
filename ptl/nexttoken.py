"""Recovery on an exact number of tokens of the training data: continual pre-training and distillation."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from ptl import checkpoint, decontaminate, model_checks, training
from ptl.config import NextToken
from ptl.data import IGNORED, training_chunk
from ptl.job import RecoverReport, RecoveryJob
from ptl.launch import world_size


def train(
    src: Path, dst: Path, settings: NextToken, job: RecoveryJob, trainer_class: Any, more: dict[str, Any]
) -> RecoverReport:
    """Train `src` on exactly the round's tokens by a kind of trl's SFTTrainer and write the result to `dst`."""
    started = time.monotonic()
    tokenizer = model_checks.load_tokenizer(src)
    arguments = _arguments(settings, job)
    dataset, details = _dataset(tokenizer, settings, job, arguments)  # before the weights: a wrong row is found at once
    tokens = details.pop("tokens")
    model, dtype = training.load(src)
    state = src / checkpoint.STATE
    sharded = training.is_sharded(settings)
    whole = settings.carry_moments and settings.lora is None and not sharded
    carried = whole and state.is_file()
    if settings.lora is not None:
        torch.manual_seed(job.this.seed)  # the Trainer's seed comes later than the adapters' first values
        model = with_adapters(model, settings)
    steps = math.ceil(len(dataset) / settings.batch_size)
    curve = training.learning_rate_curve(settings, job.this, steps, carried)
    optimizers: tuple[Any, Any] = (None, None)
    if sharded:  # the optimizer is made by the Trainer, from parameters that are sharded first
        trainer_class = training.with_curve(trainer_class, curve)
    else:
        optimizer = training.optimizer_for(model, settings, state if carried else None)
        optimizers = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, curve))
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        optimizers=optimizers,
        callbacks=[training.watch(job)],
        **more,
    )
    resumed_at = training.run(trainer, job)
    training.save(trainer, src, dst, dtype, with_state=whole and job.keep_optimizer_state, sharded=sharded)
    return RecoverReport(
        method=settings.method,  # type: ignore[attr-defined]
        tokens=tokens,
        steps=trainer.state.global_step,
        curve=training.curve_of(trainer, tokens),
        resumed_at=resumed_at,
        seconds=time.monotonic() - started,
        details=details,
    )


def sft_trainer() -> Any:
    """trl's SFTTrainer; on a CPU with the model's own loss in place of trl's.

    trl's is for GPUs, where it scores only the positions with a label and never holds all logits. On a CPU it scores
    all positions, and each for entropy and top token too, which costs a third of a step (docs/recovery.md).
    """
    from transformers import Trainer
    from trl import SFTTrainer

    if torch.cuda.is_available():
        return SFTTrainer

    class PlainLoss(SFTTrainer):  # type: ignore[misc,unused-ignore]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if num_items_in_batch is not None:  # zero for a batch of one token; trl's loss does the same
                num_items_in_batch = num_items_in_batch.clamp(min=1)
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    return PlainLoss


def with_adapters(model: Any, settings: NextToken) -> Any:
    """LoRA adapters on all linear layers but the output layer (Hu et al. 2021, arXiv 2106.09685)."""
    from peft import LoraConfig, get_peft_model

    assert settings.lora is not None
    lora = settings.lora
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type,unused-ignore]
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _dataset(tokenizer: Any, settings: NextToken, job: RecoveryJob, arguments: Any) -> tuple[Any, dict[str, Any]]:
    """The tokenized chunk of this round, packed if wanted, in batches that are whole for every process."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    assert job.this.tokens is not None
    leaks = decontaminate.build(job.data.decontaminate, job.scored)
    chunk = training_chunk(
        job.data,
        tokenizer,
        settings.max_length,
        seed=job.this.seed,
        earlier=job.this.earlier,
        budget=job.this.tokens,
        filter_=leaks,
    )
    details: dict[str, Any] = {"tokens": sum(len(tokens.ids) for tokens in chunk), "sequences": len(chunk)}
    details["processes"] = arguments.world_size
    if leaks is not None:
        details["decontaminated"] = leaks.report()
    rows = {"input_ids": [c.ids for c in chunk], "labels": [c.labels(settings.loss) for c in chunk]}
    dataset = Dataset.from_dict(rows)
    if settings.packing:
        dataset = pack_dataset(dataset, settings.max_length, "bfd")
    missing = -len(dataset) % (arguments.per_device_train_batch_size * arguments.world_size)
    if arguments.world_size > 1 and missing:
        # otherwise accelerate repeats sequences of the first batch, and the token count is no longer exact
        dataset = _filled_up(dataset, missing, tokenizer.eos_token_id)
    return dataset, details


def _filled_up(dataset: Any, count: int, token: int) -> Any:
    from datasets import Dataset, concatenate_datasets

    empty: dict[str, Any] = {"input_ids": [[token]] * count, "labels": [[IGNORED]] * count}
    if "seq_lengths" in dataset.column_names:
        empty["seq_lengths"] = [[1]] * count
    return concatenate_datasets([dataset, Dataset.from_dict(empty, features=dataset.features)])


def _arguments(settings: NextToken, job: RecoveryJob) -> Any:
    from trl import SFTConfig

    shared = training.arguments(settings, job, world_size())
    return SFTConfig(
        **shared,
        weight_decay=settings.weight_decay,
        num_train_epochs=1,
        max_length=settings.max_length,
        packing=settings.packing,
        dataset_kwargs={"skip_prepare_dataset": True},  # the sequences come tokenized, cut and packed
        train_sampling_strategy="sequential",  # they come shuffled, and in the same batches for any number of processes
        include_num_input_tokens_seen="non_padding",
    )
