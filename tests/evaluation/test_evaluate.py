import gzip
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from checkout import DENSE, EXAMPLE, ROOT
from grading import outcomes

from ptl.config.run import Evaluate, Gate, Speed, Task
from ptl.errors import InputError
from ptl.evaluation import code_files, language_models, scoring, tasks
from ptl.evaluation.evaluate import SCORES, evaluate_checkpoint, read_items, write_items
from ptl.evaluation.generation import AnswerNote
from ptl.evaluation.language_models import language_model, tensor_parallel
from ptl.evaluation.paired import wilson
from ptl.evaluation.task_files import LocalFile, local_splits, read_splits
from ptl.evaluation.tasks import check_gate, check_tasks, choose_metric, files, find
from ptl.sandbox import runner

YAML = str(EXAMPLE / "tiny_reasoner.yaml")
LIMIT = 24

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("evaluate")]


def settings(*tasks, **more):
    return Evaluate(tasks=[Task(**task) for task in tasks], speed=Speed(repeats=0), **more)


def evaluate(dst, *tasks, **more):
    return evaluate_checkpoint(DENSE, dst, settings(*tasks, **more), seed=0)


def task_file(folder, text):
    """Settings whose only task has this YAML."""
    (folder / "own.yaml").write_text(text)
    return settings({"name": str(folder / "own.yaml")})


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    dst = tmp_path_factory.mktemp("scored")
    return evaluate(dst, {"name": YAML, "limit": LIMIT}), dst


def test_scores_and_items_of_the_tiny_reasoner(scored):
    scores, dst = scored
    (task,) = scores.tasks
    assert (task.task, task.version, task.metric) == (
        "tiny_reasoner",
        "1.0",
        "exact_match,final-number",
    )
    assert (task.items, task.num_fewshot, task.truncated, task.cut_prompts) == (LIMIT, 0, 0.0, 0.0)
    assert task.accuracy >= 0.9 and task.higher_is_better
    assert (task.low, task.high) == wilson(round(task.accuracy * LIMIT), LIMIT)
    assert (scores.hidden_size, scores.kv_heads) == (64, 2)
    assert scores.bytes == sum(path.stat().st_size for path in DENSE.glob("*.safetensors"))
    written = json.loads((dst / SCORES).read_text())
    assert written["tasks"] == [
        {name: value for name, value in asdict(task).items() if name != "seconds"}
    ]
    assert "seconds" not in written  # equal evaluations give equal bytes

    items = read_items(dst)
    assert (
        len({item["id"] for item in items})
        == len({item["prompt_digest"] for item in items})
        == LIMIT
    )
    assert sum(item["correct"] for item in items) == round(task.accuracy * LIMIT)
    assert sum(item["tokens"] for item in items) / LIMIT == task.answer_tokens
    for item in items:
        assert item["correct"] == item["answer"].strip().endswith(f"\n#### {item['target']}")
        assert item["prompt"].endswith("?\n") and 5 < item["tokens"] < 60 and not item["truncated"]


def test_items_agree_with_the_harness_itself(scored):
    """Same prompts, same answers, same extraction, same outcomes as `lm_eval` run plainly."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    plain = simple_evaluate(
        *("hf", {"pretrained": str(DENSE)}, [YAML]),
        **{"limit": LIMIT, "batch_size": 64, "device": "cpu", "bootstrap_iters": 0},
        task_manager=TaskManager(include_defaults=False),
    )
    scores, dst = scored
    theirs = plain["samples"]["tiny_reasoner"]
    assert plain["results"]["tiny_reasoner"]["exact_match,final-number"] == scores.tasks[0].accuracy
    for sample, item in zip(theirs, read_items(dst), strict=True):
        assert (sample["prompt_hash"], sample["resps"][0][0]) == (
            item["prompt_digest"],
            item["answer"],
        )
        assert (sample["exact_match"], sample["target"]) == (item["correct"], item["target"])


def test_a_repetition_penalty_of_the_makers_changes_no_answer(scored, tmp_path):
    """vLLM in the harness and a GGUF file's evaluation know none."""
    src, dst = tmp_path / "model", tmp_path / "scored"
    shutil.copytree(DENSE, src)
    (src / "generation_config.json").write_text(
        '{"eos_token_id": 1, "pad_token_id": 0, "repetition_penalty": 2.0}'
    )
    dst.mkdir()
    evaluate_checkpoint(src, dst, settings({"name": YAML, "limit": 8}), seed=0)
    assert read_items(dst) == read_items(scored[1])[:8]


