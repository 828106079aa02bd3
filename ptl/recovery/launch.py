"""Training in several processes: `accelerate launch` runs ptl.recovery.worker, once for each device.

The job goes to the processes as JSON. What they print comes back: metrics, and training checkpoints to be stored, on
lines that begin with METRICS and CHECKPOINT; the first process leaves its report, and whichever fails first its error,
in a file. On several machines each launches its own group of processes; where one machine stands for all of them, it
launches all groups, and a group that is killed restarts them together, as JobSet does with the nodes of a TrainJob.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TextIO

from pydantic import TypeAdapter

from ptl import cuda
from ptl.config.recover import RecoverStage, Stage
from ptl.errors import InputError, WorkError
from ptl.processes import tied
from ptl.recovery.job import REPORT, RecoverReport, RecoveryJob
from ptl.recovery.machines import LOOPBACK, Machines, free_port

METRICS = "ptl-metrics "  # then metrics and optimizer step, as JSON
CHECKPOINT = "ptl-checkpoint "  # then the folder of a complete training checkpoint
HANDOVER = "checkpoint.handover"  # a file in `scratch`, until the launching process has stored the checkpoint
REPORT_FILE = "report.json"  # in `scratch`
ERROR_FILE = "error.json"  # in `scratch`
JOB = TypeAdapter(RecoveryJob)  # all but its functions crosses to the processes as JSON
LAST_LINES = 30  # of a failed training, in its error
RESTARTS = 3  # of all groups on this machine; as many as those of nodes in manifests/components/trainer
RENDEZVOUS = 1800  # seconds that machines wait for each other: some fetch their checkpoint later
GRACE = 10  # seconds between SIGTERM and SIGKILL


def world_size() -> int:
    """Processes of the training that this process is part of; 1 outside of `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_for(settings: Stage, machines: Machines) -> int:
    """How many processes train on each machine: what the config says, else one for each GPU."""
    import torch

    return settings.processes or max(1, torch.cuda.device_count() // len(machines.ranks_here))


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
    processes: int,  # on each machine
) -> RecoverReport:
    """Train in several processes, passing metrics on while they run; returns the report of the first process."""
    if not can_shard():
        settings = settings.model_copy(update={"sharding": "none"})
    job.scratch.mkdir(parents=True, exist_ok=True)
    job_file = job.scratch / "job.json"
    report_file = job.scratch / REPORT_FILE
    error_file = job.scratch / ERROR_FILE
    total = processes * job.machines.count
    print(f"starting {processes} of {total} training processes, which wait for each other", flush=True)
    # all that a process needs, in JSON's types
    fields = {
        "src": str(src),
        "dst": str(dst),
        "settings": settings.model_dump(mode="json"),
        "job": JOB.dump_python(job, mode="json", exclude={"on_log", "save_checkpoint"}),
        "stores_checkpoints": job.save_checkpoint is not None,
    }
    job_file.write_text(json.dumps(fields))
    # JobSet restarts nodes, and nobody else the groups of this machine
    restarts = RESTARTS if len(job.machines.ranks_here) > 1 else 0
    while True:
        # of an earlier attempt
        report_file.unlink(missing_ok=True)
        error_file.unlink(missing_ok=True)
        succeeded, printed = _launch(settings, job, processes, job_file)
        if succeeded and report_file.is_file():
            return REPORT.validate_json(report_file.read_bytes())
        if error_file.is_file():
            # the error of a process, raised again
            error = json.loads(error_file.read_text())
            is_input = error.pop("exit_code") == InputError.exit_code
            raise InputError(**error) if is_input else WorkError(**error)
        problem = f"training in {total} processes failed{_reason(printed)}"
        if not restarts:
            raise WorkError(problem, field="recover")
        print(f"{problem}\nall groups of processes start again, up to {restarts} times", flush=True)
        restarts -= 1


def _launch(settings: RecoverStage, job: RecoveryJob, processes: int, job_file: Path) -> tuple[bool, list[str]]:
    """Start this machine's groups and follow them to their end; whether all succeeded, and what they printed."""
    machines = job.machines
    port = free_port() if len(machines.ranks_here) > 1 else machines.port
    # one pipe for all
    reading_end, writing_end = os.pipe()
    groups = [
        subprocess.Popen(
            # ends with this process, however that ends
            tied([*command(settings, processes, machines, port), str(job_file)]),
            stdout=writing_end,
            stderr=subprocess.STDOUT,
            env=_environment(machines, rank),
        )
        for rank in machines.ranks_here
    ]
    os.close(writing_end)
    with os.fdopen(reading_end) as lines, _ending_together(groups):
        # until the last process has ended
        printed = _follow(lines, job)
        codes = [group.wait() for group in groups]
    return not any(codes), printed


def _environment(machines: Machines, rank: int) -> dict[str, str]:
    """The variables of a group's launcher: where several share this machine, each has its part of the GPUs."""
    # threads: what torch's launcher would set, with a warning
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    num_groups = len(machines.ranks_here)
    if num_groups == 1:
        return environment
    # the name of this machine may lead nowhere
    environment["PET_LOCAL_ADDR"] = LOOPBACK

    import torch

    group_size = torch.cuda.device_count() // num_groups
    if group_size:
        devices = cuda.listed(environment) or [str(number) for number in range(group_size * num_groups)]
        environment[cuda.VISIBLE] = ",".join(devices[rank * group_size : (rank + 1) * group_size])
    return environment


@contextmanager
def _ending_together(groups: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """End all groups when one has failed, for which the others would wait, and when the block is left by an error."""
    followed = threading.Event()

    def watch() -> None:
        while not followed.wait(0.2):
            if any(group.poll() for group in groups):
                _end(groups)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    if len(groups) > 1:
        watcher.start()
    try:
        yield
    except BaseException:
        # a log or a store that fails ends the training too
        _end(groups)
        raise
    finally:
        followed.set()


def _end(groups: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, on which a launcher ends its processes, and SIGKILL to what remains."""
    for group in groups:
        group.terminate()
    for group in groups:
        try:
            group.wait(GRACE)
        except subprocess.TimeoutExpired:
            group.kill()
            group.wait()


def can_shard() -> bool:
    """Whether weights and optimizer state can be spread over processes: accelerate does so on GPUs only."""
    import torch

    return torch.cuda.is_available()


def check(settings: RecoverStage, machines: Machines) -> None:
    """Raise InputError where the stage cannot be divided among its processes; called before any work."""
    _check_groups(machines)
    configured = processes_for(settings, machines) * machines.count
    # one of the processes that were launched knows their number from the environment
    sequences_per_pass(settings, configured if world_size() == 1 else world_size())


def _check_groups(machines: Machines) -> None:
    """Raise InputError for more groups of processes than this machine has GPUs: each needs one of its own."""
    import torch

    gpus = torch.cuda.device_count()
    if 0 < gpus < len(machines.ranks_here):
        raise InputError(
            f"{machines.count} nodes cannot share the {gpus} GPUs of this machine",
            field="resources.steps.recover.nodes",
            remedy=f"set it to {gpus} at most for a run on one machine",
        )


def command(settings: Stage, processes: int, machines: Machines, port: int = 0) -> list[str]:
    """The `accelerate launch` command for a stage, with so many processes on each machine."""
    precision = "bf16" if settings.dtype == "bfloat16" else "no"
    recomputed = str(settings.gradient_checkpointing).lower()
    # port 0: a free one, as several trainings may run on one machine
    flags = f"--num_processes {processes * machines.count} --num_machines {machines.count}"
    flags += f" --main_process_port {port}"
    if machines.count > 1:
        flags += f" --main_process_ip {machines.address}"
        if machines.rank is None:
            # groups on this machine agree on their ranks; as rank 0 accelerate refuses a port that another one opened
            flags += " --machine_rank 1 --rdzv_backend c10d"
        else:
            # nodes have theirs from Kubeflow Trainer
            flags += f" --machine_rank {machines.rank} --same_network --rdzv_conf timeout={RENDEZVOUS}"
    flags += f" --mixed_precision {precision} --dynamo_backend no"
    if settings.sharding == "fsdp":
        flags += " --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"
        # saved in one piece, as the first process reads it
        flags += " --fsdp_state_dict_type FULL_STATE_DICT"
        flags += f" --fsdp_activation_checkpointing {recomputed}"
    else:
        # on CPUs too (gloo): `--cpu` would start one process, or need MPI
        flags += " --multi_gpu"
    return [sys.executable, "-m", "accelerate.commands.launch", *flags.split(), "-m", "ptl.recovery.worker"]


def _follow(lines: TextIO, job: RecoveryJob) -> list[str]:
    """Pass on what the training prints, its metrics and its checkpoints; returns the other lines."""
    printed: list[str] = []
    for line in lines:
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
