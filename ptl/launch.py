"""Training in several processes: `accelerate launch` runs ptl.worker, once for each device."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ptl.config import RecoverStage, Stage
from ptl.errors import InputError, WorkError
from ptl.job import RecoverReport, RecoveryJob
from ptl.processes import tied

METRICS = "ptl-metrics "  # begins a line that carries metrics to the process that started the training


def world_size() -> int:
    """Processes of the training that this process is part of; 1 outside of `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_for(settings: Stage) -> int:
    """How many processes train: what the config says, else one for each GPU."""
    import torch

    return settings.processes or max(1, torch.cuda.device_count())


def batch_of_one(settings: Stage, processes: int) -> int:
    """Sequences of one forward pass in one process. Raises InputError where a batch cannot be divided like that."""
    parts = settings.accumulation * processes
    if settings.batch_size % parts:
        raise InputError(
            f"recover.batch_size: {settings.batch_size} must be a multiple of accumulation={settings.accumulation} "
            f"times the {processes} training processes"
        )
    return settings.batch_size // parts


def run(src: Path, dst: Path, settings: RecoverStage, job: RecoveryJob, processes: int) -> RecoverReport:
    """Train in `processes` processes, metrics passed on while they run; returns the RecoverReport of the first."""
    job.scratch.mkdir(parents=True, exist_ok=True)
    answer, question = job.scratch / "report.json", job.scratch / "job.json"
    for left in (answer, job.scratch / "error.json"):  # by an earlier attempt
        left.unlink(missing_ok=True)
    question.write_text(json.dumps(_dump(src, dst, settings, job, answer)))
    process = subprocess.Popen(
        tied([*command(settings, processes), str(question)]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )
    told = _follow(process, job.on_log)
    if process.wait() or not answer.is_file():
        error = job.scratch / "error.json"
        if error.is_file():
            raised = json.loads(error.read_text())
            raise (InputError if raised["exit_code"] == 2 else WorkError)(raised["message"])
        raise WorkError(f"recover: training in {processes} processes failed{_reason(told)}")
    report = json.loads(answer.read_text())
    return RecoverReport(**report | {"curve": tuple((int(t), float(loss)) for t, loss in report["curve"])})


def can_shard() -> bool:
    """Whether weights and optimizer state can be spread over processes: accelerate does so on GPUs only."""
    import torch

    return torch.cuda.is_available()


def check(settings: RecoverStage) -> None:
    """Raise InputError where the stage cannot be divided among its processes as wanted; called before any work."""
    batch_of_one(settings, processes_for(settings) if world_size() == 1 else world_size())
    if settings.sharding == "none" or processes_for(settings) == 1 or not can_shard():
        return
    if settings.sharding == "zero2" and find_spec("deepspeed") is None:
        raise InputError(
            "recover.sharding: zero2 needs the package deepspeed, which is not installed; install ptl's extra "
            "`deepspeed` where recover runs (pip install 'ptl[deepspeed]'), or use fsdp"
        )


def command(settings: Stage, processes: int) -> list[str]:
    """The `accelerate launch` command for a stage."""
    flags = ["--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    flags += ["--mixed_precision", "bf16" if settings.dtype == "bfloat16" else "no", "--dynamo_backend", "no"]
    if settings.sharding == "fsdp" and can_shard():
        flags += ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
        flags += ["--fsdp_state_dict_type", "FULL_STATE_DICT"]
        flags += ["--fsdp_activation_checkpointing", str(settings.gradient_checkpointing).lower()]
    elif settings.sharding == "zero2" and can_shard():
        flags += ["--use_deepspeed", "--zero_stage", "2"]
    else:
        flags += ["--multi_gpu"]  # on CPUs too (gloo): `--cpu` would start one process, or need MPI
    return [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", "ptl.worker"]


def _follow(process: subprocess.Popen[str], on_log: Callable[[dict[str, float], int], None]) -> list[str]:
    """Pass on what the training prints, and its metrics as such; returns the lines printed."""
    told: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith(METRICS):
                metrics, step = json.loads(line.removeprefix(METRICS))
                on_log(metrics, step)
            else:
                told.append(line)
                print(line, end="", flush=True)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return told


def _reason(told: list[str]) -> str:
    """What a failed training printed last, and the signal that killed it, which only torch's launcher tells."""
    # from here on it is the launcher on the processes that it stopped, not why the first one died
    end = next((i for i, line in enumerate(told) if "torch/distributed/elastic" in line), len(told))
    root = "".join(told[end:]).partition("Root Cause")[2]
    killed = re.search(r"Signal \d+ \((SIG\w+)\) received by PID", root)
    said = f": a process was killed by {killed[1]}" if killed else ""
    if killed and killed[1] == "SIGKILL":
        said += " (what the system does when memory is used up; recover.accumulation splits a step's batch)"
    return f"{said}:\n{''.join(told[max(0, end - 30) : end])}"


def _dump(src: Path, dst: Path, settings: RecoverStage, job: RecoveryJob, answer: Path) -> dict[str, Any]:
    return {
        "src": str(src),
        "dst": str(dst),
        "settings": settings.model_dump(mode="json"),
        "data": job.data.model_dump(mode="json"),
        "this": dataclasses.asdict(job.this),
        "scratch": str(job.scratch),
        "teacher": job.teacher and str(job.teacher),
        "vault": job.vault and dataclasses.asdict(job.vault),
        "scored": job.scored and str(job.scored),
        "keep_optimizer_state": job.keep_optimizer_state,
        "answer": str(answer),
    }
