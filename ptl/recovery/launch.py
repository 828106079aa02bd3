"""Training in several processes: `accelerate launch` runs ptl.recovery.worker, once for each device.

The job goes to the processes by pickle. What they print comes back, metrics on lines that begin with METRICS; the first
process leaves its report, and whichever fails first its error, in a file. On several machines each launches its own
processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import re
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from ptl.config.recover import RecoverStage
from ptl.errors import InputError, WorkError
from ptl.processes import followed, on_gpus
from ptl.recovery.job import REPORT, Machines, RecoverReport, RecoveryJob

METRICS = "ptl-metrics "  # then metrics and optimizer step, as JSON
REPORT_FILE = "report.json"  # in `scratch`
ERROR_FILE = "error.json"  # in `scratch`
LAST_LINES = 30  # of a failed training, in its error
RENDEZVOUS = 1800  # seconds that machines wait for each other: some fetch their checkpoint later
# What a shell of torchrun or Slurm has set, and accelerate would take for a launch of ours.
FOREIGN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int:
    """Processes of the training that this process is part of; 1 outside of `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_of_all(settings: RecoverStage, machines: Machines) -> int:
    """How many processes train on all machines together."""
    return on_gpus(settings.processes, "recover") * machines.count


def sequences_per_pass(settings: RecoverStage, processes: int) -> int:
    """Sequences of one forward pass in one process. Raises InputError where a batch cannot be divided like that."""
    parts = settings.accumulation * processes
    if settings.batch_size % parts:
        raise InputError(
            f"{settings.batch_size} must be a multiple of accumulation={settings.accumulation} "
            f"times the {processes} training processes",
            field="recover.batch_size",
        )
    return settings.batch_size // parts


def check_batches(stages: Sequence[RecoverStage], machines: Machines) -> None:
    """Raise InputError for processes that these machines do not have, or that cannot divide a stage's batch."""
    for stage in stages:
        sequences_per_pass(stage, processes_of_all(stage, machines))


def can_shard() -> bool:
    """Whether weights and optimizer state can be spread over processes: accelerate does so on GPUs only."""
    import torch

    return torch.cuda.is_available()


def run(src: Path, dst: Path, settings: RecoverStage, job: RecoveryJob) -> RecoverReport:
    """Train in several processes, passing metrics on while they run; returns the report of the first process."""
    if not can_shard():
        settings = settings.model_copy(update={"sharding": "none"})
    job.scratch.mkdir(parents=True, exist_ok=True)
    job_file, report_file, error_file = (
        job.scratch / name for name in ("job.pickle", REPORT_FILE, ERROR_FILE)
    )
    # of an earlier attempt
    report_file.unlink(missing_ok=True)
    error_file.unlink(missing_ok=True)
    # all but the log, which the processes print
    job_file.write_bytes(pickle.dumps((src, dst, settings, dataclasses.replace(job, on_log=print))))
    here, total = on_gpus(settings.processes, "recover"), processes_of_all(settings, job.machines)
    print(f"starting {here} of {total} training processes, which wait for each other", flush=True)
    printed: list[str] = []

    def follow(line: str) -> None:
        if line.startswith(METRICS):
            metrics, step = json.loads(line.removeprefix(METRICS))
            job.on_log(metrics, step)
        elif line.strip():  # a message begins with an empty line
            printed.append(line)
            print(line, end="", flush=True)

    # what torch's launcher would set, with a warning
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    exit_code = followed([*command(settings, job.machines), str(job_file)], environment, follow)
    if exit_code == 0 and report_file.is_file():
        return REPORT.validate_json(report_file.read_bytes())
    with contextlib.suppress(FileNotFoundError, ValueError):  # on a full disk it is empty
        # the error of a process, raised again
        error = json.loads(error_file.read_text())
        is_input = error.pop("exit_code") == InputError.exit_code
        raise InputError(**error) if is_input else WorkError(**error)
    raise WorkError(f"training in {total} processes failed{_reason(printed)}", field="recover")


def command(settings: RecoverStage, machines: Machines) -> list[str]:
    """The `accelerate launch` command for a stage on this machine."""
    precision = "bf16" if settings.dtype == "bfloat16" else "no"
    flags = f"--num_processes {processes_of_all(settings, machines)} --mixed_precision {precision} --dynamo_backend no"
    # port 0: a free one, as several trainings may run on one machine
    flags += f" --main_process_port {machines.port}"
    if machines.count == 1:
        flags += " --num_machines 1"
    else:
        # nodes have their ranks from Kubeflow Trainer
        flags += f" --num_machines {machines.count} --machine_rank {machines.rank}"
        flags += (
            f" --main_process_ip {machines.address} --same_network --rdzv_conf timeout={RENDEZVOUS}"
        )
    if settings.sharding == "fsdp":
        flags += " --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"
        # saved in one piece, as the first process reads it
        flags += " --fsdp_state_dict_type FULL_STATE_DICT"
        # each process has read the weights anyway; sent by the first one, buffers of routers would be refused
        flags += " --fsdp_cpu_ram_efficient_loading false"
        flags += f" --fsdp_activation_checkpointing {str(settings.gradient_checkpointing).lower()}"
    else:
        # on CPUs too (gloo): `--cpu` would start one process, or need MPI
        flags += " --multi_gpu"
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *flags.split(),
        "-m",
        "ptl.recovery.worker",
    ]


def _reason(printed: list[str]) -> str:
    """What a failed training printed last, and the signal that killed it, which only torch's launcher reports."""
    # where the launcher begins to report on the processes that it stopped, not on why the first one died
    of_training = list(takewhile(lambda line: "torch/distributed/elastic" not in line, printed))
    _, _, root_cause = "".join(printed[len(of_training) :]).partition("Root Cause")
    killed = re.search(r"Signal \d+ \((SIG\w+)\) received by PID", root_cause)
    signal = f": a process was killed by {killed[1]}" if killed else ""
    if "SIGKILL" in signal:
        signal += " (as the system does when memory is used up; recover.accumulation splits a step's batch)"
    return f"{signal}:\n{''.join(of_training[-LAST_LINES:])}"
