"""`ptl init --eval`: the benchmark that it writes scores a model, and grades right, wrong and malformed answers."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from bodies import PUBLISHED
from chats import tokenizer_with
from checkout import DENSE, EXAMPLE, ROOT
from grading import outcomes

from ptl.config.run import Evaluate, Speed, Task, load_config
from ptl.evaluation import scoring, tasks
from ptl.evaluation.evaluate import evaluate_checkpoint, read_items
from ptl.evaluation.task_files import read_yaml
from ptl.evaluation.tasks import check_tasks, find

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("evaluate")]


def write(name, *rows):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def renamed(number):
    """Rows of the tiny reasoner's test as a user might have them."""
    with (EXAMPLE / "test.jsonl").open() as file:
        rows = [json.loads(line) for _, line in zip(range(number), file, strict=False)]
    return [{"problem": row["question"], "solution": row["answer"]} for row in rows]


@pytest.fixture
def init(ptl):
    """Run `ptl init --eval` without a GPU; the config, the benchmark's YAML and what was printed."""

    def run(*options, model=DENSE):
        code, said = ptl(
            "init", model, "-o", "configs/mine.yaml", "--gpu", "none", "--force", *options
        )
        assert code == 0, said
        config = load_config("configs/mine.yaml")
        check_tasks(config.evaluate)
        return config, Path(config.evaluate.tasks[0].name), said

    Path("configs").mkdir()
    return run


def test_it_scores_a_model_from_any_folder(ptl, init, tmp_path, monkeypatch):
    rows = renamed(24)
    rows[3]["solution"] = "#### 1234"  # which is wrong
    write("data/test.jsonl", *rows)
    write("data/rows.jsonl", *renamed(1))
    options = [
        "--data",
        "data/rows.jsonl",
        "--columns",
        "problem,solution",
        "--eval",
        "data/test.jsonl",
    ]
    config, file, said = init(*options, "--task", "arc_easy")
    assert file == Path("configs/mine-eval.yaml").absolute() and [
        task.metric for task in config.evaluate.tasks
    ] == [
        "exact_match",
        "acc",
    ]
    assert (
        f"wrote configs/{file.name}: 24 items of test.jsonl; an answer is right where the last number"
        in said
    )
    task = yaml.safe_load(file.read_text())
    # from the YAML's folder
    assert task["dataset_kwargs"]["data_files"] == {"test": "../data/test.jsonl"}
    assert (task["doc_to_text"], task["metadata"]["version"]) == ("{{problem}}\n", 1.0)
    # The model is trained on the very words of the benchmark.
    assert config.training.sources[0].prompt == "{problem}\n"
    command = next(
        line.split()[1:] for line in said.splitlines() if line.startswith("  ptl validate")
    )
    code, said = ptl(*command)
    assert code == 0, said
    # Another file of that name is in the working directory.
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/data").mkdir()
    write(tmp_path / "elsewhere/data/test.jsonl", rows[0])
    monkeypatch.chdir(tmp_path / "elsewhere/deep")
    only = config.evaluate.model_copy(
        update={"tasks": config.evaluate.tasks[:1], "speed": Speed(repeats=0)}
    )
    (score,) = evaluate_checkpoint(DENSE, tmp_path / "scored", only, seed=0).tasks
    assert (score.task, score.version, score.items) == ("own_test", "1.0", 24)
    wrong = [item["id"] for item in read_items(tmp_path / "scored") if not item["correct"]]
    assert wrong == ["3"] and score.truncated == 0


def graded(file, *answers, allow_code=False):
    """What the harness makes of each answer to the first item."""
    wanted = load_config("configs/mine.yaml").evaluate
    assert wanted.allow_code == allow_code
    return graded_by(file, wanted, *answers)


def graded_by(file, wanted, *answers):
    (spec,) = find(str(file))
    task = scoring.load_task(spec, wanted.tasks[0], wanted, seed=0)
    return [score for scores in outcomes(task, answers) for score in scores.values()]


@pytest.mark.parametrize(
    "answer, rights, wrongs",
    [
        ("77-73=4\n#### 1,234", ["1234", "It is $1,234.00.", "#### 1{,}234", "2 or 1234"], ["1234 or 2", "", "234"]),
        (12, ["12", "12.0", "So 3*4=12."], ["-12", "12.5", "120", "1.2", "012.1"]),
        ("-0.50", ["-.5", "it is -0.5%", "x=-0.50"], ["0.5", "1-0.5", "-5", "-0.05"]),
        ("0", ["0", "0.0", "-> 0."], ["10", "", "none"]),
        ("1.050", ["1.05"], ["1.5", "1.005", "105"]),
    ],
)  # fmt: skip
def test_numbers_are_graded_by_the_last_one(init, answer, rights, wrongs):
    write("test.jsonl", {"question": "Q", "answer": answer})
    _, file, _ = init("--eval", "test.jsonl")
    assert graded(file, *rights, *wrongs) == [1] * len(rights) + [0] * len(wrongs)


