"""What all recovery methods share: optimizer, learning rate, callbacks, saving."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ptl.config.recover import RecoverStage
from ptl.errors import WorkError
from ptl.log import INTERVAL
from ptl.model import checkpoint, pretrained, safetensors_io
from ptl.model.experts import stored_tensors
from ptl.model.families import family_of
from ptl.model.safetensors_io import Entry, NewTensor
from ptl.recovery import launch
from ptl.recovery.job import RecoverReport, RecoveryJob, StageBudget
from ptl.storage.local_files import FULL, last_complete, mark_complete, step_of

LOGGING_STEPS = 10  # optimizer steps between logged losses, at most
COLLECTIVE_TIMEOUT = 4 * 3600  # seconds that processes wait for each other
LOWER_RATE = "lower recover.learning_rate"
ADAM_STATE = ("exp_avg", "exp_avg_sq")  # of each parameter, in its shape
# torch and safetensors wrap the operating system's error in their own
NO_SPACE_TEXTS = (
    "PytorchStreamWriter failed",
    "unexpected pos",
    *(f"os error {code})" for code in FULL),
)


def on_one_gpu(arguments: Any) -> Any:
    """A trainer's arguments for one GPU, of several that its process may see: trl refuses to divide a batch."""
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def load(src: Path) -> Any:
    """The model in float32.

    Weights, gradients and the optimizer's state are float32 whatever is stored, so that small updates add up;
    `recover.dtype` is the precision of the forward pass alone.
    """
    return pretrained.causal_lm(src, torch.float32)


def learning_rate_curve(
    settings: RecoverStage,
    budget: StageBudget,
    steps: int,  # of the optimizer, in this iteration
    carried: bool,  # whether the optimizer state comes from the last iteration
) -> Callable[[int], float]:
    """The factor on the learning rate at each optimizer step.

    An optimizer state that was carried through pruning needs no warm-up; a fresh optimizer does, for at most half of
    the steps and from a rate above zero, so that an iteration of one step trains too. The rate is constant until the
    run's decay begins, in whichever iteration that is, and its cosine ends the run at zero; with `each` every iteration
    is a run of its own, which decays from its start. Reinforcement learning has no decay.
    """
    warmup = 0 if carried else min(settings.warmup_steps, steps // 2)
    begin, end = budget.interval
    decay = 0.0 if settings.method == "grpo" else settings.decay
    if decay == "each":
        begin, end, decay = 0.0, 1.0, 1.0

    def factor(step: int) -> float:
        # share of the steps after the warm-up
        after = max(0, step - warmup) / max(1, steps - warmup)
        done = begin + (end - begin) * after  # share of the run's recovery
        decayed = max(0.0, done - (1 - decay)) / decay if decay else 0.0  # share of the decay
        # A late iteration's warm-up ends at the decayed rate.
        return min(1.0, (step + 1) / max(1, warmup)) * (1 + math.cos(math.pi * decayed)) / 2

    return factor


def optimizer_for(
    model: Any, settings: RecoverStage, state: Path | None = None
) -> torch.optim.AdamW:
    """AdamW without weight decay on norms and biases; with `state`, it continues the last iteration's."""
    # with LoRA the adapters alone are trained
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    # Biases of experts have two dimensions.
    decays = {
        name: parameter.dim() > 1 and not name.endswith("bias")
        for name, parameter in trained.items()
    }
    matrices = [parameter for name, parameter in trained.items() if decays[name]]
    vectors = [parameter for name, parameter in trained.items() if not decays[name]]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}]
    # adapters have none
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    if state is None:
        return optimizer
    stored = dict(checkpoint.tensors(state))
    for name, parameter in trained.items():
        adam = optimizer.state[parameter]
        # torch counts the steps for each parameter
        adam["step"] = stored["step"].clone()
        for kind in ADAM_STATE:
            adam[kind] = stored[f"{kind}.{name}"]
    return optimizer


