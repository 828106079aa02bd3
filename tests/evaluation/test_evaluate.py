import gzip
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from ptl.config.run import Evaluate, Gate, Speed, Task
from ptl.errors import InputError, WorkError
from ptl.evaluation import language_models
from ptl.evaluation.evaluate import ITEMS, SCORES, evaluate_checkpoint, read_items, write_items
from ptl.evaluation.helpers import AnswerNotes, Helper, Share, divided, visible_gpu
from ptl.evaluation.language_models import language_model, tensor_parallel
from ptl.evaluation.paired import wilson
from ptl.evaluation.task_files import local_splits
from ptl.evaluation.tasks import check_gate, check_tasks, choose_metric, files, find

ROOT = Path(__file__).resolve().parents[2]
REASONER = ROOT / "examples/tiny_reasoner/checkpoint"
YAML = str(ROOT / "examples/tiny_reasoner/tiny_reasoner.yaml")
DATA = Path(os.environ.get("PTL_SHARED_DATA") or ROOT.parent / "shared/data")
LIMIT = 60

pytestmark = pytest.mark.usefixtures("one_thread")
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"benchmark data not at {DATA}: set PTL_SHARED_DATA to the folder that has it"
)


def settings(*tasks, **more):
    return Evaluate(tasks=[Task(**task) for task in tasks], speed=Speed(repeats=0), **more)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    dst = tmp_path_factory.mktemp("scored")
    return evaluate_checkpoint(REASONER, dst, settings({"name": YAML, "limit": LIMIT}), seed=0), dst


@pytest.mark.slow
def test_two_processes_give_the_same_items_as_one(scored, tmp_path):
    wanted = settings({"name": YAML, "limit": LIMIT}, processes=2)
    scores = evaluate_checkpoint(REASONER, tmp_path, wanted, seed=0)
    one, dst = scored
    assert read_items(tmp_path) == read_items(dst)
    assert replace(scores.tasks[0], seconds=0) == replace(one.tasks[0], seconds=0)


def test_a_helper_that_is_killed_is_an_error():
    helper = Helper(partial(language_model, REASONER, settings({"name": YAML})), 1)
    helper._process.kill()
    with pytest.raises(WorkError, match="process 1 of those that answer failed: exit code -9; see its output"):
        helper.share()
    with pytest.raises(WorkError, match="exit code -9"):
        helper.check()  # as between two batches of this process
    helper.close()


def test_a_helper_at_work_is_ended_at_once_and_without_a_traceback(capfd):
    helper = Helper(partial(language_model, REASONER, settings({"name": YAML})), 1)
    helper.check()
    started = time.monotonic()
    helper.close()  # it is still importing the harness, which takes longer
    assert time.monotonic() - started < 1 and capfd.readouterr().err == ""


def test_all_choices_of_a_context_go_to_one_process():
    choices = [(f"question {number}", letter) for number in range(5) for letter in [" A", " B", " C", " D"]]
    assert [len(share) for share in divided(choices, 2)] == [12, 8]
    first, _ = divided(choices, 2)
    assert {choices[position][0] for position in first} == {"question 0", "question 2", "question 4"}
    assert divided([("", "a"), ("", "b"), ("", "c")], 2) == [[0, 2], [1]]  # without a context
    assert divided([("a",)], 3) == [[0], [], []]


def test_answers_keep_the_order_of_the_requests():
    class Counting:
        """A model of the harness that answers with the request, and counts."""

        def loglikelihood(self, requests):
            self.asked = [request.args for request in requests]
            return self.asked

    class Idle(Helper):
        def __init__(self):
            pass

        def ask(self, method, arguments):
            self.asked = arguments

        def share(self):
            return Share(self.asked, {}, 0)

    class Model(AnswerNotes, Counting):
        helpers = (Idle(), Idle())

    model = Model()
    model.start_notes()
    requests = [SimpleNamespace(args=(context, choice)) for choice in "AB" for context in "xyz"]
    assert model.loglikelihood(requests) == [request.args for request in requests]
    assert model.asked == [("x", "A"), ("x", "B")]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, "1"), ("", ""), ("-1", ""), ("4,6", "6"), ("0,-1,1", ""), ("GPU-a, GPU-b", "GPU-b")],
)
def test_a_helper_has_the_second_gpu_of_those_that_are_visible(visible, expected):
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert visible_gpu(1, environment) == expected


