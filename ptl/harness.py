"""Tasks of lm-evaluation-harness with our overrides: local data, answer lengths, code run only in the sandbox."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import types
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ptl import tasks
from ptl.config import Evaluate, Task
from ptl.errors import InputError, WorkError
from ptl.json_lines import read_json_lines


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
        raw = list(
            Dataset.from_parquet(str(path))
            if path.suffix == ".parquet"
            else read_json_lines(path, "evaluate.data_dir", str(path))
        )
        found[split] = Dataset.from_list([row for line in raw if (row := local.row(line)) is not None])
    return found


def keep_templates() -> None:
    """Let the harness compile each prompt template once: five times for every item is 40 % of a tiny model's time.

    In Jinja's sandbox: a template of a task's YAML is data and has no way to Python's internals.
    """
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval.utils import env

    if not hasattr(env.from_string, "cache_info"):
        sandboxed = SandboxedEnvironment(undefined=env.undefined, keep_trailing_newline=env.keep_trailing_newline)
        sandboxed.filters = env.filters
        env.from_string = lru_cache(maxsize=256)(sandboxed.from_string)


def seed_everything(seed: int) -> None:
    """As simple_evaluate does, with one seed for all generators."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


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