def test_answers_and_prompts_that_are_too_long_are_counted(scored, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DENSE)
    lengths = [len(tokenizer(item["prompt"]).input_ids) for item in read_items(scored[1])[:8]]
    room = sorted(lengths)[5]
    task = {"name": YAML, "limit": 8}
    (score,) = evaluate(tmp_path, task | {"max_new_tokens": 3}, max_length=room + 3).tasks
    assert score.cut_prompts == sum(length >= room for length in lengths) / 8 < 1
    assert (score.truncated, score.answer_tokens, score.accuracy) == (1.0, 3, 0)
    assert all(item["truncated"] and item["tokens"] == 3 for item in read_items(tmp_path))


def test_a_group_is_pooled_into_one_score(tmp_path, monkeypatch):
    """The harness's own groups need the hub, so the lookup is replaced: two members with the tiny problems."""
    assert "minerva_math_algebra" in [spec.name for spec in find("minerva_math")]
    for name in ("part_a", "part_b"):
        (tmp_path / f"{name}.yaml").write_text(f"include: {YAML}\ntask: {name}\n")
    members = [
        spec for name in ("part_a", "part_b") for spec in find(str(tmp_path / f"{name}.yaml"))
    ]
    monkeypatch.setattr(tasks, "find", lambda _: members)
    wanted = settings({"name": "both", "limit": 5})
    score, items = scoring.score_task(
        language_model(DENSE, wanted), wanted.tasks[0], wanted, seed=0
    )
    assert (score.task, score.items, score.cut_prompts) == ("both", 10, 0.0)
    assert [(item["task"], item["id"]) for item in items][::5] == [
        ("both", "part_a/0"),
        ("both", "part_b/0"),
    ]


@pytest.fixture
def data_dir(tmp_path):
    """A few rows of each benchmark, in its own fields."""
    add = {
        "text": "Add.",
        "code": "",
        "test_list": ["assert add(1, 2) == 3"] * 3,
        "test_setup_code": "",
    }
    sun = {"question": "Day?", "choices": {"text": ["sun", "moon"], "label": ["A", "B"]}}
    tea = {
        "ind": 1,
        "activity_label": "Tea",
        "ctx_a": "Eva boils water.",
        "ctx_b": "she",
        "label": "0",
    }
    human = {
        "task_id": "HumanEval/0",
        "prompt": "def add(a, b):\n",
        "entry_point": "add",
        "canonical_solution": "",
    }
    rows = {
        "gsm8k_test.jsonl": [{"question": "1+1?", "answer": "<<1+1=2>>\n#### 2"}] * 2,
        "math500.jsonl": [{"problem": "Half?", "answer": "\\frac{1}{2}", "level": 1}] * 2,
        "mbpp.jsonl": [{"task_id": i, **add} for i in (10, 11, 510, 511)],
        "wikitext/test.jsonl": [
            {"page": " = Hills = \n the hills are old"},
            {"page": "a river runs"},
        ],
        "arc_easy/test.jsonl": [{**sun, "answerKey": key} for key in "AB"],
        "hellaswag/validation.jsonl": [{**tea, "endings": ["pours it.", "sings."]}],
        "HumanEval.jsonl.gz": [
            {**human, "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n"}
        ],
    }
    for name, lines in rows.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in lines).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return tmp_path