def test_vllm_divides_a_model_over_as_many_gpus_as_its_heads_allow(tmp_path):
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 60}
    raw = json.loads((REASONER / "config.json").read_text()) | sizes | {"hidden_size": 192, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert [tensor_parallel(tmp_path, gpus) for gpus in (0, 1, 2, 3, 5, 8)] == [1, 1, 2, 2, 4, 6]


@pytest.fixture
def data_dir(tmp_path):
    """Two rows of each benchmark, in its own fields."""
    rows = {
        "gsm8k_test.jsonl": [
            {"question": "1+1?", "answer": "<<1+1=2>>\n#### 2"},
            {"question": "2?", "answer": "#### 2"},
        ],
        "math500.jsonl": [{"problem": "Half?", "answer": "\\frac{1}{2}", "level": 1}] * 2,
        "mbpp.jsonl": [
            {
                "task_id": i,
                "text": "Add.",
                "code": "",
                "test_list": ["assert add(1, 2) == 3"] * 3,
                "test_setup_code": "",
            }
            for i in (2, 11, 12, 600)
        ],
        "wikitext/test.jsonl": [{"page": " = Hills = \n the hills are old"}, {"page": "a river runs"}],
        "arc_easy/test.jsonl": [
            {"question": "Day?", "choices": {"text": ["sun", "moon"], "label": ["A", "B"]}, "answerKey": key}
            for key in "AB"
        ],
    }
    for name, lines in rows.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in lines))
    ending = {"ind": 1, "activity_label": "Tea", "ctx_a": "Eva boils water.", "ctx_b": "she", "label": "0"}
    (tmp_path / "hellaswag").mkdir()
    (tmp_path / "hellaswag/validation.jsonl").write_text(
        json.dumps(ending | {"endings": ["pours it.", "sings."]}) + "\n"
    )
    human = {"task_id": "HumanEval/0", "prompt": "def add(a, b):\n", "entry_point": "add", "canonical_solution": ""}
    human["test"] = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(human) + "\n")
    return tmp_path


def test_scores_of_the_tiny_reasoner(scored):
    scores, dst = scored
    (task,) = scores.tasks
    assert (task.task, task.version, task.metric) == ("tiny_reasoner", "1.0", "exact_match,final-number")
    assert (task.items, task.num_fewshot, task.truncated) == (LIMIT, 0, 0.0)
    assert task.accuracy >= 0.95
    assert (task.low, task.high) == wilson(round(task.accuracy * LIMIT), LIMIT)
    assert 5 < task.answer_tokens < 60
    assert scores.bytes == sum(path.stat().st_size for path in REASONER.glob("*.safetensors"))
    written = json.loads((dst / SCORES).read_text())
    assert written | {"seconds": scores.seconds, "tasks": []} == json.loads(json.dumps(asdict(scores))) | {"tasks": []}
    assert written["tasks"] == [{name: value for name, value in asdict(task).items() if name != "seconds"}]


def test_every_item_has_its_outcome(scored):
    scores, dst = scored
    items = read_items(dst)
    assert len({item["id"] for item in items}) == len({item["prompt_digest"] for item in items}) == LIMIT
    assert sum(item["correct"] for item in items) == round(scores.tasks[0].accuracy * LIMIT)
    for item in items:
        last = item["answer"].strip().splitlines()[-1]
        assert item["correct"] == int(last == f"#### {item['target']}")
        assert item["prompt"].endswith("?\n")
    assert (dst / ITEMS).read_text().count("\n") == LIMIT


