"""What all recovery methods share: optimizer, learning rate, callbacks, saving."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ptl import checkpoint, launch, pretrained, safefile
from ptl.config import NextToken, Stage
from ptl.errors import WorkError
from ptl.job import RecoveryJob, StageBudget
from ptl.preempt import COMPLETE, last_complete, step_of


def load(src: Path) -> tuple[Any, torch.dtype]:
    """Model in float32, and the dtype of the stored weights, whatever config.json names.

    Weights, gradients and the optimizer's state are float32 whatever is stored, so that small updates add up;
    `recover.dtype` only says in what the forward pass computes.
    """
    stored = checkpoint.contents(src)[
        "model.embed_tokens.weight"
    ].dtype  # as that of all weights, see model_dimensions()
    return pretrained.causal_lm(src, torch.float32), safefile.dtypes()[stored]


def learning_rate_curve(settings: Stage, this: StageBudget, steps: int, carried: bool) -> Callable[[int], float]:
    """The factor on the learning rate at each optimizer step.

    Adam's moments that were carried through the cut need no warm-up; a fresh optimizer does, for at most half of the
    steps and from a rate above zero, so that an iteration of one step trains too. With decay `last` the rate stays
    level until the last iteration, whose cosine ends the run at zero; with `each` every iteration has its own.
    Reinforcement learning has no decay.
    """
    warmup = 0 if carried else min(settings.warmup_steps, steps // 2)
    decays = isinstance(settings, NextToken) and (this.last or settings.decay == "each")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2 if decays else 1.0

    return factor


def optimizer_for(model: Any, settings: Stage, state: Path | None = None) -> torch.optim.AdamW:
    """AdamW without weight decay on norms and biases; with `state`, its moments go on where the last round ended."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = [p for p in named.values() if p.dim() > 1]
    level = [p for p in named.values() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": level, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.learning_rate)
    if state is not None:
        saved = dict(checkpoint.tensors(state))
        for name, parameter in named.items():
            moments = {kind: saved[f"{kind}.{name}"] for kind in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": saved["step"].clone()} | moments
    return optimizer


def arguments(settings: Stage, job: RecoveryJob, processes: int) -> dict[str, Any]:
    """TrainingArguments that all methods share."""
    job.scratch.mkdir(parents=True, exist_ok=True)
    return {
        "output_dir": str(job.scratch),
        "per_device_train_batch_size": launch.batch_of_one(settings, processes),
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "bf16": settings.dtype == "bfloat16",
        # FSDP does it itself (launch.command), and the Trainer refuses both
        "gradient_checkpointing": settings.gradient_checkpointing
        and not (settings.sharding == "fsdp" and is_sharded(settings)),
        "use_cpu": not torch.cuda.is_available(),
        "seed": job.this.seed,
        "save_steps": settings.save_steps,
        "save_total_limit": 2,
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
    }


def watch(job: RecoveryJob) -> Any:
    """A callback that marks complete checkpoints, passes metrics on, and stops at a loss that is no number."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc,unused-ignore]
        logged = -1  # optimizer step of the log before; -1: none yet

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= state.max_steps:  # an iteration shorter than logging_steps has a curve too
                control.should_log = True

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            check_finite(model, state.global_step, args.output_dir)
            if torch.distributed.is_initialized():
                torch.distributed.barrier()  # each process writes a part of the checkpoint
            if state.is_world_process_zero:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                (folder / COMPLETE).touch()
                if job.vault is not None:
                    job.vault.offer(folder)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            numbers = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
            if not math.isfinite(numbers.get("loss", 0.0)):
                since = self.logged + 1 if self.logged >= 0 else max(1, state.global_step - args.logging_steps + 1)
                what = f"the loss is {numbers['loss']}"
                if state.global_step == 1:
                    raise WorkError(
                        f"recover: {what} at optimizer step 1, before any weight has changed: the model itself "
                        "computes it; check its weights (ptl evaluate), or use a sound checkpoint"
                    )
                raise WorkError(_not_finite(what, state.global_step, args.output_dir, since))
            self.logged = state.global_step
            if "num_input_tokens_seen" in numbers and job.this.tokens is not None:
                # the last batch of several processes is filled up with empty sequences, which are no training tokens
                numbers["num_input_tokens_seen"] = min(numbers["num_input_tokens_seen"], job.this.tokens)
            if state.is_world_process_zero:
                job.on_log(numbers, state.global_step)

    return Watch()


def check_finite(model: Any, step: int, folder: Any) -> None:
    """Raise WorkError for weights that are no numbers."""
    for parameter in model.parameters():
        finite = parameter.isfinite().all()
        if not bool(finite.full_tensor() if hasattr(finite, "full_tensor") else finite):  # FSDP: spread over GPUs
            raise WorkError(_not_finite("a weight is NaN or infinite", step, folder))


def _not_finite(what: str, step: int, folder: Any, since: int | None = None) -> str:
    where = f"at optimizer step {step}" if since is None or since >= step else f"in optimizer steps {since} to {step}"
    return f"recover: {what} {where}; {_kept(Path(folder))}; lower recover.learning_rate"


def _kept(scratch: Path) -> str:
    last = last_complete(scratch)
    return f"the last good training checkpoint is kept in {last}" if last else "no training checkpoint was written yet"


def run(trainer: Any, job: RecoveryJob) -> int:
    """Train, going on from the newest complete checkpoint here or in the store; returns the step it went on from."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)  # `watch` passes the metrics on
    if job.vault is not None:
        job.vault.restore(job.scratch)
    resume = last_complete(job.scratch)
    with full_disk("training checkpoints", job.scratch, job.scratch):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return step_of(resume) if resume else 0


@contextmanager
def full_disk(what: str, folder: Path, scratch: Path) -> Iterator[None]:
    """Turn a full disk into a WorkError; torch and safetensors wrap the operating system's error in their own."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        wrapped = [f"os error {code})" for code in codes] + ["PytorchStreamWriter failed", "unexpected pos"]
        if getattr(error, "errno", None) in codes or any(text in str(error) for text in wrapped):
            raise WorkError(
                f"recover: no space left for {what} in {folder}; {_kept(scratch)}: "
                "free some space (or raise recover.save_steps) and run the same command again"
            ) from error
        raise


def save(
    trainer: Any, src: Path, dst: Path, dtype: torch.dtype, *, with_state: bool = False, sharded: bool = False
) -> None:
    """Write an ordinary checkpoint in the dtype it came in; config and tokenizer files are those of the source."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    check_finite(model, trainer.state.global_step, trainer.args.output_dir)
    if sharded:
        model = _gathered(trainer, dst.with_name(f"{dst.name}.gathered"))
    if not trainer.is_world_process_zero():
        return
    with full_disk("the trained checkpoint", dst, Path(trainer.args.output_dir)):
        if with_state:
            checkpoint.write_shard(dst / checkpoint.STATE, _moments(model, trainer.optimizer))
        if hasattr(model, "merge_and_unload"):  # LoRA
            model = model.merge_and_unload()
        model = model.to(dtype)
        check_finite(model, trainer.state.global_step, trainer.args.output_dir)  # float16 ends at 65,504
        model.save_pretrained(dst)
        (dst / "config.json").write_text((src / "config.json").read_text())
        checkpoint.copy_companions(src, dst)


def is_sharded(settings: Stage) -> bool:
    """Whether weights or optimizer state are spread over processes."""
    return settings.sharding != "none" and launch.world_size() > 1 and launch.can_shard()


def with_curve(trainer_class: Any, curve: Callable[[int], float]) -> Any:
    """A kind of trainer that makes its own optimizer and follows our learning-rate curve."""

    class Curved(trainer_class):  # type: ignore[misc,valid-type,unused-ignore]
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, curve)
            return self.lr_scheduler

    return Curved


def _gathered(trainer: Any, folder: Path) -> Any:
    """The whole model, on the first process, from weights that are spread over all."""
    trainer.save_model(str(folder))
    if not trainer.is_world_process_zero():
        return None
    model = pretrained.causal_lm(folder, torch.float32)
    shutil.rmtree(folder)
    return model


def _moments(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    moments: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        state = inner.state[parameter]
        moments["step"] = state["step"].clone().reshape(())
        moments |= {f"{kind}.{name}": state[kind].contiguous() for kind in ("exp_avg", "exp_avg_sq")}
    return moments


def curve_of(trainer: Any, tokens: int) -> tuple[tuple[int, float], ...]:
    """(tokens seen, loss) at each log of a trainer."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return tuple((min(int(entry["num_input_tokens_seen"]), tokens), float(entry["loss"])) for entry in logs)