def arguments(settings: RecoverStage, job: RecoveryJob) -> dict[str, Any]:
    """TrainingArguments that all methods share."""
    job.scratch.mkdir(parents=True, exist_ok=True)
    # FSDP recomputes activations itself (launch.command), and the Trainer refuses both
    fsdp = is_sharded(settings)
    return {
        "output_dir": str(job.scratch),
        "per_device_train_batch_size": launch.sequences_per_pass(settings, launch.world_size()),
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "bf16": settings.dtype == "bfloat16",
        "gradient_checkpointing": settings.gradient_checkpointing and not fsdp,
        # otherwise each GPU keeps the sum of whole gradients until the last pass of a step
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": fsdp}},
        "use_cpu": not torch.cuda.is_available(),
        "seed": job.budget.seed,
        # two, as a kill may leave the newest half-written
        "save_steps": settings.save_steps,
        "save_total_limit": 2,
        # `watch` passes the metrics on, and stops at a loss that is no number
        "logging_nan_inf_filter": False,
        "report_to": "none",
        # while the first process stores a checkpoint, the others wait for it
        "ddp_timeout": COLLECTIVE_TIMEOUT,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
    }


def watch(job: RecoveryJob) -> Any:
    """A callback that marks complete checkpoints, passes metrics on, and stops at a loss that is no number."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc,unused-ignore]
        last_passed = -math.inf  # time of the last metrics that were passed on

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.pass_on({}, args, state)
            # the first step shows how long the others will take
            self.last_passed = -math.inf

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # an iteration shorter than logging_steps has a curve too
            if state.global_step >= state.max_steps:
                control.should_log = True
            # ten slow steps until the next log are minutes
            elif not control.should_log and time.monotonic() - self.last_passed >= INTERVAL:
                self.pass_on({}, args, state)

        def pass_on(self, metrics: dict[str, float], args: Any, state: Any) -> None:
            self.last_passed = time.monotonic()
            metrics["progress"] = state.global_step / state.max_steps
            if args.include_num_input_tokens_seen != "no":
                # the last batch of several processes is filled up with empty sequences, which are no training tokens
                most = math.inf if job.budget.tokens is None else job.budget.tokens
                metrics["num_input_tokens_seen"] = min(state.num_input_tokens_seen, most)
            if state.is_world_process_zero:
                job.on_log(metrics, state.global_step)

        def on_save(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            # a checkpoint that is marked complete is one to resume from
            check_finite(model, state.global_step, job.scratch)
            if torch.distributed.is_initialized():
                torch.distributed.barrier()  # each process writes a part of the checkpoint
            if not state.is_world_process_zero:
                return
            folder = job.scratch / f"checkpoint-{state.global_step}"
            mark_complete(folder)
            if job.store is not None:
                job.store.save_if_due(folder)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
        ) -> None:
            # the Trainer logs texts too
            metrics = {
                name: float(value) for name, value in logs.items() if isinstance(value, int | float)
            }
            loss = metrics.get("loss", 0.0)
            if not math.isfinite(loss):
                # before any weight has changed, a lower rate would not help
                remedy = (
                    "check the checkpoint's weights (ptl evaluate)"
                    if state.global_step == 1
                    else LOWER_RATE
                )
                problem = f"the mean loss since the last log is {loss}"
                raise _not_finite(problem, state.global_step, job.scratch, remedy)
            self.pass_on(metrics, args, state)

    return Watch()


def check_finite(model: Any, step: int, scratch: Path) -> None:
    """Raise WorkError for weights that are no numbers."""
    for parameter in model.parameters():
        finite = parameter.isfinite().all()
        if hasattr(finite, "full_tensor"):  # FSDP: spread over GPUs
            finite = finite.full_tensor()
        if not finite:
            raise _not_finite("a weight is NaN or infinite", step, scratch)


def _not_finite(problem: str, step: int, scratch: Path, remedy: str = LOWER_RATE) -> WorkError:
    return WorkError(
        f"{problem} at optimizer step {step}; {_last_good(scratch)}", field="recover", remedy=remedy
    )


def _last_good(scratch: Path) -> str:
    """The training checkpoint to resume from, for an error."""
    last = last_complete(scratch)
    return (
        f"the last good training checkpoint is {last}"
        if last
        else "no training checkpoint was written yet"
    )


def logging_steps(steps: int) -> int:
    """Optimizer steps between logged losses in a training of so many: a short one logs ten times too."""
    return max(1, min(LOGGING_STEPS, steps // 10))


def run(
    trainer: Any,
    src: Path,
    dst: Path,
    settings: RecoverStage,
    job: RecoveryJob,
    steps: int,
    details: dict[str, Any],
    *,
    with_state: bool = False,  # write the optimizer's, for the next iteration
) -> RecoverReport:
    """Train, resuming from the newest complete checkpoint in `job.scratch`, and write the result to `dst`."""
    from transformers import PrinterCallback

    trainer.args.logging_steps = logging_steps(steps)
    trainer.remove_callback(PrinterCallback)  # `watch` passes the metrics on
    last = last_complete(job.scratch)
    with _reported_full_disk(job.scratch):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        save(trainer, src, dst, job.scratch, with_state=with_state)
    state = trainer.state
    tokens = state.num_input_tokens_seen
    # sequences fill the budget exactly, but for the empty ones in the last batch of several processes
    if settings.method != "grpo" and job.budget.tokens is not None:
        tokens = job.budget.tokens
    return RecoverReport(
        settings.method, tokens, state.global_step, step_of(last) if last else 0, details
    )


@contextmanager
def _reported_full_disk(scratch: Path) -> Iterator[None]:
    """Turn a full disk into a WorkError that says what `scratch` has to resume from."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        is_wrapped = any(map(str(error).__contains__, NO_SPACE_TEXTS))
        if not is_wrapped and getattr(error, "errno", None) not in FULL:
            raise
        raise WorkError(
            f"no space left while training in {scratch}; {_last_good(scratch)}",
            field="recover",
            remedy="free some space (or raise recover.save_steps) and run the same command again to resume",
        ) from error


