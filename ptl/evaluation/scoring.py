"""One benchmark by lm-evaluation-harness: its task with our overrides (local data, answer lengths, code run only in the
sandbox), its score with an interval, and the outcome of every item.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from ptl.config.run import Evaluate, Task
from ptl.errors import WorkError
from ptl.evaluation import task_files, tasks
from ptl.evaluation.generation import PLAIN_SAMPLING, AnswerNote, seed_of_sample
from ptl.evaluation.paired import Item, interval
from ptl.evaluation.task_files import SPLITS, Spec, task_error


def load_tasks(specs: list[Spec], task: Task, settings: Evaluate, seed: int) -> dict[str, Any]:
    """Name -> the harness's task, as of `load_task`: one, or the members of a group."""
    from transformers import set_seed

    set_seed(seed)  # as lm_eval.simple_evaluate does, with one seed for all generators
    return {spec.name: load_task(spec, task, settings, seed) for spec in specs}


def load_task(spec: Spec, task: Task, settings: Evaluate, seed: int) -> Any:
    """The harness's task object, with the overrides of the config. May fetch data from the hub.

    Its attribute `code_eval` counts the answers whose code has run out of time.
    """
    from jinja2 import TemplateError
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    tasks.check_code(spec, settings.allow_code)
    code_eval = _CodeEval()
    # Reading the YAML imports its functions, and with them what scores code.
    with _in_place_of_evaluate(spec, code_eval) if spec.unsafe_code else contextlib.nullcontext():
        config: dict[str, Any] = load_yaml(spec.path)
    splits = task_files.local_splits(spec, settings.data_dir, task.num_fewshot)
    if splits:
        # A split that is named but has no file would be looked for.
        config |= {field: None for field in SPLITS if config.get(field) not in splits}
        # In place of dataset_path
        config |= {
            "dataset_kwargs": None,
            "custom_dataset": lambda **_: task_files.read_splits(splits),
        }
    # The harness explains custom_dataset, which the user did not write.
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)
    try:
        # Only this task: the index of all that the harness ships takes seconds.
        loaded = TaskManager(include_defaults=False).load(config)["tasks"][spec.name]
    except TemplateError as error:  # the harness renders the first row
        problem = f"the templates of the task {spec.name!r} do not fit its rows ({error})"
        raise task_error(problem, f"correct {spec.path}") from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise WorkError(
            f"the task {spec.name!r} did not load: {error}", field="evaluate.tasks"
        ) from error
    code_eval.timeouts = 0  # the harness's modules try their metric when they are imported
    loaded.code_eval = code_eval
    # The config's overrides; few-shot examples are drawn with the run's seed.
    if loaded.get_config("output_type") == "generate_until" and task.max_new_tokens is not None:
        loaded.set_config("generation_kwargs", {"max_gen_toks": task.max_new_tokens}, update=True)
    shots = loaded.get_config("num_fewshot") if task.num_fewshot is None else task.num_fewshot
    loaded.set_config("num_fewshot", shots or 0)
    loaded.set_fewshot_seed(seed)
    return loaded


class _CodeEval:
    """Hugging Face's metric code_eval, with every candidate run in the sandbox."""

    timeouts = 0  # answers whose code has run out of time: the harness's metrics return one number

    def compute(
        self, references: list[str], predictions: list[list[str]], k: list[int] | None = None
    ) -> tuple[dict[str, float], dict[int, Any]]:
        """The share of the candidates that pass their tests."""
        from ptl.sandbox import runner

        if k not in (None, [1]):
            raise task_error(f"pass@k with k={k} is not supported", "use a task with pass@1")
        passed = []
        for tests, candidates in zip(references, predictions, strict=True):
            outcomes = [runner.run_tests(candidate, tests) for candidate in candidates]
            self.timeouts += sum(outcome.status == "timeout" for outcome in outcomes)
            passed += [outcome.passed for outcome in outcomes]
        return {"pass@1": sum(passed) / len(passed)}, {}