def test_items_agree_with_the_harness_itself(scored):
    """Same prompts, same answers, same extraction, same outcomes as `lm_eval` run plainly."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    plain = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(REASONER)},
        tasks=[YAML],
        limit=LIMIT,
        batch_size=64,
        device="cpu",
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    scores, dst = scored
    theirs = plain["samples"]["tiny_reasoner"]
    assert plain["results"]["tiny_reasoner"]["exact_match,final-number"] == scores.tasks[0].accuracy
    for sample, item in zip(theirs, read_items(dst), strict=True):
        assert (sample["prompt_hash"], sample["resps"][0][0]) == (item["prompt_digest"], item["answer"])
        assert (sample["exact_match"], sample["target"]) == (item["correct"], item["target"])


def test_answers_that_hit_the_token_limit_are_counted(tmp_path):
    scores = evaluate_checkpoint(REASONER, tmp_path, settings({"name": YAML, "limit": 4, "max_new_tokens": 3}), seed=0)
    assert scores.tasks[0].truncated == 1.0
    assert scores.tasks[0].answer_tokens == 3
    assert scores.tasks[0].accuracy == 0
    assert all(item["truncated"] and item["tokens"] == 3 for item in read_items(tmp_path))


def test_prompts_that_do_not_fit_are_counted(tmp_path):
    wanted = settings({"name": YAML, "limit": 4, "max_new_tokens": 3}, max_length=20)
    assert evaluate_checkpoint(REASONER, tmp_path, wanted, seed=0).tasks[0].cut_prompts == 1.0
    with pytest.raises(InputError, match="may be 60 tokens long, but the model's context is 20"):
        evaluate_checkpoint(REASONER, tmp_path, settings({"name": YAML, "limit": 4}, max_length=20), seed=0)


def test_group_is_pooled_into_one_score(tmp_path, monkeypatch):
    """The harness's own groups need the hub, so the lookup is replaced: two members with the tiny problems."""
    from ptl.evaluation import language_models, scoring, tasks

    for name in ("part_a", "part_b"):
        (tmp_path / f"{name}.yaml").write_text(f"include: {YAML}\ntask: {name}\n")
    members = [spec for name in ("part_a", "part_b") for spec in find(str(tmp_path / f"{name}.yaml"))]
    monkeypatch.setattr(tasks, "find", lambda _: members)
    wanted = settings({"name": "both", "limit": 5})
    lm = language_models.language_model(REASONER, wanted)
    score, items = scoring.score_task(lm, wanted.tasks[0], wanted, seed=0)
    assert (score.task, score.items, score.cut_prompts) == ("both", 10, 0.0)
    assert {item["task"] for item in items} == {"both"}
    assert [item["id"] for item in items][::5] == ["part_a/0", "part_b/0"]


def test_retention_suite_from_local_files(tmp_path, data_dir):
    """A perplexity has no interval and no items; multiple choice has both."""
    tasks = [{"name": "wikitext", "metric": "word_perplexity"}, {"name": "arc_easy", "metric": "acc"}]
    tasks += [{"name": "hellaswag", "metric": "acc_norm"}]
    scores = evaluate_checkpoint(REASONER, tmp_path / "out", settings(*tasks, data_dir=str(data_dir)), seed=0)
    wikitext, arc, hellaswag = scores.tasks
    assert wikitext.accuracy > 1
    assert (wikitext.low, wikitext.high, wikitext.items, wikitext.higher_is_better) == (None, None, 2, False)
    assert 0 <= arc.low <= arc.accuracy <= arc.high <= 1
    items = read_items(tmp_path / "out")
    assert [item["task"] for item in items] == ["arc_easy", "arc_easy", "hellaswag"]
    assert sum(item["correct"] for item in items[:2]) == round(2 * arc.accuracy)
    assert (hellaswag.items, hellaswag.accuracy) == (1, items[2]["correct"])
    assert items[2]["prompt"] == "Tea: Eva boils water. She"
    # Without a model the same items, and the name of the task that has none.
    assert write_items(tmp_path / "items", settings(*tasks, data_dir=str(data_dir)), seed=0) == 3
    assert questions(tmp_path / "items") == [("wikitext", None, None), *questions(tmp_path / "out")]