def save(trainer: Any, src: Path, dst: Path, scratch: Path, *, with_state: bool = False) -> None:
    """Write an ordinary checkpoint of the same tensors as `src`; config and tokenizer files are those of the source."""
    # weights that are spread over processes: all take part in it, and the first one gets them
    parameters = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if with_state:
        checkpoint.write_shard(dst / checkpoint.STATE, _optimizer_state(model, trainer.optimizer))
    adapters = getattr(model, "peft_config", {}).get("default")
    if adapters is not None:
        is_whole = not trainer.is_fsdp_enabled
        parameters = (
            model.merge_and_unload().state_dict()
            if is_whole
            else _merged(src, adapters, parameters)
        )
    if not _write_like(src, dst, parameters):
        raise _not_finite("a weight is NaN or infinite", trainer.state.global_step, scratch)
    shutil.copyfile(src / "config.json", dst / "config.json")
    checkpoint.copy_companions(src, dst)


def _merged(
    src: Path, adapters: Any, parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The parameters of a model whose LoRA adapters have been added to its weights."""
    from peft import get_peft_model

    # a new one: of weights that are spread over GPUs the trainer's own model has a part only
    model = get_peft_model(load(src), adapters)
    model.load_state_dict(parameters)
    merged: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return merged


def _write_like(src: Path, dst: Path, parameters: Mapping[str, torch.Tensor]) -> bool:
    """Write a model's parameters by the names and in the dtypes of `src`; False, and nothing, where one overflows."""
    config = checkpoint.read_config(src)
    family = family_of(config)
    written = {
        name: entry
        for name, entry in checkpoint.contents(src).items()
        if family.is_read(name, config)
    }
    tensors = stored_tensors(parameters, family.experts, written)
    dtypes = safetensors_io.dtypes()

    def stored(entry: Entry) -> torch.Tensor:
        return tensors[entry.name].to("cpu", dtypes[entry.dtype])

    def trained(entry: Entry) -> NewTensor | None:
        if entry.name not in written:
            return None
        return (entry.name, entry.dtype, entry.shape), partial(stored, entry)

    # float16 ends at 65,504
    if not all(stored(entry).isfinite().all() for entry in written.values()):
        return False
    checkpoint.rewrite(src, dst, trained)
    return True


def is_sharded(settings: RecoverStage) -> bool:
    """Whether weights or optimizer state are spread over processes."""
    return settings.sharding != "none" and launch.world_size() > 1


def with_curve(trainer_class: Any, curve: Callable[[int], float]) -> Any:
    """A kind of trainer that follows our learning-rate curve, whether it makes its optimizer or is given one."""

    class Curved(trainer_class):  # type: ignore[misc,valid-type,unused-ignore]
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, curve)
            return self.lr_scheduler

    return Curved


def _optimizer_state(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Adam's state by `<kind>.<parameter>`, each in its parameter's shape, and the step: float32 []."""
    adam = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        state = adam.state[parameter]
        tensors["step"] = state["step"].clone().reshape(())
        for kind in ADAM_STATE:
            tensors[f"{kind}.{name}"] = state[kind].contiguous()
    return tensors
