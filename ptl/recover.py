"""Give a cut model its reasoning back by light training. RECOVERIES is where a user extends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptl import checkpoint
from ptl.config import Cpt, DataSource
from ptl.data import training_chunk
from ptl.errors import WorkError

COMPLETE = "ptl-complete"  # marks a training checkpoint that was written to its end


@dataclass(frozen=True)
class Round:
    """Where in the run this recovery stands: its budget in tokens, the tokens before it, and whether it is the last."""

    tokens: int
    tokens_before: int
    last: bool
    seed: int


@dataclass(frozen=True)
class RecoverReport:
    """What a recovery did; `curve` is (tokens seen, training loss) at each log."""

    method: str
    tokens: int
    steps: int
    curve: tuple[tuple[int, float], ...]
    resumed_at: int  # optimizer step that training went on from; 0: from the start
    seconds: float


Log = Callable[[dict[str, float], int], None]  # metrics, optimizer step


def recover_checkpoint(
    src: Path, dst: Path, settings: Cpt, training: DataSource, this: Round, scratch: Path, on_log: Log
) -> RecoverReport:
    """Train `src` on exactly `this.tokens` tokens and write it to `dst`; an earlier try in `scratch` is continued."""
    dst.mkdir(parents=True, exist_ok=True)
    return RECOVERIES[settings.method](src, dst, settings, training, this, scratch, on_log)


def cpt(
    src: Path, dst: Path, settings: Cpt, training: DataSource, this: Round, scratch: Path, on_log: Log
) -> RecoverReport:
    """Continual pre-training: next-token loss on the training data, through trl's SFTTrainer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTTrainer

    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(src)
    stored = AutoModelForCausalLM.from_pretrained(src, dtype="auto", use_safetensors=True)
    dtype = stored.dtype
    model = stored.float()
    dataset, steps = _dataset(tokenizer, settings, training, this)
    state = src / checkpoint.STATE
    carried = settings.carry_moments and state.is_file()
    optimizer = _optimizer(model, settings, state if carried else None)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_curve(settings, this, steps, carried))
    trainer = SFTTrainer(
        model=model,
        args=_arguments(settings, this, scratch),
        train_dataset=dataset,
        processing_class=tokenizer,
        optimizers=(optimizer, scheduler),
        callbacks=[_callback(on_log)],
    )
    resume = last_complete(scratch)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    _save(trainer, src, dst, dtype, settings.carry_moments and not this.last)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return RecoverReport(
        method=settings.method,
        tokens=sum(len(ids) for ids in dataset["input_ids"]),
        steps=trainer.state.global_step,
        curve=tuple((int(entry["num_input_tokens_seen"]), float(entry["loss"])) for entry in history),
        resumed_at=int(resume.name.split("-")[-1]) if resume else 0,
        seconds=time.monotonic() - started,
    )


RECOVERIES = {"cpt": cpt}


def learning_rate_curve(settings: Cpt, this: Round, steps: int, carried: bool) -> Callable[[int], float]:
    """The factor on the learning rate at each optimizer step.

    Adam's moments that were carried through the cut need no warm-up; a fresh optimizer does. With decay `last` the rate
    stays level until the last iteration, whose cosine ends the run at zero; with `each` every iteration has its own.
    """
    warmup = 0 if carried else min(settings.warmup_steps, steps // 2)
    decays = this.last or settings.decay == "each"

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2 if decays else 1.0

    return factor


def last_complete(scratch: Path) -> Path | None:
    """The newest training checkpoint that was written to its end; what a kill left half-written is passed over."""
    found = [path.parent for path in scratch.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.split("-")[-1]), default=None)


def _dataset(tokenizer: Any, settings: Cpt, training: DataSource, this: Round) -> tuple[Any, int]:
    """The tokenized chunk of this round, and the optimizer steps that one pass over it takes."""
    from datasets import Dataset

    chunk = training_chunk(
        training, tokenizer, settings.max_length, seed=this.seed, skip=this.tokens_before, budget=this.tokens
    )
    labels = [tokens.labels(settings.loss) for tokens in chunk]
    dataset = Dataset.from_dict({"input_ids": [tokens.ids for tokens in chunk], "labels": labels})
    return dataset, math.ceil(len(chunk) / settings.batch_size)


def _optimizer(model: Any, settings: Cpt, state: Path | None) -> torch.optim.AdamW:
    """AdamW without weight decay on norms and biases; with `state`, its moments go on where the last round ended."""
    named = dict(model.named_parameters())
    decayed = [p for p in named.values() if p.dim() > 1]
    level = [p for p in named.values() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": level, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    if state is not None:
        saved = dict(checkpoint.tensors(state))
        for name, parameter in named.items():
            moments = {kind: saved[f"{kind}.{name}"] for kind in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": saved["step"].clone()} | moments
    return optimizer


def _arguments(settings: Cpt, this: Round, scratch: Path) -> Any:
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=max(1, settings.batch_size // settings.accumulation),
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=1,
        learning_rate=settings.learning_rate,
        max_length=settings.max_length,
        packing=settings.packing,
        bf16=settings.dtype == "bfloat16",
        gradient_checkpointing=settings.gradient_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        seed=this.seed,
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _callback(on_log: Log) -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc,unused-ignore]
        """Marks complete checkpoints, passes metrics on while training, stops at a loss that is no number."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            numbers = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
            if not math.isfinite(numbers.get("loss", 0.0)):
                raise WorkError(
                    f"recover: the loss is {numbers['loss']} at optimizer step {state.global_step}; the last good "
                    f"training checkpoint is kept in {args.output_dir}; lower recover.learning_rate"
                )
            on_log(numbers, state.global_step)

    return Watch()


def _save(trainer: Any, src: Path, dst: Path, dtype: torch.dtype, with_state: bool) -> None:
    """Write an ordinary checkpoint in the dtype it came in; config and tokenizer files are those of the source."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if with_state:
        checkpoint.write_shard(dst / checkpoint.STATE, _moments(model, trainer.optimizer))
    model.to(dtype).save_pretrained(dst)
    (dst / "config.json").write_text((src / "config.json").read_text())
    checkpoint.copy_companions(src, dst)


def _moments(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    moments: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        state = inner.state[parameter]
        moments["step"] = state["step"].clone().reshape(())
        moments |= {f"{kind}.{name}": state[kind].contiguous() for kind in ("exp_avg", "exp_avg_sq")}
    return moments