@pytest.mark.parametrize(
    "answer, rights, wrongs",
    [
        ("Paris", ["Paris", " paris.\n"], ["It is Paris", "", "Pari"]),
        # the harness would take it for two right answers
        ("[1, 2]", ["[1, 2]", "[1, 2]."], ["1", "2", "[1]"]),
        ("C++", ["c++"], ["C"]),
        ("It rains, so\n#### no", ["no", "It pours.\n#### no"], ["yes", "It rains, so"]),
    ],
)
def test_texts_are_graded_as_a_whole(init, answer, rights, wrongs):
    write("test.jsonl", {"question": "Q", "answer": answer})
    _, file, _ = init("--eval", "test.jsonl")
    assert graded(file, *rights, *wrongs) == [1] * len(rights) + [0] * len(wrongs)


BOXED = yaml.safe_load((ROOT / "tests/boxed_answers.yaml").read_text())["graded"]


def test_boxes_are_graded_as_formulas_by_code_in_a_folder_of_its_own(init):
    for reference, rights, wrongs in BOXED:
        write("test.jsonl", {"question": "Q", "answer": f"So $\\boxed{{{reference}}}$."})
        config, file, _ = init("--eval", "test.jsonl")
        assert file == Path("configs/mine-eval/boxed.yaml").absolute()
        scores = graded(file, *rights, *wrongs, allow_code=True)
        assert scores == [1] * len(rights) + [0] * len(wrongs), reference
    # What its code may read, and so what a resumed run looks at, is the task alone.
    assert {path.name for path in tasks.files(config.evaluate)} == {
        "boxed.yaml",
        "boxed.py",
        "test.jsonl",
    }