def questions(folder):
    """Task, prompt and target of the lines of an items.jsonl."""
    return [
        (item["task"], item.get("prompt"), str(item["target"]) if "target" in item else None)
        for item in read_items(folder)
    ]


def test_the_items_that_are_scored_are_known_without_a_model(scored, tmp_path, monkeypatch):
    monkeypatch.setattr(language_models, "language_model", None)
    assert write_items(tmp_path, settings({"name": YAML, "limit": LIMIT}), seed=0) == LIMIT
    assert questions(tmp_path) == questions(scored[1])


@pytest.mark.parametrize(
    "name, metric, version, shots, items",
    [("gsm8k_cot", "exact_match,flexible-extract", "3.0", 8, 2), ("minerva_math500", "math_verify", "3.1", 4, 2)],
)
def test_reasoning_benchmarks_from_local_files(tmp_path, data_dir, name, metric, version, shots, items):
    wanted = settings(
        {"name": name, "metric": metric, "max_new_tokens": 2}, data_dir=str(data_dir), max_length=8192, batch_size=2
    )
    (task,) = evaluate_checkpoint(REASONER, tmp_path / "out", wanted, seed=0).tasks
    assert (task.version, task.num_fewshot, task.items) == (version, shots, items)
    assert task.metric.startswith(metric)


def graded(name, data_dir, answer):
    """What the harness's own task makes of an answer to its first item."""
    return loaded_and_graded(name, data_dir, answer)[1]


def loaded_and_graded(name, data_dir, answer):
    from ptl.evaluation import scoring

    wanted = settings({"name": name, "metric": "acc"}, data_dir=str(data_dir), allow_code=True)
    task = scoring.load_task(find(name)[0], wanted.tasks[0], wanted, seed=0)
    task.build_all_requests(limit=1)
    (instance,) = task.instances
    instance.resps.append(answer)
    task.apply_filters()
    (filtered,) = instance.filtered_resps.values()
    return task, next(iter(task.process_results(instance.doc, [filtered]).values()))


@pytest.mark.parametrize(
    "answer, score",
    [
        ("Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.", 1),
        ("Final Answer: The final answer is $\\frac{1}{3}$. I hope it is correct.", 0),
        ("one half", 0),
    ],
)
def test_math_answers_are_graded(data_dir, answer, score):
    assert graded("minerva_math500", data_dir, answer) == score


@pytest.mark.parametrize(
    "name, answer, score",
    [
        ("humaneval", "    return a + b\n", 1),
        ("humaneval", "    return a - b\n", 0),
        ("humaneval", "    return (\n", 0),
        ("mbpp", "def add(a, b):\n    return a + b\n", 1),
        ("mbpp", "def add(a, b):\n    return 0\n", 0),
        ("mbpp", "no code", 0),
    ],
)
def test_code_answers_are_graded_in_the_sandbox(data_dir, monkeypatch, name, answer, score):
    from ptl.sandbox import runner

    seen = []
    real = runner.run_tests
    monkeypatch.setattr(runner, "run_tests", lambda *given: seen.append(given) or real(*given))
    assert graded(name, data_dir, answer) == score
    assert any(answer in candidate for candidate, _ in seen)


def test_answers_whose_code_runs_out_of_time_are_counted(data_dir, monkeypatch):
    from ptl.sandbox import runner

    monkeypatch.setattr(runner, "run_tests", lambda *given: runner.Outcome(False, "timeout", "more than 5 s"))
    for _ in range(2):  # each loaded task counts its own
        task, share = loaded_and_graded("humaneval", data_dir, "    return a + b\n")
        assert (share, task.code_eval.timeouts) == (0, 1)


