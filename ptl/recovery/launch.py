"""Training in several processes: `accelerate launch` runs ptl.recovery.worker, once for each device.

The job goes to the processes as JSON. What they print comes back: metrics, and training checkpoints to be stored, on
lines that begin with METRICS and CHECKPOINT; the first process leaves its report or its error in a file.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

from pydantic import TypeAdapter

from ptl.config import trackers
from ptl.config.recover import RecoverStage, Stage
from ptl.errors import InputError, WorkError
from ptl.processes import tied
from ptl.recovery.job import REPORT, RecoverReport, RecoveryJob

METRICS = "ptl-metrics "  # then metrics and optimizer step, as JSON
CHECKPOINT = "ptl-checkpoint "  # then the folder of a complete training checkpoint
HANDOVER = "checkpoint.handover"  # a file in `scratch`, until the launching process has stored the checkpoint
REPORT_FILE = "report.json"  # in `scratch`
ERROR_FILE = "error.json"  # in `scratch`
JOB = TypeAdapter(RecoveryJob)  # all but its functions crosses to the processes as JSON
LAST_LINES = 30  # of a failed training, in its error


def world_size() -> int:
    """Processes of the training that this process is part of; 1 outside of `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_for(settings: Stage) -> int:
    """How many processes train: what the config says, else one for each GPU."""
    import torch

    return settings.processes or max(1, torch.cuda.device_count())


def sequences_per_pass(settings: Stage, processes: int) -> int:
    """Sequences of one forward pass in one process. Raises InputError where a batch cannot be divided like that."""
    parts = settings.accumulation * processes
    if settings.batch_size % parts:
        raise InputError(
            f"{settings.batch_size} must be a multiple of accumulation={settings.accumulation} "
            f"times the {processes} training processes",
            field="recover.batch_size",
        )
    return settings.batch_size // parts


def run(
    src: Path,
    dst: Path,
    settings: RecoverStage,
    job: RecoveryJob,
    processes: int,
) -> RecoverReport:
    """Train in several processes, passing metrics on while they run; returns the report of the first process."""
    job.scratch.mkdir(parents=True, exist_ok=True)
    job_file = job.scratch / "job.json"
    report_file = job.scratch / REPORT_FILE
    error_file = job.scratch / ERROR_FILE
    # of an earlier attempt
    report_file.unlink(missing_ok=True)
    error_file.unlink(missing_ok=True)
    # all that a process needs, in JSON's types
    fields = {
        "src": str(src),
        "dst": str(dst),
        "settings": settings.model_dump(mode="json"),
        "job": JOB.dump_python(job, mode="json", exclude={"on_log", "save_checkpoint"}),
        "stores_checkpoints": job.save_checkpoint is not None,
    }
    job_file.write_text(json.dumps(fields))
    process = subprocess.Popen(
        tied([*command(settings, processes), str(job_file)]),  # ends with this process, however that ends
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # what torch's launcher would set, with a warning
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )
    # until the last process has ended
    printed = _follow(process, job)
    succeeded = process.wait() == 0
    if succeeded and report_file.is_file():
        return REPORT.validate_json(report_file.read_bytes())
    if error_file.is_file():
        # the error of the first process, raised again
        error = json.loads(error_file.read_text())
        is_input = error.pop("exit_code") == InputError.exit_code
        raise InputError(**error) if is_input else WorkError(**error)
    raise WorkError(f"training in {processes} processes failed{_reason(printed)}", field="recover")


def can_shard() -> bool:
    """Whether weights and optimizer state can be spread over processes: accelerate does so on GPUs only."""
    import torch

    return torch.cuda.is_available()


def check(settings: RecoverStage) -> None:
    """Raise InputError where the stage cannot be divided among its processes; called before any work."""
    configured = processes_for(settings)
    # one of the processes that were launched knows their number from the environment
    processes = configured if world_size() == 1 else world_size()
    sequences_per_pass(settings, processes)
    trackers.check(settings.report_to)
    needs_deepspeed = settings.sharding == "zero2" and configured > 1 and can_shard()
    if needs_deepspeed and find_spec("deepspeed") is None:
        raise InputError(
            "zero2 needs the package deepspeed, which is not installed",
            field="recover.sharding",
            remedy="install ptl's extra `deepspeed` where recover runs (pip install 'ptl[deepspeed]'), or use fsdp",
        )


def command(settings: Stage, processes: int) -> list[str]:
    """The `accelerate launch` command for a stage."""
    precision = "bf16" if settings.dtype == "bfloat16" else "no"
    recomputed = str(settings.gradient_checkpointing).lower()
    # port 0: a free one, as several trainings may run on one machine
    flags = f"--num_processes {processes} --num_machines 1 --main_process_port 0"
    flags += f" --mixed_precision {precision} --dynamo_backend no"
    sharding = settings.sharding if can_shard() else "none"
    if sharding == "fsdp":
        flags += " --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"
        # saved in one piece, as the first process reads it
        flags += " --fsdp_state_dict_type FULL_STATE_DICT"
        flags += f" --fsdp_activation_checkpointing {recomputed}"
    elif sharding == "zero2":
        flags += " --use_deepspeed --zero_stage 2"
    else:
        # on CPUs too (gloo): `--cpu` would start one process, or need MPI
        flags += " --multi_gpu"
    return [sys.executable, "-m", "accelerate.commands.launch", *flags.split(), "-m", "ptl.recovery.worker"]


def _follow(process: subprocess.Popen[str], job: RecoveryJob) -> list[str]:
    """Pass on what the training prints, its metrics and its checkpoints; returns the other lines."""
    printed: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith(METRICS):
                metrics, step = json.loads(line.removeprefix(METRICS))
                job.on_log(metrics, step)
            elif line.startswith(CHECKPOINT) and job.save_checkpoint is not None:
                job.save_checkpoint(Path(json.loads(line.removeprefix(CHECKPOINT))))
                # the training waits until this file is gone
                (job.scratch / HANDOVER).unlink()
            elif line.strip():  # a message begins with an empty line
                printed.append(line)
                print(line, end="", flush=True)
    except BaseException:
        # a log or a store that fails ends the training too
        process.terminate()
        process.wait()
        raise
    return printed


def _reason(printed: list[str]) -> str:
    """What a failed training printed last, and the signal that killed it, which only torch's launcher reports."""
    # where the launcher begins to report on the processes that it stopped, not on why the first one died
    of_training = list(takewhile(lambda line: "torch/distributed/elastic" not in line, printed))
    of_launcher = "".join(printed[len(of_training) :])
    _, _, root_cause = of_launcher.partition("Root Cause")
    killed = re.search(r"Signal \d+ \((SIG\w+)\) received by PID", root_cause)
    signal = ""
    if killed:
        signal = f": a process was killed by {killed[1]}"
        if killed[1] == "SIGKILL":
            signal += " (as the system does when memory is used up; recover.accumulation splits a step's batch)"
    last_lines = "".join(of_training[-LAST_LINES:])
    return f"{signal}:\n{last_lines}"