def test_benchmarks_from_local_files(tmp_path, data_dir, monkeypatch):
    """A perplexity has no interval and no items; multiple choice and answers have both."""
    metrics = {"wikitext": "word_perplexity", "arc_easy": "acc", "hellaswag": "acc_norm"}
    metrics |= {"gsm8k_cot": "exact_match,flexible-extract", "minerva_math500": "math_verify"}
    tasks = [
        {"name": name, "metric": metric, "max_new_tokens": 2} for name, metric in metrics.items()
    ]
    more = {"data_dir": str(data_dir), "max_length": 8192, "batch_size": 2}
    wikitext, arc, hellaswag, gsm8k, minerva = evaluate(tmp_path / "out", *tasks, **more).tasks
    assert wikitext.accuracy > 1 and (wikitext.low, wikitext.high) == (None, None)
    assert (wikitext.items, wikitext.higher_is_better) == (2, False)
    assert 0 <= arc.low <= arc.accuracy <= arc.high <= 1
    items = read_items(tmp_path / "out")
    assert [item["task"] for item in items[:3]] == ["arc_easy", "arc_easy", "hellaswag"] and len(
        items
    ) == 7
    assert sum(item["correct"] for item in items[:2]) == round(2 * arc.accuracy)
    assert (hellaswag.items, hellaswag.accuracy) == (1, items[2]["correct"])
    assert items[2]["prompt"] == "Tea: Eva boils water. She"
    for score, version, shots in ((gsm8k, "3.0", 8), (minerva, "3.1", 4)):
        assert (score.version, score.num_fewshot, score.items, score.answer_tokens) == (
            version,
            shots,
            2,
            2,
        )
    assert (gsm8k.metric, minerva.metric) == ("exact_match,flexible-extract", "math_verify,none")
    # Without a model the same items, and the name of the task that has none.
    monkeypatch.setattr(language_models, "language_model", None)
    assert write_items(tmp_path / "items", settings(*tasks, **more), seed=0) == 7
    task, *questions = read_items(tmp_path / "items")
    assert task == {"task": "wikitext"}
    for question, item in zip(questions, items, strict=True):
        assert all(str(question[name]) == str(item[name]) for name in ("task", "prompt", "target"))


def graded(name, data_dir, *answers):
    """The harness's task, and what it makes of each answer to its first item."""
    wanted = settings({"name": name, "metric": "acc"}, data_dir=str(data_dir), allow_code=True)
    task = scoring.load_task(find(name)[0], wanted.tasks[0], wanted, seed=0)
    return task, [next(iter(scores.values())) for scores in outcomes(task, answers)]


SUITE = ROOT / "examples/math_suite"
FINAL = "Final Answer: The final answer is ${}$. I hope it is correct.".format
ANSWERS = {
    "minerva_math500": [FINAL("\\frac{1}{2}"), FINAL("\\frac{1}{3}"), "one half"],
    "humaneval": ["    return a + b\n", "    return a - b\n", "    return (\n"],
    "mbpp": ["def add(a, b):\n    return a + b\n", "def add(a, b):\n    return 0\n", "no code"],
}
ANSWERS["humaneval_instruct"] = [f"{body}```\nIt adds." for body in ANSWERS["humaneval"]]
for chat in ("mbpp_chat", "mbpp_code"):
    ANSWERS[str(SUITE / f"mbpp/{chat}.yaml")] = [
        f"So:\n```python\n{code}\n```\nIt adds." for code in ANSWERS["mbpp"]
    ]


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_graded_those_of_code_in_the_sandbox(data_dir, monkeypatch, name):
    seen, real = [], runner.run_tests
    monkeypatch.setattr(runner, "run_tests", lambda *given: seen.append(given[0]) or real(*given))
    task, scores = graded(name, data_dir, *ANSWERS[name])
    assert scores == [1, 0, 0]
    if name != "minerva_math500":
        assert task.code_eval.timeouts == 0
        answers = [
            answer.removeprefix("So:\n```python\n").partition("\n```")[0]
            for answer in ANSWERS[name]
        ]
        assert all(any(answer in candidate for candidate in seen) for answer in answers)
        monkeypatch.setattr(
            runner, "run_tests", lambda *given: runner.Outcome(False, "timeout", "more than 5 s")
        )
        for _ in range(2):  # each loaded task counts its own
            task, scores = graded(name, data_dir, "")
            assert (scores, task.code_eval.timeouts) == ([0], 1)


