"""One benchmark by lm-evaluation-harness: its score with an interval, and the outcome of every item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ptl.config.run import Evaluate, Task
from ptl.errors import InputError
from ptl.evaluation import task_loading, tasks
from ptl.evaluation.helpers import AnswerNote
from ptl.evaluation.paired import Item, wilson


@dataclass(frozen=True)
class TaskScore:
    """One benchmark. Metrics that are no share of right answers (perplexity) have neither interval nor items."""

    task: str  # name of the task or group
    version: str  # of the task's YAML
    metric: str  # metric,filter of lm-eval
    accuracy: float  # the metric's value: 0..1 for accuracies
    low: float | None  # Wilson interval of the accuracy
    high: float | None
    items: int  # that were scored
    num_fewshot: int  # examples before each item
    truncated: float  # share of the answers that hit the token limit
    higher_is_better: bool
    code_timeouts: int  # answers whose code ran out of time; they count as wrong
    cut_prompts: float  # share of the prompts whose beginning did not fit into the context
    answer_tokens: float  # mean length of the generated answers
    seconds: float  # in the model; divided by the right answers it is the time per solved problem


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
    loaded = task_loading.load_tasks(specs, task, settings, seed)
    results = _run_harness(lm, loaded, task, settings)

    metric, extraction = tasks.choose_metric(first, task.metric)
    # Every sample is logged once for each filter that extracts an answer.
    samples = [
        (loaded[member], sample)
        for member in loaded
        for sample in results["samples"][member]
        if sample["filter"] == extraction
    ]
    values = [sample[metric] for _, sample in samples]
    # Right and wrong answers; or a metric of the whole task.
    items: list[Item] = []
    low = high = None
    if all(value in (0, 1) for value in values):
        correct = values.count(1)
        accuracy = correct / len(values)
        low, high = wilson(correct, len(values), settings.confidence)
        items = [_item_record(name, harness_task, sample, metric, lm.notes) for harness_task, sample in samples]
    elif len(specs) > 1:
        raise InputError(
            f"the group {task.name!r} has no accuracy to pool",
            field="evaluate.tasks",
            remedy="name its tasks one by one",
        )
    else:
        accuracy = float(results["results"][first.name][f"{metric},{extraction}"])

    # The direction and examples of a group are those of its members.
    notes = lm.notes.values()
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
        cut_prompts=lm.cut_prompts / len(values),
        seconds=lm.seconds,
    )
    return score, items


def _run_harness(lm: Any, loaded: dict[str, Any], task: Task, settings: Evaluate) -> Any:
    """The harness's results, with the samples it logged."""
    from lm_eval.evaluator import evaluate

    # Before the first answer is generated.
    for harness_task in loaded.values():
        task_loading.check_lengths(lm, harness_task)
    # What is noted is of this task alone.
    lm.start_notes()
    return evaluate(
        lm=lm,
        task_dict={"tasks": loaded},
        limit=task.limit,
        bootstrap_iters=0,  # its standard errors are not used
        apply_chat_template=settings.chat_template,
        fewshot_as_multiturn=settings.chat_template,
        confirm_run_unsafe_code=settings.allow_code,
    )


def _item_record(
    task: str,
    harness_task: Any,
    sample: dict[str, Any],
    metric: str,
    notes: dict[str, AnswerNote],  # by prompt
) -> Item:
    """One line of items.jsonl from a sample that the harness logged."""
    prompt = sample["arguments"][0][0]
    note = notes.get(prompt, AnswerNote(0, False))  # choices are not generated: they have no note
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
        "prompt_digest": sample["prompt_hash"],
        "correct": int(sample[metric]),
        "prompt": str(harness_task.doc_to_text(sample["doc"])),  # without few-shot examples
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
