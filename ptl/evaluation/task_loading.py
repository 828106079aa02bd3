"""Tasks of lm-evaluation-harness with our overrides: local data, answer lengths, code run only in the sandbox."""

from __future__ import annotations

import contextlib
import logging
import sys
import types
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from ptl.config.run import Evaluate, Task
from ptl.errors import InputError, WorkError
from ptl.evaluation import task_data, tasks
from ptl.evaluation.task_yaml import SPLITS, Spec


def check_lengths(lm: Any, loaded: Any) -> None:
    """Raise InputError when a task's longest answer leaves no room for a prompt; lengths in tokens."""
    if loaded.get_config("output_type") != "generate_until":
        return
    answer = (loaded.get_config("generation_kwargs") or {}).get("max_gen_toks", lm.max_gen_toks)
    if answer >= lm.max_length:
        raise InputError(
            f"answers of {loaded.task_name!r} may be {answer} tokens long, but the model's context is {lm.max_length}",
            field="evaluate.tasks",
            remedy="set max_new_tokens of the task below that (or evaluate.max_length, if it can be longer)",
        )


def load_tasks(specs: list[Spec], task: Task, settings: Evaluate, seed: int) -> dict[str, Any]:
    """Name -> the harness's task, as of `load_task`: one, or the members of a group."""
    from transformers import set_seed

    set_seed(seed)  # as lm_eval.simple_evaluate does, with one seed for all generators
    return {spec.name: load_task(spec, task, settings, seed) for spec in specs}


def load_task(spec: Spec, task: Task, settings: Evaluate, seed: int) -> Any:
    """The harness's task object, with the overrides of the config. May fetch data from the hub.

    Its attribute `code_eval` counts the answers whose code has run out of time.
    """
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    tasks.check_code(spec, settings.allow_code)
    code_eval = CodeEval()
    # Reading the YAML imports its functions, and with them what scores code.
    with _in_place_of_evaluate(spec, code_eval) if spec.unsafe_code else contextlib.nullcontext():
        config: dict[str, Any] = load_yaml(spec.path)
    splits = task_data.local_splits(spec, settings.data_dir, task.num_fewshot)
    if splits:
        # A split that is named but has no file would be looked for.
        config |= {field: None for field in SPLITS if config.get(field) not in splits}
        # In place of dataset_path
        config |= {"dataset_kwargs": None, "custom_dataset": lambda **_: task_data.read_splits(splits)}
    # The harness explains custom_dataset, which the user did not write.
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)
    try:
        # Only this task: the index of all that the harness ships takes seconds.
        loaded = TaskManager(include_defaults=False).load(config)["tasks"][spec.name]
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise WorkError(f"the task {spec.name!r} did not load: {error}", field="evaluate.tasks") from error
    code_eval.timeouts = 0  # the harness's modules try their metric when they are imported
    loaded.code_eval = code_eval
    # The config's overrides; few-shot examples are drawn with the run's seed.
    if loaded.get_config("output_type") == "generate_until" and task.max_new_tokens is not None:
        loaded.set_config("generation_kwargs", {"max_gen_toks": task.max_new_tokens}, update=True)
    shots = loaded.get_config("num_fewshot") if task.num_fewshot is None else task.num_fewshot
    loaded.set_config("num_fewshot", shots or 0)
    loaded.set_fewshot_seed(seed)
    return loaded


def cache_templates() -> None:
    """Let the harness compile each prompt template once: five times for every item is 40 % of a tiny model's time.

    In Jinja's sandbox: a template of a task's YAML is data and has no way to Python's internals.
    """
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval.utils import env

    if hasattr(env.from_string, "cache_info"):  # by an earlier call
        return
    sandboxed = SandboxedEnvironment(undefined=env.undefined, keep_trailing_newline=env.keep_trailing_newline)
    sandboxed.filters = env.filters
    env.from_string = lru_cache(maxsize=256)(sandboxed.from_string)


class CodeEval:
    """Hugging Face's metric code_eval, with every candidate run in the sandbox."""

    timeouts = 0  # answers whose code has run out of time: the harness's metrics return one number

    def compute(
        self, references: list[str], predictions: list[list[str]], k: list[int] | None = None
    ) -> tuple[dict[str, float], dict[int, Any]]:
        """The share of the candidates that pass their tests."""
        from ptl.sandbox import runner

        if k not in (None, [1]):
            problem = f"pass@k with k={k} is not supported"
            raise InputError(problem, field="evaluate.tasks", remedy="use a task with pass@1")
        passed = []
        for tests, candidates in zip(references, predictions, strict=True):
            outcomes = [runner.run_tests(candidate, tests) for candidate in candidates]
            self.timeouts += sum(outcome.status == "timeout" for outcome in outcomes)
            passed += [outcome.passed for outcome in outcomes]
        return {"pass@1": sum(passed) / len(passed)}, {}


@contextlib.contextmanager
def _in_place_of_evaluate(spec: Spec, code_eval: CodeEval) -> Iterator[None]:
    """While a code task's module is imported, `evaluate.load("code_eval")` gives `code_eval` instead.

    The harness scores HumanEval and MBPP with Hugging Face's code_eval, which runs the answers in a child process with
    all of the parent's rights. Its tasks import it at module level under the name `evaluate`.
    """
    from ptl.sandbox import runner

    runner.require_support()
    substitute = types.ModuleType("evaluate")
    substitute.load = lambda name: code_eval  # type: ignore[attr-defined]
    # The task's own module has the metric of an earlier load.
    for name in [name for name in sys.modules if name.startswith(f"lm_eval.tasks.{spec.path.parent.name}.")]:
        del sys.modules[name]
    # The real module may be loaded already, by others who need it.
    real = sys.modules.get("evaluate")
    sys.modules["evaluate"] = substitute
    try:
        yield
    finally:
        del sys.modules["evaluate"]
        if real is not None:
            sys.modules["evaluate"] = real