BOXED = yaml.safe_load((ROOT / "tests/boxed_answers.yaml").read_text())


@pytest.mark.parametrize("name", BOXED["rows"])
def test_the_authors_suite_grades_the_last_box(tmp_path, name):
    row, right = BOXED["rows"][name]
    file = tmp_path / ("math500.jsonl" if name == "math500" else f"boxed_{name}/test.jsonl")
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(row) + "\n")
    answers = f"So \\boxed{{{right}}}.", "\\boxed{3}", right, f"\\boxed{{{right}"
    task, scores = graded(str(SUITE / f"{name}.yaml"), tmp_path, *answers)
    assert scores == [1, 0, 0, 0] and task.get_config("generation_kwargs")["max_gen_toks"] == 3000
    chat = {
        "apply_chat_template": True,
        "fewshot_as_multiturn": True,
        "chat_template": lambda turns, **_: turns,
    }
    system = {
        "role": "system",
        "content": "Please reason step by step, and put your final answer within \\boxed{}.",
    }
    # As the template qwen_math has it
    assert task.fewshot_context(task.eval_docs[0], 0, **chat) == [
        system,
        {"role": "user", "content": "Q"},
    ]
    for reference, rights, wrongs in BOXED["graded"]:
        found = [
            task.process_results({"answer": reference}, [text])["exact_match"]
            for text in rights + wrongs
        ]
        assert found == [1] * len(rights) + [0] * len(wrongs), reference


def test_the_stored_answer_is_the_one_that_the_metric_takes():
    """The defect: it was always that of `acc`, so that a right item could show a wrong answer."""
    choices = ["ab", "abcdefgh", "éééééé", "abc"]
    task = SimpleNamespace(get_config=lambda _: "multiple_choice", doc_to_choice=lambda _: choices)
    # Per character -2, -1, -1.08, -3; per byte -2, -1, -0.54, -3; with the question 0, 0, -0.5, 5 more than alone.
    conditional, alone = [-4.0, -8.0, -6.5, -9.0], [-4.0, -8.0, -6.0, -14.0]
    for answer, metric in enumerate(["acc", "acc_norm", "acc_bytes", "acc_mutual_info"]):
        likelihoods = [*conditional, *alone] if metric == "acc_mutual_info" else conditional
        assert scoring._likeliest(likelihoods, task, {}, metric) == answer, metric