@contextlib.contextmanager
def _in_place_of_evaluate(spec: Spec, code_eval: _CodeEval) -> Iterator[None]:
    """While a code task's module is imported, `evaluate.load("code_eval")` gives `code_eval` instead.

    The harness scores HumanEval and MBPP with Hugging Face's code_eval, which runs the answers in a child process with
    all of the parent's rights. Its tasks import it at module level under the name `evaluate`.
    """
    from ptl.sandbox import runner

    runner.require_support()
    substitute = types.ModuleType("evaluate")
    substitute.load = lambda name: code_eval  # type: ignore[attr-defined]
    # The task's own module has the metric of an earlier load.
    for name in [
        name for name in sys.modules if name.startswith(f"lm_eval.tasks.{spec.path.parent.name}.")
    ]:
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


@dataclass(frozen=True)
class TaskScore:
    """One benchmark. Metrics that are no share of right answers (perplexity) have neither interval nor items."""

    task: str  # name of the task or group
    version: str  # of the task's YAML
    metric: str  # metric,filter of lm-eval
    accuracy: float  # the metric's value: 0..1 for accuracies
    low: float | None  # interval of the accuracy
    high: float | None
    items: int  # that were scored
    num_fewshot: int  # examples before each item
    truncated: float  # share of the answers that hit the token limit
    higher_is_better: bool
    code_timeouts: int  # answers whose code ran out of time; they count as wrong
    cut_prompts: float  # share of the prompts whose beginning did not fit into the context
    answer_tokens: float  # mean length of the generated answers
    answer_tokens_p95: float  # their 95th percentile
    seconds: float  # in the model; divided by the right answers it is the time per solved problem
    # answers to each item; the accuracy is the share of them that are right (avg@n)
    samples: int = 1
    pass_at_n: float | None = None  # share of the items that at least one of several samples solves


class Pass(NamedTuple):
    """One answer to each item of a task: sample `number` of it."""

    number: int
    results: Any  # the harness's
    logged: list[tuple[Any, dict[str, Any]]]  # of each item the harness's task and what it logged
    notes: Mapping[str, AnswerNote]  # by prompt
    cut_prompts: int
    seconds: float


def score_task(
    lm: Any,  # of language_models.language_model
    task: Task,
    settings: Evaluate,
    *,
    seed: int,
) -> tuple[TaskScore, list[Item]]:
    """Score one task, or the pooled items of a group; no items where none is right or wrong."""
    specs = tasks.find(task.name)
    first = specs[0]
    name = tasks.score_name(task)
    loaded = load_tasks(specs, task, settings, seed)
    metric, extraction = tasks.choose_metric(first, task.metric)
    passes = list(_passes(lm, loaded, task, settings, extraction, seed))

    # Of each item what was logged of each sample, and the metric's values
    logged = list(zip(*(one.logged for one in passes), strict=True))
    values = [[sample[metric] for _, sample in samples] for samples in logged]
    # Right and wrong answers; or a metric of the whole task.
    items: list[Item] = []
    low = high = pass_at_n = None
    if all(value in (0, 1) for item in values for value in item):
        right = [item.count(1) for item in values]
        accuracy = sum(right) / (len(right) * task.samples)
        low, high = interval(right, task.samples, settings.confidence)
        pass_at_n = sum(count > 0 for count in right) / len(right) if task.samples > 1 else None
        for samples in logged:
            for (harness_task, sample), its in zip(samples, passes, strict=True):
                items.append(_item_record(name, harness_task, sample, metric, its))
    elif len(specs) > 1:
        raise task_error(
            f"the group {task.name!r} has no accuracy to pool", "name its tasks one by one"
        )
    else:
        accuracy = fmean(
            float(one.results["results"][first.name][f"{metric},{extraction}"]) for one in passes
        )

    # The direction and examples of a group are those of its members.
    results = passes[0].results
    notes = [note for one in passes for note in one.notes.values()]
    score = TaskScore(
        task=name,
        version=", ".join(sorted({str(results["versions"][spec.name]) for spec in specs})),
        metric=f"{metric},{extraction}",
        accuracy=accuracy,
        low=low,
        high=high,
        items=len(values),
        num_fewshot=int(results["n-shot"][first.name]),
        truncated=sum(note.truncated for note in notes) / max(len(notes), 1),
        higher_is_better=bool(results["higher_is_better"][first.name].get(metric, True)),
        code_timeouts=sum(harness_task.code_eval.timeouts for harness_task in loaded.values()),
        answer_tokens=sum(note.tokens for note in notes) / max(len(notes), 1),
        answer_tokens_p95=float(np.percentile([note.tokens for note in notes] or [0], 95)),
        cut_prompts=sum(one.cut_prompts for one in passes) / (len(values) * task.samples),
        seconds=sum(one.seconds for one in passes),
        samples=task.samples,
        pass_at_n=pass_at_n,
    )
    return score, items


