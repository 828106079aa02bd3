"""What ptl asks of lm-evaluation-harness: its model with notes on every answer, and its tasks with our overrides."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import random
import sys
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ptl import tasks
from ptl.config import Evaluate, Task
from ptl.errors import InputError, WorkError


def language_model(src: Path, settings: Evaluate) -> Any:
    """The harness's Hugging Face model for a checkpoint folder, on the GPU where there is one."""
    import torch
    from lm_eval.models.huggingface import HFLM

    class Recorded(HFLM):
        """HFLM that also notes its time and, for each prompt, the answer's length and whether the limit cut it."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            # The limit is the task's: one in the checkpoint's generation config would silently take precedence.
            self.model.generation_config.max_new_tokens = None
            self.cache_hook = self
            self.notes: dict[str, tuple[int, bool]] = {}
            self.seconds = 0.0  # spent in the model, over all requests
            self.cut_prompts = 0  # whose beginning did not fit into the context
            self._pending: deque[tuple[int, bool]] = deque()
            ends = self.model.generation_config.eos_token_id
            ends = ends if isinstance(ends, list) else [ends]
            self._ends = {self.eot_token_id, self.tokenizer.pad_token_id, *ends}

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
            out = super()._model_generate(context, max_length, stop, **kwargs)
            for tokens in out[:, context.shape[1] :].tolist():
                ended = next((i for i, token in enumerate(tokens) if token in self._ends), None)
                length = len(tokens) if ended is None else ended
                text = "" if ended is not None else self.tok_decode(tokens)
                cut = ended is None and not any(sequence in text for sequence in stop)
                self._pending.append((length, cut))
            return out

        def tok_batch_encode(self, strings: Any, *args: Any, left_truncate_len: Any = None, **kwargs: Any) -> Any:
            ids, mask = super().tok_batch_encode(strings, *args, left_truncate_len=left_truncate_len, **kwargs)
            if left_truncate_len:
                self.cut_prompts += int((mask.sum(1) >= left_truncate_len).sum())
            return ids, mask

        def generate_until(self, *args: Any, **kwargs: Any) -> Any:
            return self._timed(super().generate_until, *args, **kwargs)

        def loglikelihood(self, *args: Any, **kwargs: Any) -> Any:
            return self._timed(super().loglikelihood, *args, **kwargs)

        def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> Any:
            return self._timed(super().loglikelihood_rolling, *args, **kwargs)

        def _timed(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            out = work(*args, **kwargs)  # ends on the CPU, so that the GPU has finished too
            self.seconds += time.perf_counter() - started
            return out

        def add_partial(self, attr: str, req: Any, res: Any) -> None:
            """The harness's cache hook: called once for each answer, in the order of the batch."""
            if attr == "generate_until":
                self.notes[req[0]] = self._pending.popleft()

    _keep_templates()
    return Recorded(
        pretrained=str(src),
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype="auto",
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        trust_remote_code=False,
    )


def check_lengths(lm: Any, loaded: Any) -> None:
    """Raise InputError when a task's longest answer leaves no room for a prompt."""
    if loaded.get_config("output_type") != "generate_until":
        return
    answer = (loaded.get_config("generation_kwargs") or {}).get("max_gen_toks", lm.max_gen_toks)
    if answer >= lm.max_length:
        raise InputError(
            f"evaluate.tasks: answers of {loaded.task_name!r} may be {answer} tokens long, but the model's context is "
            f"{lm.max_length}; set max_new_tokens of the task below that (or evaluate.max_length, if it can be longer)"
        )


def load_task(spec: tasks.Spec, task: Task, settings: Evaluate, seed: int) -> Any:
    """The harness's task object, with the overrides of the config. May fetch data from the hub."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    tasks.check_code(spec, settings.allow_code)
    with _sandboxed_code_eval() if spec.runs_code else contextlib.nullcontext():
        config = load_yaml(spec.path)
    splits = tasks.local_splits(spec, settings.data_dir, task.num_fewshot)
    if splits:
        config |= {field: None for field in tasks.SPLITS if config.get(field) not in splits}
        config |= {"dataset_kwargs": None, "custom_dataset": lambda **_: read_splits(splits)}
    logger = logging.getLogger("lm_eval.api.task")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it explains custom_dataset, which the user did not write
    try:
        loaded = TaskManager(include_defaults=False).load(config)["tasks"][spec.name]
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise WorkError(f"evaluate.tasks: the task {spec.name!r} did not load: {error}") from error
    finally:
        logger.setLevel(level)
    if loaded.get_config("output_type") == "generate_until" and task.max_new_tokens is not None:
        loaded.set_config("generation_kwargs", {"max_gen_toks": task.max_new_tokens}, update=True)
    if task.num_fewshot is not None:
        loaded.set_config("num_fewshot", task.num_fewshot)
    elif loaded.get_config("num_fewshot") is None:
        loaded.set_config("num_fewshot", 0)
    loaded.set_fewshot_seed(seed)
    return loaded


def read_splits(splits: dict[str, tasks.LocalFile]) -> dict[str, Any]:
    """Split -> datasets.Dataset, from JSONL (also gzipped) or Parquet. Raises InputError that names a bad line."""
    from datasets import Dataset

    found = {}
    for split, local in splits.items():
        path = Path(local.file)
        raw = list(Dataset.from_parquet(str(path)) if path.suffix == ".parquet" else _json_lines(path))
        found[split] = Dataset.from_list([row for line in raw if (row := local.row(line)) is not None])
    return found


def _keep_templates() -> None:
    """Let the harness compile each prompt template once: five times for every item is 40 % of a tiny model's time."""
    from lm_eval.utils import env

    if not hasattr(env.from_string, "cache_info"):
        env.from_string = lru_cache(maxsize=256)(env.from_string)


def seed_everything(seed: int) -> None:
    """As simple_evaluate does, with one seed for all generators."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise InputError(f"evaluate.data_dir: {path} line {number} is not JSON: {error}") from error


@contextlib.contextmanager
def _sandboxed_code_eval() -> Iterator[None]:
    """While a code task's module is imported, `evaluate.load("code_eval")` gives the sandbox instead.

    The harness scores HumanEval and MBPP with Hugging Face's code_eval, which runs the answers in a child process with
    all of the parent's rights. Its tasks import it at module level under the name `evaluate`.
    """
    from ptl import sandbox

    sandbox.require_support()
    stand_in = types.ModuleType("evaluate")
    stand_in.load = lambda name: types.SimpleNamespace(compute=pass_at_1)  # type: ignore[attr-defined]
    before = sys.modules.get("evaluate")
    sys.modules["evaluate"] = stand_in
    try:
        yield
    finally:
        if before is None:
            del sys.modules["evaluate"]
        else:
            sys.modules["evaluate"] = before


def pass_at_1(
    references: list[str], predictions: list[list[str]], k: list[int] | None = None
) -> tuple[dict[str, float], dict[int, Any]]:
    """code_eval's `compute`, with every candidate run in the sandbox: the share that passes its tests."""
    from ptl import sandbox

    if k not in (None, [1]):
        raise InputError(f"evaluate.tasks: pass@k with k={k} is not supported; use a task with pass@1")
    outcomes = [
        [sandbox.run_tests(candidate, tests).passed for candidate in candidates]
        for tests, candidates in zip(references, predictions, strict=True)
    ]
    passed = [sum(tried) / len(tried) for tried in outcomes]
    return {"pass@1": sum(passed) / len(passed)}, {}