def test_each_item_is_answered_n_times_and_graded_each_time(tmp_path):
    """Right, of four items: both, the first, the second, neither. Each pass has its own seed, and the same prompts."""
    (tmp_path / "shots.yaml").write_text(
        f"include: {YAML}\ntask: shots\nnum_fewshot: 2\nfewshot_split: test\n"
    )
    wanted = settings({"name": str(tmp_path / "shots.yaml"), "limit": 4, "samples": 2})
    lm, asked = language_model(DENSE, wanted), []

    def answers(requests):
        asked.append((lm.seed, *map(requests[0].args[1].get, ("do_sample", "temperature"))))
        lm.notes, lm.cut_prompts = (
            {request.args[0]: AnswerNote(lm.seed, lm.seed == 7) for request in requests},
            1,
        )
        lm.seconds, right = 2.0, {6: (0, 1), 7: (0, 2)}[lm.seed]
        return [
            request.doc["answer"] if request.doc_id in right else "#### none"
            for request in requests
        ]

    lm.generate_until = answers
    score, items = scoring.score_task(lm, wanted.tasks[0], wanted, seed=3)
    assert (score.accuracy, score.pass_at_n, score.items, score.samples) == (0.5, 0.75, 4, 2)
    assert (score.answer_tokens, score.truncated, score.cut_prompts, score.seconds) == (
        6.5,
        0.5,
        0.25,
        4.0,
    )
    graded = [(item["id"], item["sample"], item["correct"]) for item in items]
    assert graded == [(str(i // 2), i % 2, bit) for i, bit in enumerate([1, 1, 1, 0, 0, 1, 0, 0])]
    assert items[2]["answer"].endswith(items[2]["target"]) and items[3]["answer"] == "#### none"
    assert len({item["prompt_digest"] for item in items}) == 4
    assert asked == [(6, True, 1.0), (7, True, 1.0)]


def test_samples_differ_and_are_drawn_as_the_makers_recommend(tmp_path):
    src = shutil.copytree(DENSE, tmp_path / "model")
    recommended = {"do_sample": True, "temperature": 2.5, "top_k": 30}
    (src / "generation_config.json").write_text(
        json.dumps(recommended | {"eos_token_id": 1, "pad_token_id": 0})
    )
    wanted = settings({"name": YAML, "limit": 8, "samples": 2})
    assert language_model(src, wanted).sampling == {"temperature": 2.5, "top_k": 30}
    (score,), _ = [evaluate_checkpoint(src, tmp_path / name, wanted, seed=0).tasks for name in "ab"]
    items = read_items(tmp_path / "a")
    assert items == read_items(tmp_path / "b") and len(items) == 16
    assert any(
        one["answer"] != other["answer"] for one, other in zip(items[::2], items[1::2], strict=True)
    )
    assert score.accuracy == sum(item["correct"] for item in items) / 16 < 1
    # One answer is the task's own, greedily.
    (greedy,) = evaluate_checkpoint(
        src, tmp_path / "c", settings({"name": YAML, "limit": 8}), seed=0
    ).tasks
    assert (greedy.accuracy, greedy.pass_at_n) == (1.0, None)


def test_vllm_has_as_many_gpus_as_a_models_heads_allow(tmp_path):
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 60}
    raw = (
        json.loads((DENSE / "config.json").read_text())
        | sizes
        | {"hidden_size": 192, "head_dim": 16}
    )
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert [tensor_parallel(tmp_path, gpus) for gpus in (0, 1, 2, 3, 5, 8)] == [1, 1, 2, 2, 4, 4]


def test_vllm_backend_notes_every_answer(monkeypatch):
    class VLLM:
        """A mock of the harness's model: it answers at once, and its second answer hits the limit."""

        def __init__(self, **given):
            self.given, self.max_length, self.ended = given, 10, []
            core = SimpleNamespace(shutdown=lambda: self.ended.append("its processes"))
            self.model = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core))

        def _model_generate(self, requests, generate=False, sampling_params=None):
            ends = ("stop", "length", "stop")
            answers = [
                SimpleNamespace(token_ids=[5] * 3, text="x", finish_reason=end) for end in ends
            ]
            return [SimpleNamespace(outputs=[answer]) for answer in answers]

        def generate_until(self, requests):
            prompts = [[1] * length for length in (5, 6, 7)]
            self.params = [SimpleNamespace(max_tokens=4) for _ in prompts]
            self._model_generate(prompts, generate=True, sampling_params=self.params)
            for request in requests:
                self.cache_hook.add_partial("generate_until", request.args, "x")
            return ["x"] * len(requests)

    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", SimpleNamespace(VLLM=VLLM))
    lm = language_model(
        DENSE, settings({"name": YAML}, backend="vllm", max_length=10, batch_size=7), seed=3
    )
    lm.generate_until(
        [SimpleNamespace(args=(prompt, {})) for prompt in ("short", "long", "longer")]
    )
    ended, truncated = AnswerNote(3, truncated=False), AnswerNote(3, truncated=True)
    assert lm.notes == {"short": ended, "long": truncated, "longer": ended}
    assert lm.cut_prompts == 2 and lm.seconds > 0
    assert (lm.given["pretrained"], lm.given["seed"], lm.given["max_model_len"]) == (
        str(DENSE),
        3,
        10,
    )
    assert (lm.given["batch_size"], lm.given["max_num_seqs"]) == ("auto", 7)
    seeds = []
    for lm.seed in (1, 2, 1):
        lm.generate_until(
            [SimpleNamespace(args=(prompt, {})) for prompt in ("short", "long", "longer")]
        )
        seeds.append([params.seed for params in lm.params])
    assert seeds[0] == seeds[2] and len({*seeds[0], *seeds[1]}) == 6  # of each sample and prompt
    lm.close()
    assert lm.ended == ["its processes"]


