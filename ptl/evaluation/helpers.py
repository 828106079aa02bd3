"""Helper processes of an evaluation: each has the model on a GPU of its own, and answers a share of the requests.

The harness stays in one process, and so does all that depends on the order of the items. Its own way of using several
GPUs (accelerate) gives each process its own items, whose few-shot examples are then drawn in another order: prompts
would depend on the number of GPUs, and scores could not be compared item by item.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any, NamedTuple

from ptl import cuda
from ptl.config.run import Evaluate
from ptl.errors import InputError, WorkError
from ptl.processes import Environment, tied


class AnswerNote(NamedTuple):
    """How a generated answer ended."""

    tokens: int
    truncated: bool  # by the token limit


@dataclass(frozen=True)
class Share:
    """What a helper has answered."""

    answers: list[Any] = field(default_factory=list)  # in the order of its requests
    notes: Mapping[str, AnswerNote] = field(default_factory=dict)  # by prompt
    cut_prompts: int = 0
    error: str = ""  # why there is nothing else


class Helper:
    """A process with the model on GPU `number` of this step; its first share, when it has loaded it, is empty."""

    def __init__(self, src: Path, settings: Evaluate, number: int) -> None:
        self._number = number
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            # Ends with this process, however that ends.
            tied([sys.executable, "-m", "ptl.evaluation.language_models", str(theirs.fileno())]),
            pass_fds=[theirs.fileno()],
            env=_environment(number, os.environ),
        )
        theirs.close()
        self._connection.send((src, settings))

    def ask(self, method: str, arguments: list[tuple[Any, ...]]) -> None:
        """Have requests of one kind answered: generate_until, loglikelihood or loglikelihood_rolling."""
        try:
            self._connection.send((method, arguments))
        except OSError as error:
            raise self._failed("it has ended") from error

    def share(self) -> Share:
        """Wait for the answers. Raises WorkError where the helper has failed."""
        try:
            share: Share = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._failed(f"exit code {self._process.wait()}") from error
        if share.error:
            raise self._failed(share.error)
        return share

    def check(self) -> None:
        """Raise WorkError where the process has ended: it waits for requests until it is closed."""
        if self._process.poll() is not None:
            self.share()  # has its own error, where it could send one
            raise self._failed(f"exit code {self._process.returncode}")

    def close(self) -> None:
        """End the process, also while it works on a share that nobody needs any more."""
        self._process.terminate()
        self._process.wait()
        self._connection.close()

    def _failed(self, reason: str) -> WorkError:
        return WorkError(
            f"process {self._number} of those that answer failed: {reason}",
            field="evaluate",
            remedy="see its output above; evaluate.processes: 1 uses a single process, and a smaller "
            "evaluate.batch_size less memory",
        )


def processes_for(settings: Evaluate) -> int:
    """How many processes answer: what the config says, else one for each GPU; with vLLM always one.

    Raises InputError for more processes than GPUs, of machines that have any.
    """
    import torch

    gpus = torch.cuda.device_count()
    if settings.backend == "vllm":
        return 1
    if settings.processes is None:
        return max(1, gpus)
    if 0 < gpus < settings.processes:
        raise InputError(
            f"{settings.processes} processes, and the step has {gpus} GPUs",
            field="evaluate.processes",
            remedy="lower it, or raise resources.steps.evaluate.accelerators",
        )
    return settings.processes


def _environment(number: int, environment: Mapping[str, str]) -> Environment:
    """A helper sees one GPU, the `number`-th of those that this process sees; none where this process sees none."""
    devices = cuda.listed(environment)
    device = str(number) if devices is None else devices[number] if number < len(devices) else ""
    # On CPUs one thread each: helpers share the cores.
    return {"OMP_NUM_THREADS": "1", **environment, cuda.VISIBLE: device}