def test_the_benchmarks_of_the_page_grade(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/own-benchmark.md").read_text()
    shutil.copytree(ROOT / "examples/math_suite/mbpp", "mbpp")
    Path("json-eval").mkdir()
    for name, text in re.findall(r"`([\w./-]+)`:\n\n```\w+\n(.*?)```", page, re.S):
        Path(name).write_text(text)
    program = "def double(x):\n    return {}"
    for name, right, *wrongs in (
        ("mine-eval.yaml", "So it is 12.", "12 or 13", "twelve"),
        ("json-eval/task.yaml", '{"item": "pen", "number": 2}', '{"item": "pen"}', "two pens"),
        ("mbpp/own_code.yaml", program.format("2 * x"), program.format("4"), "2 * x"),
    ):
        wanted = Evaluate(tasks=[Task(name=name)], allow_code=True)
        assert graded_by(Path(name), wanted, right, *wrongs) == [1, 0, 0], name


def test_the_answers_choose_the_grading_unless_an_option_does(init):
    for answers, options, grade in (
        (["1", "$2.50", "30 %", "4\n#### -1,000"], [], "number"),
        (["1", "two"], [], "text"),
        (["1", "2"], ["--grade", "text"], "text"),
        (["\\boxed{1}", "\\boxed{\\frac{1}{2}}"], [], "boxed"),
        (["\\boxed{1}", "2"], [], "text"),
        (["1", "\\frac{1}{2}"], ["--grade", "boxed"], "boxed"),
    ):
        write("test.jsonl", *({"question": "Q", "answer": answer} for answer in answers))
        _, file, _ = init("--eval", "test.jsonl", *options)
        text = file.read_text()
        found = "boxed" if "boxed.py" in text else "number" if "last-number" in text else "text"
        assert found == grade, (answers, options)


def test_rows_that_keep_the_rest_from_being_graded_as_numbers_are_named(init):
    note = "warning: --eval: row 3 ('12 km') and 0 more are no numbers, so that all answers are compared as texts"
    for answers, options, is_named in (
        (["1", "2", "#### 12 km"], [], True),
        (["1", "2", "12 km"], ["--grade", "text"], False),
        (["one", "two", "3"], [], False),
    ):
        write("test.jsonl", *({"question": "Q", "answer": answer} for answer in answers))
        _, _, said = init("--eval", "test.jsonl", *options)
        assert (note in said) == is_named, said


def test_how_an_answer_ends_follows_the_rows_and_the_chat(init, tmp_path):
    def written(answer, *options, model=DENSE):
        write("test.jsonl", {"question": "Q", "answer": answer})
        _, file, _ = init("--eval", "test.jsonl", *options, model=model)
        task = read_yaml(file)
        return task["doc_to_text"], task["generation_kwargs"]

    prompt, kwargs = written("Paris")
    assert prompt == "Question: {{question}}\nAnswer:" and kwargs["until"] == ["\n", "Question:"]
    assert written("3+4\n7")[1]["until"] == ["\n\n", "Question:"]
    assert written("7")[1]["until"] == ["\n\n", "Question:"]  # it may reason before
    assert written("3+4\n\n7")[1] == {
        "until": ["Question:"],
        "do_sample": False,
        "max_gen_toks": 128,
    }
    # A chat ends by itself; it is asked for what is graded, as nothing shows it how an answer ends.
    model = tmp_path / "chat-model"
    model.mkdir()
    tokenizer = tokenizer_with("qwen2_5")
    tokenizer.save_pretrained(model)
    (model / "config.json").write_text(json.dumps(PUBLISHED["qwen3_8b"]))
    (model / "generation_config.json").write_text(
        json.dumps({"eos_token_id": tokenizer.eos_token_id})
    )
    prompt, kwargs = written("Paris", model=model)
    assert prompt == "{{question}}\nAnswer with the result alone."
    assert kwargs == {"until": [], "do_sample": False, "max_gen_toks": 1024}
    assert written("\\boxed{1}", model=model)[0].endswith("within \\boxed{}.")


GOOD = {"question": "Q", "answer": "1"}
CHAT = [{"role": "user", "content": "Q"}]


def answered(answer):
    """A good row, and one with this answer."""
    return [GOOD, {"question": "Q", "answer": answer}]


@pytest.mark.parametrize(
    "rows, options, problem",
    [
        (
            [{"title": "x", "body": "y"}],
            [],
            "-columns: missing; the rows have body, title; give --eval-columns PROMPT",
        ),
        (
            [GOOD],
            ["--eval-columns", "question,a"],
            "-columns: question,a: no column 'a'; the rows have",
        ),
        ([GOOD], ["--eval-columns", "question"], "-columns: question: two columns are needed"),
        (
            [{"my q": "x", "a": "y"}],
            ["--eval-columns", "my q,a"],
            "-columns: my q,a: no template .* 'my q'; rename it",
        ),
        ([{"text": "x"}], [], "-columns: missing; the rows have text, and no answer"),
        (
            [{"messages": CHAT}],
            [],
            ": the rows are chats .*; write both into columns, for example: jq",
        ),
        (answered(" "), [], ".*: row 2 of test.jsonl has an empty 'answer', the answer; leave"),
        (answered("So\n#### "), [], ".*: row 2 of test.jsonl has an empty 'answer'"),
        ([{"prompt": " ", "completion": "1"}], [], ".*: row 1 of test.jsonl has an empty prompt"),
        ([GOOD, {"question": "Q"}], [], ".*: row 2 of test.jsonl lacks 'answer'"),
        (answered(None), [], ".*: row 2 of test.jsonl holds null for {answer}"),
        (
            answered(1),
            [],
            ".*: row 2 of test.jsonl has a number in column 'answer', and row 1 a str",
        ),
        (
            answered("two"),
            ["--grade", "number"],
            "--grade: number, and the answer of row 2 of .* is none: 'two'; ",
        ),
        (
            [GOOD],
            ["--data", "test.jsonl"],
            ": test.jsonl is also what --data names, .*; give other rows",
        ),
        ([], [], ".*: test.jsonl is empty"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused_before_anything_is_written(
    ptl, rows, options, problem
):
    write("test.jsonl", *rows)
    refused(
        ptl,
        problem if problem.startswith("--") else f"--eval{problem}",
        "--eval",
        "test.jsonl",
        *options,
    )


def refused(ptl, problem, *options):
    before = sorted(Path().iterdir())
    code, said = ptl("init", DENSE, "-o", "mine.yaml", "--gpu", "none", *options)
    assert code == 2 and re.match(f"error: {problem}", said), said
    assert sorted(Path().iterdir()) == before


def test_files_that_are_none_or_exist_are_refused(ptl):
    Path("rows.json").write_text("[{}]")
    Path("bad.jsonl").write_text('{"question": "Q"\n')
    Path("rows.csv").write_text("question,answer\n")
    write("test.jsonl", GOOD)
    for name, problem in (
        ("rows.json", ": rows.json is no .jsonl, .jsonl.gz or .parquet file; give"),
        ("bad.jsonl", ".*: bad.jsonl, line 1 is not JSON .*; correct the line"),
        ("rows.csv", ".*: rows.csv is no .*; convert it: python3 -c"),
        ("none.jsonl", ".*: no file none.jsonl; give"),
        ("s3://bucket/rows.jsonl", ": s3://bucket/rows.jsonl is no file of this machine; fetch it"),
    ):
        refused(ptl, f"--eval{problem}", "--eval", name)
    refused(
        ptl, "--grade: says how rows are scored, and there are none; give --eval", "--grade", "text"
    )
    Path("mine-eval.yaml").write_text("mine")
    remedy = "give --force to overwrite it, or --task mine-eval.yaml to use it"
    refused(ptl, f"--eval: mine-eval.yaml exists; {remedy}", "--eval", "test.jsonl")
    assert Path("mine-eval.yaml").read_text() == "mine"
    # Code is written for boxes only, into a folder of its own.
    Path("boxed.py").touch()
    code, said = ptl("init", DENSE, "-o", "other.yaml", "--gpu", "none", "--eval", "test.jsonl")
    assert code == 0, said