WRONG = [  # golden/commands.txt has more
    (
        [{"name": YAML}, {"name": YAML.replace("/", "//")}],
        "'tiny_reasoner' is listed twice; .* rename it",
    ),
    (
        [{"name": "arc_easy", "metric": "acc", "samples": 2}],
        "samples=2, but the model writes no answers to the task",
    ),
]


TYPING_ERROR = f"include: {YAML}\ntask: own\ndoc_to_text: '{{{{qustion}}}}'"


def test_wrong_tasks_and_files_that_are_none_are_named_before_the_model_is_loaded(tmp_path):
    for named, message in WRONG:
        with pytest.raises(InputError, match=message) as error:
            evaluate_checkpoint(tmp_path / "no-model", tmp_path / "out", settings(*named), seed=0)
        assert error.value.field == "evaluate.tasks"
    for text in (
        "task: [",
        "- a",
        "a: b",
        "task: own\noutput_type: essay",
        "task: own\ninclude: own.yaml",
    ):
        wanted = task_file(tmp_path, text + "\n")
        with pytest.raises(InputError, match=rf"^evaluate\.tasks: .*{tmp_path}/own\.yaml"):
            check_tasks(wanted)
    with pytest.raises(
        InputError, match=r"answers of 'tiny_reasoner' may be 60 tokens long, but .* context is 60"
    ):
        check_tasks(settings({"name": YAML}, max_length=60))
    with pytest.raises(
        InputError,
        match=r"templates of the task 'own' do not fit .*'qustion' is undefined.*own.yaml",
    ):
        evaluate_checkpoint(
            DENSE, tmp_path / "out", task_file(tmp_path, f"{TYPING_ERROR}\n"), seed=0
        )
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?"}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl has not the items of an evaluation"):
        read_items(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match=r"no scores under the name of the task 'c\+\+'; name it"):
        check_tasks(task_file(tmp_path, f"include: {YAML}\ntask: c++\n"))


# Of the last four no field keeps the function; the harness imports it while it reads the file.
OWN_CODE = [
    "include: base.yaml\ndoc_to_text: !function utils.ask",
    "include: base.yaml\nmetric_list: [{metric: !function utils.exact_match}]",
    "include: base.yaml\nmetric_list: [{metric: exact_match, hf_evaluate: true}]",
    "include: base.yaml\nclass: Own",
    "include: with_function.yaml\nprocess_docs: null",
    "process_docs: !function utils.ask\nprocess_docs: null",
    "? !function utils.ask\n: text",
    "metadata: {<<: {a: !function utils.ask}, a: 1}",
]


def test_a_task_file_with_code_of_its_own_is_refused_unless_allowed(tmp_path):
    (tmp_path / "utils.py").write_text(f"open('{tmp_path}/ran', 'w')\nask = exact_match = str\n")
    (tmp_path / "base.yaml").write_text(f"include: {YAML}\n")
    (tmp_path / "with_function.yaml").write_text(
        f"include: {YAML}\nprocess_docs: !function utils.ask\n"
    )
    for text in OWN_CODE:
        wanted = task_file(tmp_path, f"task: own\n{text}\n")
        with pytest.raises(InputError, match=r"code that would run with all rights|appears twice"):
            evaluate_checkpoint(DENSE, tmp_path / "out", wanted, seed=0)
        if "include" in text:
            check_tasks(wanted.model_copy(update={"allow_code": True}))
        assert not (tmp_path / "ran").exists(), text