def test_code_benchmarks_are_opt_in(data_dir):
    with pytest.raises(InputError, match=r"evaluate\.allow_code: the task 'humaneval' runs code"):
        check_tasks(settings({"name": "humaneval", "metric": "pass@1"}, data_dir=str(data_dir)))


def test_tasks_that_run_code_by_other_means_are_refused(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("task: own\nunsafe_code: true\noutput_type: generate_until\n")
    with pytest.raises(InputError, match="outside the sandbox"):
        check_tasks(settings({"name": str(path)}, allow_code=True))


@pytest.mark.parametrize(
    "line",
    [
        "doc_to_text: !function utils.ask",
        "metric_list: [{metric: !function utils.score}]",
        "metric_list: [{metric: score}]",  # code of this name would be fetched from the hub
    ],
)
def test_a_task_file_with_code_of_its_own_is_refused_unless_allowed(tmp_path, line):
    ran = tmp_path / "ran"
    (tmp_path / "utils.py").write_text(f"open({str(ran)!r}, 'w')\nask = score = str\n")
    (tmp_path / "base.yaml").write_text(f"include: {YAML}\n{line}\n")
    path = tmp_path / "own.yaml"
    path.write_text("include: base.yaml\ntask: own\n")
    task = {"name": str(path), "metric": "score" if "metric" in line else "exact_match"}
    for refuses in (check_tasks, lambda wanted: evaluate_checkpoint(REASONER, tmp_path / "out", wanted, seed=0)):
        with pytest.raises(InputError, match=rf"evaluate\.allow_code: {path} has .*(!function utils\.|score)"):
            refuses(settings(task))
    check_tasks(settings(task, allow_code=True))
    check_tasks(settings({"name": "minerva_math500", "metric": "math_verify"}))
    assert not ran.exists()


def test_the_files_of_a_task_are_what_it_reads(tmp_path):
    """Its data, what it includes, and the code of functions; nothing else that is next to them."""
    for name in ("utils.py", "log.txt", "plain.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "base.yaml").write_text(f"include: {YAML}\n")
    own = tmp_path / "own.yaml"
    own.write_text("include: base.yaml\ntask: own\n")
    data = {Path(YAML), ROOT / "examples/tiny_reasoner/test.jsonl"}
    assert files(settings({"name": str(own)})) >= data | {own, tmp_path / "base.yaml"}
    assert tmp_path / "utils.py" not in files(settings({"name": str(own)}))
    own.write_text("include: base.yaml\ntask: own\nprocess_docs: !function utils.ask\n")
    mine = {path.name for path in files(settings({"name": str(own)})) if path.parent == tmp_path}
    assert mine == {"own.yaml", "base.yaml", "utils.py"}
    # The harness's own come with the image, their data from the hub, unless it is in a folder.
    assert files(settings({"name": "gsm8k"})) == set()
    for name in ("gsm8k_test.jsonl", "gsm8k_train.jsonl", "other.jsonl"):
        (tmp_path / name).touch()
    read = files(settings({"name": "gsm8k"}, data_dir=str(tmp_path)))
    assert {path.name for path in read} == {"gsm8k_test.jsonl", "gsm8k_train.jsonl"}


REPLACED = {
    "by-a-later-field": "process_docs: !function utils.ask\nprocess_docs: null\n",
    "by-the-including-file": "include: base.yaml\nprocess_docs: null\n",
    "as-a-name": "? !function utils.ask\n: text\n",
    "in-a-merge": "metadata: {<<: {a: !function utils.ask}, a: 1}\n",
}


@pytest.mark.parametrize("case", REPLACED)
def test_a_function_of_a_task_file_that_no_field_keeps_is_refused_too(tmp_path, case):
    """The harness imports it while it reads the file."""
    (tmp_path / "base.yaml").write_text("process_docs: !function utils.ask\n")
    path = tmp_path / "own.yaml"
    path.write_text(f"task: own\noutput_type: generate_until\n{REPLACED[case]}")
    with pytest.raises(InputError, match=r"code that would run with all rights|appears twice"):
        check_tasks(settings({"name": str(path)}))


NO_TASK = {
    "metric-without-a-name": "metric_list: [{aggregation: mean}]",
    "metric-that-is-a-text": "metric_list: acc",
    "filters-that-are-texts": "filter_list: [first]",
    "unknown-output-type": "output_type: essay",
    "output-type-that-is-a-list": "output_type: [generate_until]",
    "dataset-kwargs-that-are-a-number": "dataset_kwargs: 5",
    "split-that-is-a-number": "test_split: 5",
    "include-that-is-a-number": "include: 5",
    "deep": "x: " + "[" * 3000 + "]" * 3000,
    "wrong-date": "x: 2026-13-01",
    "endless-aliases": "a: &a [x, x]\n"
    + "".join(f"a{i}: &a{i} [*a{i - 1 or ''}, *a{i - 1 or ''}]\n" for i in range(1, 25)),
}


@pytest.mark.parametrize("case", NO_TASK)
def test_a_task_file_that_is_no_task_is_refused(tmp_path, case):
    path = tmp_path / "own.yaml"
    path.write_text(f"task: own\n{NO_TASK[case]}\n")
    with pytest.raises(InputError, match=rf"evaluate\.tasks: {path}"):
        check_tasks(settings({"name": str(path)}))


def test_a_template_of_a_task_cannot_reach_python():
    from jinja2.exceptions import SecurityError
    from lm_eval.utils import apply_template

    from ptl.evaluation.language_models import cache_templates

    cache_templates()
    assert apply_template("{{a | regex_replace('x', 'y')}}\n", {"a": "x"}) == "y\n"
    with pytest.raises(SecurityError):
        apply_template("{{ ''.__class__.__mro__[1].__subclasses__() }}", {})


@pytest.mark.parametrize(("metric", "answer"), [("acc", 0), ("acc_norm", 1), ("acc_bytes", 2), ("acc_mutual_info", 3)])
def test_the_stored_answer_is_the_one_that_the_metric_takes(metric, answer):
    """The defect: it was always that of `acc`, so that a right item could show a wrong answer."""
    from types import SimpleNamespace

    from lm_eval.api.task import ConfigurableTask

    from ptl.evaluation.scoring import _likeliest

    choices = ["ab", "abcdefgh", "éééééé", "abc"]
    conditional, alone = [-4.0, -8.0, -6.5, -9.0], [-4.0, -8.0, -6.0, -14.0]
    likelihoods = [*conditional, *alone] if metric == "acc_mutual_info" else conditional
    names = {"acc": 1, "acc_norm": 1, "acc_bytes": 1, "acc_mutual_info": 1}

    class Loaded(ConfigurableTask):  # the harness's own arithmetic, without its data
        def __init__(self):
            self.OUTPUT_TYPE, self.multiple_input, self.multiple_target = "multiple_choice", 0, 0
            self._config = SimpleNamespace(process_results=None)
            self._metric_fn_list = {name: None for name in names if name != "acc_mutual_info" or "mutual" in metric}

        def get_config(self, key):
            return self.OUTPUT_TYPE

        def doc_to_choice(self, doc):
            return choices

        def doc_to_target(self, doc):
            return doc["gold"]

    loaded = Loaded()
    chosen = _likeliest(likelihoods, loaded, {}, metric)
    results = [(value, False) for value in likelihoods]
    right = [loaded.process_results({"gold": i}, results)[metric] for i in range(4)]
    assert right.index(1.0) == chosen == answer


def test_equal_evaluations_give_equal_bytes(tmp_path, monkeypatch):
    """The defect: scores.json had the seconds, and so had the digest of every evaluation."""
    for name in "ab":
        evaluate_checkpoint(REASONER, tmp_path / name, settings({"name": YAML, "limit": 2}), seed=0)
    for file in (ITEMS, SCORES):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert json.loads((tmp_path / "a" / SCORES).read_text())["tasks"][0]["items"] == 2


@pytest.mark.parametrize(
    "task, message",
    [
        ({"name": "gsm8k_cott"}, "close names: .*gsm8k_cot"),
        ({"name": "nowhere/task.yaml"}, "no task file .*nowhere/task.yaml, .*; .* relative to the config's folder"),
        ({"name": "gsm8k_cot", "metric": "acc"}, "no metric 'acc'; set the task's `metric` to one .*: exact_match"),
        ({"name": "humaneval"}, r"no metric 'exact_match' \(the default of `metric`\); .*: pass@1"),
        ({"name": "FILL-IN"}, "FILL-IN is still to be filled in; name a task"),
        ({"name": "gsm8k_cot", "metric": "exact_match,loose"}, "no filter 'loose'; use one of: strict-match, flexible"),
        ({"name": YAML, "num_fewshot": 3}, "has no few-shot examples"),
    ],
)
def test_wrong_tasks_and_metrics_are_named_with_what_exists(task, message):
    with pytest.raises(InputError, match=message):
        check_tasks(settings(task))


@pytest.mark.parametrize(
    "text, message", [("task: [", "not valid YAML"), ("- a", "must hold a mapping"), ("a: b", "no `task")]
)
def test_broken_task_files_are_named(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        check_tasks(settings({"name": str(path)}))


@pytest.mark.parametrize(
    ("task", "accuracy"),
    [
        ({"name": "gsm8k_cot"}, True),
        ({"name": "minerva_math", "metric": "math_verify"}, True),
        ({"name": "humaneval", "metric": "pass@1"}, True),
        ({"name": "mbpp", "metric": "pass_at_1"}, True),
        ({"name": "arc_easy", "metric": "acc_norm"}, True),
        ({"name": YAML}, True),
        ({"name": "wikitext", "metric": "word_perplexity"}, False),
        ({"name": "lambada_openai", "metric": "perplexity"}, False),
        ({"name": "lambada_openai", "metric": "acc"}, True),
        ({"name": "truthfulqa_gen", "metric": "bleu_max"}, True),  # a mean of BLEU: only the scores will tell
    ],
)
def test_the_gate_needs_a_first_task_with_right_and_wrong(task, accuracy):
    wanted = settings(task, {"name": "hellaswag", "metric": "acc"})
    check_gate(wanted, Gate())
    if accuracy:
        check_gate(wanted, Gate(enabled=True))
    else:
        said = rf"gate\.enabled: true, but evaluate\.tasks\.0 \('{task['name']}'\) is judged by '{task['metric']}'"
        with pytest.raises(InputError, match=said):
            check_gate(wanted, Gate(enabled=True))


def test_a_task_listed_twice_is_refused():
    with pytest.raises(InputError, match="listed twice"):
        check_tasks(settings({"name": "gsm8k_cot"}, {"name": "gsm8k_cot"}))


def test_wrong_task_costs_no_model(tmp_path):
    with pytest.raises(InputError, match="no_such_task"):
        evaluate_checkpoint(tmp_path / "no-model", tmp_path / "out", settings({"name": "no_such_task"}), seed=0)


def test_missing_local_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"has no gsm8k_test\.jsonl"):
        local_splits(find("gsm8k_cot")[0], str(tmp_path))
    (tmp_path / "gsm8k_test.jsonl").write_text("{}\n")
    assert set(local_splits(find("gsm8k_cot")[0], str(tmp_path))) == {"test"}
    with pytest.raises(InputError, match=r"has no gsm8k_train\.jsonl"):  # its few-shot examples
        local_splits(find("gsm8k")[0], str(tmp_path))


def test_malformed_local_line_is_named(tmp_path):
    from ptl.evaluation.task_files import LocalFile, read_splits

    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2"):
        read_splits({"test": LocalFile(str(path))})


def test_task_yaml_finds_its_data_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (local,) = local_splits(find(YAML)[0], None).values()
    assert Path(local.file) == ROOT / "examples/tiny_reasoner/test.jsonl"


def test_group_is_its_members():
    names = [spec.name for spec in find("minerva_math")]
    assert len(names) == 7
    assert "minerva_math_algebra" in names


def test_metric_may_name_a_filter():
    spec = find("gsm8k_cot")[0]
    assert choose_metric(spec, "exact_match") == ("exact_match", "strict-match")
    assert choose_metric(spec, "exact_match,flexible-extract") == ("exact_match", "flexible-extract")


def test_check_imports_neither_torch_nor_the_harness():
    code = (
        "import sys; from ptl.config.run import Evaluate; from ptl.evaluation.tasks import check_tasks; "
        "check_tasks(Evaluate(tasks=[{'name': 'gsm8k_cot'}])); "
        "print(sorted({'torch', 'lm_eval', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@needs_data
@pytest.mark.parametrize(
    "name, items", [("gsm8k_cot", 1319), ("minerva_math500", 500), ("humaneval", 164), ("mbpp", 500)]
)
def test_real_benchmark_files_give_every_item(name, items):
    from ptl.evaluation import scoring

    wanted = settings({"name": name}, data_dir=str(DATA), allow_code=True)
    task = scoring.load_task(find(name)[0], wanted.tasks[0], wanted, seed=0)
    assert len(task.eval_docs) == items
    task.build_all_requests(limit=2)
    assert len(task.instances[0].args[0]) > 100


def mock_vllm(monkeypatch):
    """A mock of the harness's vLLM model: it answers at once, and its second answer hits the limit."""
    from types import ModuleType, SimpleNamespace

    class VLLM:
        def __init__(self, **given):
            self.given, self.max_length = given, 10

        def _model_generate(self, requests, generate=False, sampling_params=None):
            ends = ["stop", "length"]
            answers = [SimpleNamespace(token_ids=[5] * 3, finish_reason=end) for end in ends]
            return [SimpleNamespace(outputs=[answer]) for answer in answers]

        def generate_until(self, requests):
            params = [SimpleNamespace(max_tokens=4)] * 2
            self._model_generate([[1, 2], [1] * 6], generate=True, sampling_params=params)
            for request in requests:
                self.cache_hook.add_partial("generate_until", request.args, "x")
            return ["x"] * len(requests)

    module = ModuleType("lm_eval.models.vllm_causallms")
    module.VLLM = VLLM
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", module)


def test_vllm_backend_notes_every_answer(monkeypatch):
    from ptl.evaluation import language_models

    mock_vllm(monkeypatch)
    lm = language_models.language_model(REASONER, settings({"name": YAML}, backend="vllm", max_length=10), seed=3)
    lm.generate_until([SimpleNamespace(args=(prompt, {})) for prompt in ("short", "long")])
    assert lm.notes == {"short": (3, False), "long": (3, True)}
    assert lm.cut_prompts == 1
    assert lm.seconds > 0
    assert (lm.given["pretrained"], lm.given["seed"], lm.given["max_model_len"]) == (str(REASONER), 3, 10)


def test_vllm_backend_is_refused_where_it_cannot_work(tmp_path, monkeypatch):
    from ptl.evaluation import language_models

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"evaluate\.backend: vLLM cannot be loaded here \(ModuleNotFoundError"):
        language_models.language_model(REASONER, settings({"name": YAML}, backend="vllm"))
    # Installed, but not for this system.
    monkeypatch.delitem(sys.modules, "vllm")
    monkeypatch.delitem(sys.modules, "lm_eval.models.vllm_causallms", raising=False)
    (tmp_path / "vllm.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"vLLM cannot be loaded here \(OSError: libcudart"):
        language_models.language_model(REASONER, settings({"name": YAML}, backend="vllm"))
    with pytest.raises(ValueError, match=r"speed\.repeats=0"):
        Evaluate(tasks=[Task(name=YAML)], backend="vllm")