def _passes(
    lm: Any, loaded: dict[str, Any], task: Task, settings: Evaluate, extraction: str, seed: int
) -> Iterator[Pass]:
    """The task as often as it has samples: the filters of most tasks keep one of the harness's own repeats."""
    from lm_eval.evaluator import evaluate

    for harness_task in loaded.values():
        # Before the first answer is generated.
        if harness_task.get_config("output_type") == "generate_until":
            answer = task_files.answer_tokens(harness_task.get_config("generation_kwargs"))
            tasks.check_room(harness_task.task_name, answer, lm.max_length)
        if task.samples > 1:
            sampling = {"do_sample": True, **(lm.sampling or PLAIN_SAMPLING)}
            harness_task.set_config("generation_kwargs", sampling, update=True)
    for number in range(task.samples):
        lm.seed = seed_of_sample(seed, task.samples, number)
        for harness_task in loaded.values():
            harness_task.set_fewshot_seed(seed)
        # What is noted is of this pass alone.
        lm.start_notes()
        results: Any = evaluate(
            lm=lm,
            task_dict={"tasks": loaded},
            limit=task.limit,
            bootstrap_iters=0,  # its standard errors are not used
            apply_chat_template=lm.chat.enabled,
            fewshot_as_multiturn=lm.chat.enabled,
            confirm_run_unsafe_code=settings.allow_code,
        )
        # Every item is logged once for each filter that extracts an answer.
        logged = [
            (loaded[member], sample)
            for member in loaded
            for sample in results["samples"][member]
            if sample["filter"] == extraction
        ]
        yield Pass(number, results, logged, lm.notes, lm.cut_prompts, lm.seconds)


def _item_record(
    task: str, harness_task: Any, sample: dict[str, Any], metric: str, of_pass: Pass
) -> Item:
    """One line of items.jsonl from a sample that the harness logged."""
    prompt = sample["arguments"][0][0]
    # choices are not generated: they have no note
    note = of_pass.notes.get(prompt, AnswerNote(0, False))
    answer = sample["resps"][0][0]
    if not isinstance(answer, str):  # log-likelihoods of the choices
        likelihoods = [response[0][0] for response in sample["resps"]]
        answer = _likeliest(likelihoods, harness_task, sample["doc"], metric)
    item_id = str(sample["doc_id"])
    # The members of a group all count from 0.
    if harness_task.task_name != task:
        item_id = f"{harness_task.task_name}/{item_id}"
    return {
        "task": task,
        "id": item_id,
        "sample": of_pass.number,
        "prompt_digest": sample["prompt_hash"],
        "correct": int(sample[metric]),
        "prompt": str(harness_task.doc_to_text(sample["doc"])),  # without few-shot examples
        "thought": note.thought,
        "answer": answer,
        "target": sample["target"],
        "tokens": note.tokens,
        "truncated": note.truncated,
    }


def _likeliest(likelihoods: list[float], harness_task: Any, doc: Any, metric: str) -> int:
    """The choice that the metric takes for the answer, by what lm_eval.api.task.ConfigurableTask compares."""
    if harness_task.get_config("output_type") != "multiple_choice":
        return likelihoods.index(max(likelihoods))
    choices = harness_task.doc_to_choice(doc)
    # Of acc_mutual_info, those without the question follow.
    compared, alone = likelihoods[: len(choices)], likelihoods[len(choices) :]
    if metric == "acc_mutual_info":
        compared = [value - without for value, without in zip(compared, alone, strict=True)]
    elif metric in ("acc_norm", "acc_bytes"):  # per character, per byte
        texts = choices if metric == "acc_norm" else map(str.encode, choices)
        compared = [value / len(text) for value, text in zip(compared, texts, strict=True)]
    return compared.index(max(compared))