def test_code_is_run_only_where_it_is_allowed_and_in_the_sandbox(tmp_path, data_dir):
    # the harness's own code is trusted
    check_tasks(settings({"name": "minerva_math500", "metric": "math_verify"}))
    wanted = settings({"name": "humaneval", "metric": "pass@1"}, data_dir=str(data_dir))
    with pytest.raises(InputError, match=r"^evaluate.allow_code: .*'humaneval' runs code"):
        check_tasks(wanted)
    check_tasks(wanted.model_copy(update={"allow_code": True}))
    unsafe = task_file(tmp_path, "task: own\nunsafe_code: true\noutput_type: generate_until\n")
    with pytest.raises(InputError, match=r"^evaluate.tasks: .*outside the sandbox"):
        check_tasks(unsafe.model_copy(update={"allow_code": True}))


def test_the_files_of_a_task_are_what_it_reads(tmp_path):
    """Its data, what it includes, and the code of functions; nothing else that is next to them."""
    for name in ("utils.py", "log.txt", "gsm8k_test.jsonl", "gsm8k_train.jsonl", "other.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "base.yaml").write_text(f"include: {YAML}\n")
    own, data = {tmp_path / "own.yaml", tmp_path / "base.yaml"}, EXAMPLE / "test.jsonl"
    wanted = task_file(tmp_path, "include: base.yaml\ntask: own\n")
    assert files(wanted) >= {*own, Path(YAML), data} and tmp_path / "utils.py" not in files(wanted)
    wanted = task_file(
        tmp_path, "include: base.yaml\ntask: own\nprocess_docs: !function utils.ask\n"
    )
    # Functions may read anything below the task's folder.
    inner = tmp_path / "inner" / "modules"
    (inner / "__pycache__").mkdir(parents=True)
    (inner / "__pycache__" / "grade.pyc").touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").touch()
    (tmp_path / "config.yaml").write_text("evaluate: {}\n")
    counted = {inner / "grade.py", inner.parent / "table.csv"}
    for path in counted:
        path.touch()
    beside = {tmp_path / name for name in ("utils.py", "log.txt", "other.jsonl")}
    beside |= {tmp_path / f"gsm8k_{split}.jsonl" for split in ("test", "train")}
    assert {
        path for path in files(wanted) if path.is_relative_to(tmp_path)
    } == own | counted | beside
    # The harness's own come with the image, their data from the hub, unless it is in a folder.
    assert files(settings({"name": "gsm8k"})) == set()
    read = files(settings({"name": "gsm8k"}, data_dir=str(tmp_path)))
    assert {path.name for path in read} == {"gsm8k_test.jsonl", "gsm8k_train.jsonl"}


def test_files_beside_code_that_do_not_count_are_named(tmp_path, monkeypatch):
    wanted = task_file(tmp_path, f"include: {YAML}\ntask: own\nprocess_docs: !function utils.ask\n")
    assert tasks.warnings(wanted) == []
    monkeypatch.setattr(code_files, "LARGEST_FILE", 2**20)
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(2**20 + 1)
    (tmp_path / "linked").symlink_to(Path(YAML).parent)
    (warning,) = tasks.warnings(wanted)
    assert warning.startswith(
        f"evaluate.tasks: a change of large.bin, linked in {tmp_path} is not noticed when"
    )
    assert not {tmp_path / "large.bin", tmp_path / "linked"} & files(wanted)
    (tmp_path / "later.py").touch()
    monkeypatch.setattr(code_files, "MOST_FILES", 1)
    assert all("and all after the first 1 files" in warning for warning in tasks.warnings(wanted))


def test_local_files_that_are_missing_or_broken_are_named(tmp_path, data_dir, monkeypatch):
    (spec,), (examples,), (mbpp,) = find("gsm8k_cot"), find("gsm8k"), find("mbpp")
    with pytest.raises(InputError, match=r"has no gsm8k_test\.jsonl"):
        local_splits(spec, str(tmp_path / "none"))
    assert set(local_splits(spec, str(data_dir))) == {"test"}
    assert set(local_splits(examples, str(data_dir), num_fewshot=0)) == {"test"}
    with pytest.raises(InputError, match=r"has no gsm8k_train\.jsonl"):  # its few-shot examples
        local_splits(examples, str(data_dir))
    (split,) = local_splits(mbpp, str(data_dir)).values()
    assert read_splits({"test": split})["test"]["task_id"] == [11, 510]  # the authors' test split
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2"):
        read_splits({"test": LocalFile(str(tmp_path / "rows.jsonl"))})
    with pytest.raises(InputError, match=r"test\.jsonl has no row of the split 'test'"):
        read_splits({"test": LocalFile(str(EXAMPLE / "test.jsonl"), row=lambda _: None)})
    assert choose_metric(spec, "exact_match") == ("exact_match", "strict-match")
    # Of a task's own data each form that `datasets` takes; what has an address it fetches itself.
    (tmp_path / "t.csv").write_text("question,answer\na,1\nb,2\n")
    for named, split in (("t.csv", "train"), (["t.csv"], "train"), ({"test": "t.csv"}, "test")):
        changed = {"path": tmp_path / "t.yaml", "dataset_path": "csv", "test_split": split}
        own = find(YAML)[0].model_copy(update=changed | {"dataset_kwargs": {"data_files": named}})
        assert read_splits(local_splits(own, None))[split]["answer"] == [1, 2], named
    with pytest.raises(
        InputError,
        match=r"reads the split 'validation', and its data_files has test; .* test_split",
    ):
        local_splits(own.model_copy(update={"test_split": "validation"}), None)
    own.dataset_kwargs["data_files"] = {"test": ["t.csv", "u.csv"]}
    with pytest.raises(
        InputError, match="has 2 files of one split in its data_files; join them into one"
    ):
        local_splits(own, None)
    own.dataset_kwargs["data_files"] = {"test": "hf://datasets/x/t.csv"}
    assert local_splits(own, None) == {}
    monkeypatch.chdir(tmp_path)  # a task's own data is found from any working directory
    (local,) = local_splits(find(YAML)[0], None).values()
    assert Path(local.file) == EXAMPLE / "test.jsonl"


ACCURACIES = {
    "gsm8k_cot": "exact_match",
    "minerva_math": "math_verify",
    "humaneval": "pass@1",
    "mbpp": "pass_at_1",
}
ACCURACIES |= {"arc_easy": "acc_norm", "lambada_openai": "acc", YAML: "exact_match"}


def test_the_gate_needs_a_first_task_with_right_and_wrong():
    perplexity, on = {"name": "wikitext", "metric": "word_perplexity"}, Gate(enabled=True)
    for name, metric in ACCURACIES.items():
        check_gate(settings({"name": name, "metric": metric}, perplexity), on)
    wanted = settings(perplexity, {"name": "hellaswag", "metric": "acc"})
    check_gate(wanted, Gate())
    with pytest.raises(
        InputError, match=r"^gate\.enabled: .* evaluate\.tasks\.0 \('wikitext'\) is judged by"
    ):
        check_gate(wanted, on)


def test_a_template_of_a_task_cannot_reach_python():
    from jinja2.exceptions import SecurityError
    from lm_eval.utils import apply_template

    language_models.cache_templates()
    assert apply_template("{{a | regex_replace('x', 'y')}}\n", {"a": "x"}) == "y\n"
    with pytest.raises(SecurityError):
        apply_template("{{ ''.__class__.__mro__[1].__subclasses__() }}", {})
