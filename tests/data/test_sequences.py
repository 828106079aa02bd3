"""Rows become token sequences: budgets, disjoint chunks, labels, mixing, sources, decontamination, errors."""

import contextlib
import gzip
import itertools
import json
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ptl import json_lines
from ptl.config.recover import DataSource, Decontaminate, Reward, TrainingData
from ptl.config.run import Calibration
from ptl.data import decontamination, sources
from ptl.data.sequences import IGNORED, calibration_batches, order, prompt_rows, tokenize, training_chunk
from ptl.data.sources import SourceRow, check_rows, read_rows
from ptl.errors import InputError
from ptl.evaluation.evaluate import read_items
from ptl.storage.s3 import client, split

ROOT = Path(__file__).parents[2]
PROBLEMS = TrainingData(
    sources=[
        {
            "source": str(ROOT / "examples/tiny_reasoner/train.jsonl.gz"),
            "prompt": "{question}\n",
            "completion": "{answer}",
        }
    ]
)


ASKED, ANSWERED = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "examples/tiny_reasoner/checkpoint")


@pytest.fixture
def chatty():
    """A tokenizer with a chat template."""
    made = AutoTokenizer.from_pretrained(ROOT / "examples/tiny_reasoner/checkpoint")
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return made


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(folder, name, count=40):
    rows = [{"prompt": f"{name} {i} has {i} cups?\n", "completion": f"{i}+1={i + 1}"} for i in range(count)]
    return rows_file(folder / f"{name}.jsonl", rows)


def texts(chunk, tokenizer):
    return [tokenizer.decode(tokens.ids) for tokens in chunk]


@pytest.mark.parametrize("budgets", [range(1, 25), [999], [20_000]], ids=["few", "some", "many"])
def test_the_budget_is_exact_and_the_cut_sequence_keeps_its_answer(tokenizer, budgets):
    """Few tokens may leave out all of the last sequence's prompt, and a part of its answer."""
    for budget in budgets:
        chunk = training_chunk(PROBLEMS, tokenizer, 256, seed=3, earlier=(), budget=budget)
        assert sum(len(tokens.ids) for tokens in chunk) == budget
        for tokens in chunk:
            labels = tokens.labels("completion")
            assert tokens.ids[-1] == tokenizer.eos_token_id and len(labels) == len(tokens.ids)
            assert any(label != IGNORED for label in labels)


def test_chunks_of_the_iterations_share_no_row(tokenizer, tmp_path):
    """Every budget is exact and no row comes up twice before the file is used up, wherever the cuts fall."""
    data = TrainingData(sources=[{"source": numbered(tmp_path, "Bob", 60)}])
    for budgets in [(100, 100, 100, 100), (37, 41, 301, 5), (1, 1, 1, 1, 1)]:
        seen = []
        for i, budget in enumerate(budgets):
            chunk = training_chunk(data, tokenizer, 64, seed=0, earlier=budgets[:i], budget=budget)
            assert sum(len(tokens.ids) for tokens in chunk) == budget
            seen += [tuple(tokens.ids[-8:]) for tokens in chunk]
        whole = [tokens for tokens in seen if len(tokens) == 8]
        assert len(whole) == len(set(whole))


def test_the_order_follows_the_seed(tokenizer):
    first, again, other = (
        training_chunk(PROBLEMS, tokenizer, 256, seed=seed, earlier=(), budget=500) for seed in (0, 0, 1)
    )
    assert first == again and first != other


def test_each_pass_over_the_rows_has_an_order_of_its_own():
    drawn = list(itertools.islice(order(50, seed=0), 150))
    passes = [tuple(drawn[begin : begin + 50]) for begin in (0, 50, 100)]
    assert all(sorted(rows) == list(range(50)) for rows in passes) and len(set(passes)) == 3


def test_labels_leave_the_prompt_out(tokenizer):
    source = DataSource(source="x.jsonl", prompt="{q}\n", completion="{a}")
    tokens = tokenize(SourceRow({"q": "Bob has 3 cups.", "a": "3+1=4"}, source), tokenizer, 64)
    labels = tokens.labels("completion")
    assert len(labels) == len(tokens.ids)
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "3+1=4" + tokenizer.eos_token
    assert labels[: tokens.prompt] == [IGNORED] * tokens.prompt and tokens.prompt > 0
    assert tokens.labels("all") == tokens.ids


def test_a_prompt_that_fills_max_length_is_no_training_sequence(tokenizer, tmp_path):
    long, short = {"prompt": "cup " * 200, "completion": "1"}, {"prompt": "cup?\n", "completion": "2"}
    mixed = TrainingData(sources=[{"source": rows_file(tmp_path / "a.jsonl", [long, short])}])
    chunk = training_chunk(mixed, tokenizer, 32, seed=0, earlier=(), budget=40)
    assert all(tokens.prompt < len(tokens.ids) for tokens in chunk)
    useless = TrainingData(sources=[{"source": rows_file(tmp_path / "b.jsonl", [long])}])
    with pytest.raises(InputError, match="raise max_length"):
        training_chunk(useless, tokenizer, 32, seed=0, earlier=(), budget=40)


def test_sequences_that_max_length_cuts_are_marked(tokenizer, tmp_path):
    long, short = {"prompt": "cup?\n", "completion": "cup " * 200}, {"prompt": "cup?\n", "completion": "2"}
    mixed = TrainingData(sources=[{"source": rows_file(tmp_path / "a.jsonl", [long, short])}])
    chunk = training_chunk(mixed, tokenizer, 32, seed=0, earlier=(), budget=90)
    # The first is cut at its front, to make the budget exact: that alone does not count.
    assert {tokens.cut for tokens in chunk} == {True, False} and sum(len(tokens.ids) for tokens in chunk) == 90
    assert all(tokens.cut == (len(tokens.ids) == 32) for tokens in chunk[1:])
    exact = tokenize(SourceRow(short, mixed.sources[0]), tokenizer, 32)
    assert not tokenize(SourceRow(short, mixed.sources[0]), tokenizer, len(exact.ids)).cut


def test_weights_are_shares_of_the_tokens(tokenizer, tmp_path):
    mixture = TrainingData(
        sources=[
            {"source": numbered(tmp_path, "Bob", 200), "weight": 3},
            {"source": numbered(tmp_path, "Eva", 200), "weight": 1},
        ]
    )
    chunk = training_chunk(mixture, tokenizer, 64, seed=0, earlier=(), budget=2000)
    bob = sum(len(tokens.ids) for tokens in chunk if "Bob" in tokenizer.decode(tokens.ids))
    assert sum(len(tokens.ids) for tokens in chunk) == 2000
    assert bob / 2000 == pytest.approx(0.75, abs=0.02)


def test_short_forms_of_the_training_data():
    one = {"source": "a.jsonl"}
    assert TrainingData.model_validate(one) == TrainingData(sources=(DataSource(source="a.jsonl"),))
    assert TrainingData.model_validate([one, {"source": "b.jsonl", "weight": 2}]).sources[1].weight == 2
    against = {"decontaminate": {"against": [{"source": "t.jsonl"}]}}
    assert TrainingData.model_validate(one | against).decontaminate.tasks
    off = TrainingData.model_validate(one | {"decontaminate": {"tasks": False}}).decontaminate
    assert not off.tasks and TrainingData.model_validate(one | {"decontaminate": None}).decontaminate.tasks
    assert TrainingData.model_validate(TrainingData.model_validate(one).model_dump()).sources[0].source == "a.jsonl"


def test_parquet_and_gzip_give_the_same_rows(tmp_path):
    from datasets import Dataset

    rows = [{"prompt": f"{i}\n", "completion": str(i)} for i in range(5)]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.parquet", "a.jsonl.gz"):
        source = DataSource(source=str(tmp_path / name))
        check_rows(source)
        assert list(read_rows(source)) == rows
    with pytest.raises(InputError, match="lacks 'answer'"):
        check_rows(DataSource(source=str(tmp_path / "a.parquet"), completion="{answer}"))


def test_s3_sources_are_fetched_once_per_version(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("PTL_SCRATCH", str(tmp_path))
    bucket, key = split(f"{s3.root}/data.jsonl")
    client().put_object(Bucket=bucket, Key=key, Body=b'{"prompt": "a", "completion": "b"}\n')
    source = DataSource(source=f"s3://{bucket}/{key}")
    assert read_rows(source) == [{"prompt": "a", "completion": "b"}]
    fetched = sources.local_file(source)
    assert sources.local_file(source) == fetched and fetched.parent.parent == tmp_path / "ptl-data"
    client().put_object(Bucket=bucket, Key=key, Body=b'{"prompt": "c", "completion": "d"}\n')
    assert read_rows(source) == [{"prompt": "c", "completion": "d"}]
    with pytest.raises(InputError, match="no object s3://"):
        read_rows(DataSource(source=f"{s3.root}/none.jsonl"))


WRONG_BYTES = {
    "schema": (b"ARROW:schema", 14),
    "text": (b"plain text 3", 2),
}


@pytest.mark.parametrize("case", WRONG_BYTES)
def test_a_parquet_file_with_a_wrong_byte_is_an_error_of_the_input(tmp_path, case):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"plain text {i}" for i in range(9)]})
    parquet.write_table(table, path, compression="none", use_dictionary=False)
    check_rows(DataSource(source=str(path), format="text"))
    content = bytearray(path.read_bytes())
    text, offset = WRONG_BYTES[case]
    content[content.index(text) + offset] ^= 0x80
    path.write_bytes(content)
    with pytest.raises(InputError, match="no readable Parquet"):
        check_rows(DataSource(source=str(path), format="text"))


def test_the_hub_is_asked_for_the_pinned_revision(monkeypatch):
    """A mock stands for the hub, which tests do not reach."""
    import datasets

    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or [{"text": "a"}]
    )
    read_rows(DataSource(source="org/set", subset="main", split="test", revision="abc"))
    assert asked == [(("org/set", "main"), {"split": "test", "revision": "abc"})]

    def gone(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", gone)
    with pytest.raises(InputError, match="revision abc"):
        read_rows(DataSource(source="org/set", revision="abc"))


SENTENCE = "Ann buys seven green apples and nine red pears at the small market on Sunday morning"


def test_decontamination_drops_what_shares_a_run_of_words(tokenizer, tmp_path):
    clean = [{"prompt": f"Bob has {i} cups.\n", "completion": f"{i}"} for i in range(10)]
    leaked = [
        {"prompt": f"Hello! {SENTENCE.upper()}, how many?\n", "completion": "16"},  # inside, other case and punctuation
        {"prompt": "One plus one?\n", "completion": "2"},  # a short item as a whole
        {"prompt": "other\n", "completion": f"so {SENTENCE}"},  # in the answer
    ]
    near = [{"prompt": "One plus one plus three?\n", "completion": "5"}]
    tests = [{"prompt": f"{SENTENCE}. Total?", "completion": "1"}, {"prompt": "one plus ONE", "completion": "2"}]
    against = [{"source": rows_file(tmp_path / "test.jsonl", tests)}]
    train = TrainingData(
        sources=[{"source": rows_file(tmp_path / "train.jsonl", clean + leaked + near)}],
        decontaminate={"against": against},
    )
    leaks = decontamination.build(train.decontaminate, None)
    chunk = training_chunk(train, tokenizer, 200, seed=0, earlier=(), budget=800, leak_filter=leaks)
    used = "".join(texts(chunk, tokenizer))
    assert "pears" not in used.lower() and "One plus one?" not in used
    assert "plus three" in used and "Bob has 9" in used
    report = leaks.report()
    assert (report["rows"], report["dropped"]) == (14, 3)  # counted once, over several epochs
    assert (report["items"], report["short"]) == (2, 1) and report["not_compared"] == ["evaluate.tasks"]
    assert len(report["examples"]) == 3 and "train.jsonl row" in report["examples"][0]


def evaluated(folder, items, *unscored):
    """What `write_items` writes; of a task without prompts its name."""
    folder.mkdir()
    rows = [{"task": task, "prompt": p, "target": t} for task, p, t in items]
    rows_file(folder / "items.jsonl", [*rows, *({"task": name} for name in unscored)])
    return folder


def test_the_items_of_the_benchmarks_are_compared_with_by_default(tmp_path):
    """Short items are found too, whatever words the benchmark's template and the training data's put around them."""
    asked = ("What is", "Compute")
    shorts = [
        ("math", f"Problem: {asked[i % 2]} {i} plus {i}{'?' * (i % 2)}\nSolution:", str(2 * i)) for i in range(40)
    ]
    others = (
        "Bob has four old boats and sells two of them to Eve in May",
        "How many legs have six cats and nine dogs on a farm?",
    )
    longs = [("words", f"{question}. Total?", f"So {question}") for question in (SENTENCE, *others)]
    scored = evaluated(tmp_path / "scored", [*shorts, *longs], "perplexity_only")
    source = DataSource(source="train", prompt="Question: {problem}\n", completion="Answer: {solution}")
    filter_ = decontamination.build(Decontaminate(), scored)
    rows = [
        {"problem": "compute 7 plus 7", "solution": "14"},
        {"problem": "Compute 7 plus 8.", "solution": "15"},
        {"problem": "plus", "solution": "Problem Solution"},  # the template is no content
        {"problem": f"Hello. {SENTENCE}!", "solution": "16"},
    ]
    assert [filter_.keeps(SourceRow(row, source, i)) for i, row in enumerate(rows)] == [False, True, True, False]
    report = filter_.report()
    assert (report["items"], report["short"]) == (43, 0)
    assert report["not_compared"] == ["perplexity_only"] and report["dropped"] == 2
    assert decontamination.build(Decontaminate(tasks=False), scored) is None


def test_items_may_hold_any_character_and_a_benchmark_may_be_named_twice(tmp_path):
    scored = evaluated(tmp_path / "scored", [("words", "One\u2028two\x85three", "1")])
    items = tmp_path / "scored/items.jsonl"
    items.write_text(json.dumps(json.loads(items.read_text()), ensure_ascii=False) + "\n")  # as evaluate writes it
    path = rows_file(tmp_path / "test.jsonl", [{"short": "Four five six?", "long": SENTENCE, "answer": "1"}])
    twice = [{"source": path, "prompt": prompt, "completion": "{answer}"} for prompt in ("{short}", "{long}")]
    filter_ = decontamination.build(Decontaminate(against=twice), scored)
    rows = [{"prompt": text, "completion": "1"} for text in ("one two three", "four five six", SENTENCE, "seven")]
    kept = [filter_.keeps(SourceRow(row, DataSource(source="train"), i)) for i, row in enumerate(rows)]
    assert kept == [False, False, False, True] and filter_.report()["items"] == 3
    assert read_items(tmp_path / "scored")[0]["prompt"] == "One\u2028two\x85three"


QUESTIONS = {
    "long": [f"Zoé buys {i} green apples, {i + 1} pears and a brûlée for {i + 2} boys; how many?" for i in range(100)],
    "short": [f"How many crêpes are {i} and {i + 3}?" for i in range(100)],
    "sums": [f"What is {i} + {i + 3}?" for i in range(100)],  # two words beside the template
    "Chinese": [f"小明有{i}个苹果又买了{i + 3}个\uff0c一共几个\uff1f" for i in range(100)],  # full-width , and ?
}  # fmt: skip
TEMPLATES = {"bare": "{}", "template": "Question: {}\nAnswer:"}
SYSTEM = {"role": "system", "content": "You are a careful assistant. Think, then answer."}


def chat(question, answer, *before):
    return {"messages": [*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = {
    "prompt and completion": (DataSource(source="train"), lambda q, a: {"prompt": q, "completion": a}),
    "template of the config": (
        DataSource(source="train", prompt="### Problem: {q}\n", completion="### Solution: {a}"),
        lambda q, a: {"q": q, "a": a},
    ),
    "template in the rows": (
        DataSource(source="train"),
        lambda q, a: {"prompt": f"Q: {q}\nA:", "completion": f" {a}"},
    ),
    "text": (DataSource(source="train", format="text"), lambda q, a: {"text": f"Some words. {q} It is {a}."}),
    "messages": (DataSource(source="train", format="messages"), chat),
    "messages with a system message": (
        DataSource(source="train", format="messages"),
        lambda q, a: chat(q, a, SYSTEM),
    ),
    "a later turn": (
        DataSource(source="train", format="messages"),
        lambda q, a: chat(f"Thanks. {q.upper()}", a, SYSTEM, {"role": "user", "content": "Hello!"}),
    ),
}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("questions", QUESTIONS)
def test_every_exact_copy_is_found(tmp_path, questions, template, row, form):
    """The defect: of 100 exact copies in rows of another form none was left out."""
    asked, (source, make) = QUESTIONS[questions], ROWS[row]
    scored = evaluated(
        tmp_path / "scored", [("words", TEMPLATES[template].format(q), str(i)) for i, q in enumerate(asked)]
    )
    filter_ = decontamination.build(Decontaminate(), scored)
    copies = [make(unicodedata.normalize(form, question), str(i)) for i, question in enumerate(asked)]
    others = [make(f"How many words has sentence number {i} of the book on our table?", str(i)) for i in range(100)]
    assert [filter_.keeps(SourceRow(each, source, i)) for i, each in enumerate(copies)] == [False] * 100
    assert [filter_.keeps(SourceRow(each, source, 100 + i)) for i, each in enumerate(others)] == [True] * 100


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_item_of_three_words_is_found_as_a_line_and_counted_as_short(tmp_path, template):
    """The defect: the word that all items share was taken for the template's, and `None shares text` was said."""
    asked = [f"Calculate {i}*{i + 7}" for i in range(100)]
    scored = evaluated(tmp_path / "scored", [("words", TEMPLATES[template].format(q), "1") for q in asked])
    filter_ = decontamination.build(Decontaminate(), scored)
    lines = ("{}", "Q:\n{}\nA:")
    rows = [{"prompt": line.format(question), "completion": "1"} for line in lines for question in asked]
    assert not any(filter_.keeps(SourceRow(row, DataSource(source="train"), i)) for i, row in enumerate(rows))
    inside = decontamination.build(Decontaminate(), scored)
    inside.keeps(SourceRow({"text": f"Say, {asked[0]} is 0."}, DataSource(source="train", format="text"), 1))
    assert "100 of 100 benchmark items have too few words" in decontamination.sentence(inside.report())


def test_items_that_could_not_be_compared_are_counted(tmp_path):
    rows = [{"prompt": f"Row {i} of the training data.", "completion": "1"} for i in range(10)]

    def said(*scored, drops=0):
        filter_ = decontamination.build(
            Decontaminate(), evaluated(tmp_path / str(len(list(tmp_path.iterdir()))), *scored)
        )
        kept = [filter_.keeps(SourceRow(row, DataSource(source="train"), i)) for i, row in enumerate(rows)]
        assert kept.count(False) == drops
        return decontamination.sentence(filter_.report())

    long, short, none = ("words", SENTENCE, "1"), ("words", "Why?", "1"), ("words", "", "1")
    assert said([long]) == "None of 10 training rows shares text with one of 1 benchmark items."
    some = "None of 10 training rows shares text with one of 1 benchmark items. "
    assert (
        said([long, short, none])
        == some + "2 of 3 benchmark items have too few words of their own to be found inside a row."
    )
    assert said([short, none]) == "2 of 2 benchmark items have too few words of their own to be found inside a row."
    unknown = "Training rows were not compared with perplexity, whose items are not known."
    assert said([], "perplexity") == unknown
    leaked = ("words", "ROW 3 of the training data", "1")
    found = "1 of 10 training rows were left out: they share text with a benchmark. "
    assert said([leaked], "perplexity", drops=1) == found + unknown
    nothing = decontamination.build(Decontaminate(), evaluated(tmp_path / "unscored", [], "perplexity"))
    assert nothing.keeps(SourceRow(rows[0], DataSource(source="train"), 0)) and nothing.report()["rows"] == 0


SUBJECTS = ("high school physics", "college algebra", "art", "law")
GROUPS = {
    "numbered": lambda q, i: f"Question {i + 1}: {q}\nAnswer:",
    "two templates": lambda q, i: (f"Question: {q}\nAnswer:", f"Problem: {q}\nSolution:")[i % 2],
    "two instructions": lambda q, i: (f"Please answer this question. {q}", f"{q} Think, then give a number.")[i % 2],
    "instruction": lambda q, i: f"Answer the question below with one number, after all of your steps. {q} Let's go.",
    "labels in a line": lambda q, i: f"Q: {q} A:",
    "no punctuation": lambda q, i: f"Question {q} Answer",
    "subject line": lambda q, i: f"This question is about {SUBJECTS[i % 4]}.\n\n{q}\nAnswer:",
    "other subjects": lambda q, i: f"The subject of number {i} here\n{q}\nAnswer:",
    "options": lambda q, i: f"{q}\nA. all of the {i} apples\nB. {i + 4} only\nC. none of these\nAnswer:",
}
SHORT_QUESTIONS = {
    "nine words": lambda i: f"How many {('red', 'green', 'old', 'new')[i % 4]} apples does Ann sell for {i + 3}?",
    "sums": lambda i: f"What is {i + 2} + {3 * i + 1}?",
    "Chinese": lambda i: f"\u5c0f\u660e\u6709{i + 2}\u4e2a\u82f9\u679c\u53c8\u4e70\u4e86{i * 3 + 3}\u4e2a\uff1f",
}


@pytest.mark.parametrize("count", [10, 40])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("questions", SHORT_QUESTIONS)
def test_a_copy_of_a_short_question_is_found_whatever_template_its_group_has(tmp_path, questions, group, count):
    """The defect: 10 verbatim copies, none found, and `None of 10 rows shares text`."""
    asked = [SHORT_QUESTIONS[questions](i) for i in range(count)]
    items = [("words", GROUPS[group](question, i), "1") for i, question in enumerate(asked)]
    filter_ = decontamination.build(Decontaminate(), evaluated(tmp_path / "scored", items))
    source = DataSource(source="train")
    copies = [{"prompt": f"Hello there. {question}\nThank you.", "completion": "1"} for question in asked]
    assert not any(filter_.keeps(SourceRow(row, source, i)) for i, row in enumerate(copies))
    # trained on in the benchmark's own form
    others = [GROUPS[group](f"Where do {i + 60} white boats go with Bob?", i) for i in range(count, 2 * count)]
    rows = [SourceRow({"prompt": prompt, "completion": "1"}, source, count + i) for i, prompt in enumerate(others)]
    assert all(map(filter_.keeps, rows))
    assert filter_.report()["short"] == 0


def test_an_item_whose_copy_would_not_be_found_is_not_counted_as_compared(tmp_path):
    """One word of a question is its own, and two items ask the same of other tables."""
    capitals = [("words", f"Please say: What is the capital of {name}?", "1") for name in ("Peru", "Chad", "Fiji")]
    tables = [("tables", f"{row}\nWhich of these numbers is the largest?", "1") for row in ("3 5 6", "7 1 8", "2 4 9")]
    for name, items in (("capitals", capitals), ("tables", tables)):
        assert decontamination.build(Decontaminate(), evaluated(tmp_path / name, items)).report()["short"] == 3


def test_the_words_of_a_template_and_lines_of_code_are_no_copy(tmp_path):
    items = [
        "Work slowly and check every step.\nHow many boats are in Bob's harbour if nine of forty sink in a storm?",
        "Work slowly and check every step.\nx = f(1, 2)\nWhy is the sky over the long river bluer than the sea\nhere?",
    ]
    scored = evaluated(tmp_path / "scored", [("words", item, "1") for item in items])
    filter_ = decontamination.build(Decontaminate(), scored)
    rows = ["Work slowly and check every step.\nHow many boats are in Bob's boathouse?", "So x = f(1, 2) it is"]
    assert all(filter_.keeps(SourceRow({"text": row}, DataSource(source="a", format="text"), row)) for row in rows)
    assert filter_.report()["short"] == 0


HIDDEN = {
    "entities": (
        "Is Tom &amp; Ann&#39;s &quot;big&quot; shop &lt; 5&nbsp;km away",
        'Is Tom & Ann\'s "big" shop < 5 km away',
    ),
    "json": (json.dumps('Caf\u00e9 one\nsells "two"\tcakes'), "Caf\u00e9 one sells two cakes"),
    "json twice": (json.dumps(json.dumps('Caf\u00e9 one\nsells "two" cakes')), "Caf\u00e9 one sells two cakes"),
    "zero-width": ("\u200bHow\u2060 ma\u00adny b\u200bo\u034fx\ufe0fes has\u2063 Ann", "How many boxes has Ann"),
    "thousands": ("Pay 12,500 of 1{,}234,567 euros now", "Pay 12500 of 1234567 euros now"),
}


@pytest.mark.parametrize("case", HIDDEN)
@pytest.mark.parametrize("swapped", [False, True])
def test_what_hides_a_copy_is_undone(tmp_path, case, swapped):
    row, item = HIDDEN[case][::-1] if swapped else HIDDEN[case]
    filter_ = decontamination.build(Decontaminate(), evaluated(tmp_path / "scored", [("words", item, "1")]))
    assert not filter_.keeps(SourceRow({"text": f"So: {row}, yes?"}, DataSource(source="train", format="text"), 1))


def test_thirteen_characters_of_chinese_are_no_thirteen_words(tmp_path):
    """They are six to eight words: two sentences may share them."""
    same = "\u5c0f\u660e\u661f\u671f\u5929\u5728\u5b66\u6821\u95e8\u53e3\u4e70\u4e86\u4e24"  # 13
    item = f"\u8bf7\u95ee{same}\u672c\u4e66\u548c\u4e09\u652f\u7b14\u5171\u7528\u591a\u5c11\u94b1"
    filter_ = decontamination.build(Decontaminate(), evaluated(tmp_path / "scored", [("words", item, "1")]))
    source = DataSource(source="train", format="text")
    assert filter_.keeps(SourceRow({"text": f"{same}\u74f6\u725b\u5976\u3002"}, source, 1))
    assert not filter_.keeps(SourceRow({"text": f"\u597d\u3002{item}\u3002"}, source, 2))


def test_rows_are_compared_by_column_and_as_trained(tmp_path):
    """The template's words are in the way of one item, and a part of the other."""
    items = [("words", "Ann buys seven green apples for nine", "1"), ("words", "Subtract the number 17 from 1", "1")]
    filter_ = decontamination.build(Decontaminate(), evaluated(tmp_path / "scored", items))
    source = DataSource(source="train", prompt="Problem: {a}\n", completion="Solution: {b}")
    assert not filter_.keeps(SourceRow({"a": "Ann buys seven green", "b": "apples for nine"}, source, 1))
    source = DataSource(source="train", prompt="Subtract the number {a} from {b}", completion="{a}")
    assert not filter_.keeps(SourceRow({"a": "17", "b": "1"}, source, 2))


def test_a_benchmark_of_chats_is_compared_without_its_system_message(tmp_path):
    path = rows_file(tmp_path / "chats.jsonl", [chat("How many crêpes are 3 and 4?", "7", SYSTEM)])
    filter_ = decontamination.build(Decontaminate(against=[{"source": path, "format": "messages"}]), None)
    assert not filter_.keeps(
        SourceRow({"prompt": "how many crêpes are 3 and 4", "completion": "7"}, DataSource(source="train"))
    )


def test_what_system_messages_say_is_no_item(tmp_path):
    """Four of them, each in a quarter of the chats, are no words that all items share."""
    texts = [f"You answer in the style number {number} of the old masters, with care." for number in range(4)]
    systems = [SYSTEM | {"content": text} for text in texts]
    chats = [chat(f"How many crêpes are {n} and {n * n} and {n + 7}?", str(n), systems[n % 4]) for n in range(80)]
    path = rows_file(tmp_path / "chats.jsonl", chats)
    filter_ = decontamination.build(Decontaminate(against=[{"source": path, "format": "messages"}]), None)
    row = SourceRow(
        {"prompt": f"{texts[0]}\nWhat is the capital of France?", "completion": "Paris"}, DataSource(source="train")
    )
    assert filter_.keeps(row)


@pytest.mark.parametrize("label", ["Question: {q}\nAnswer: ", "Q: {q}\nA: "])
def test_a_copy_that_begins_in_the_prompt_and_ends_in_the_answer_is_found_behind_labels(tmp_path, label):
    words = [f"word{number}" for number in range(16)]
    scored = evaluated(tmp_path / "scored", [("words", " ".join(words), "16")])
    filter_ = decontamination.build(Decontaminate(), scored)
    row = {"q": " ".join(words[:8]), "a": " ".join(words[8:])}
    assert not filter_.keeps(SourceRow(row, DataSource(source="train", prompt=label, completion="{a}")))


def test_subsets_of_one_hub_dataset_are_told_apart(tmp_path):
    filter_ = decontamination.build(Decontaminate(), evaluated(tmp_path / "scored", [("words", SENTENCE, "16")]))
    algebra, geometry = (DataSource(source="hub/math", subset=name) for name in ("algebra", "geometry"))
    assert filter_.keeps(SourceRow({"prompt": "One plus one?", "completion": "2"}, algebra, 1))
    assert not filter_.keeps(SourceRow({"prompt": SENTENCE, "completion": "16"}, geometry, 1))
    assert (filter_.report()["rows"], filter_.report()["dropped"]) == (2, 1)


def test_prompts_of_reinforcement_learning_are_filtered_too(tmp_path):
    scored = evaluated(tmp_path / "scored", [("words", f"{SENTENCE}?", "16")])
    rows = [{"prompt": SENTENCE, "completion": "16"}, {"prompt": "One plus one?", "completion": "2"}]
    source = DataSource(source=rows_file(tmp_path / "a.jsonl", rows))
    filter_ = decontamination.build(Decontaminate(), scored)
    picked = prompt_rows(source, seed=0, skip=0, count=3, leak_filter=filter_)
    assert [row.number for row in picked] == [2, 2, 2] and filter_.report()["dropped"] == 1
    rows_file(tmp_path / "a.jsonl", rows[:1])
    with pytest.raises(InputError, match=r"training\.decontaminate: each of the 1 rows"):
        prompt_rows(source, seed=0, skip=0, count=3, leak_filter=decontamination.build(Decontaminate(), scored))


def test_decontamination_that_leaves_nothing_says_so(tokenizer, tmp_path):
    path = rows_file(tmp_path / "a.jsonl", [{"prompt": SENTENCE, "completion": "1"}])
    data = TrainingData(sources=[{"source": path}], decontaminate=Decontaminate(against=[{"source": path}]))
    leaks = decontamination.build(data.decontaminate, None)
    with pytest.raises(InputError, match=r"dropped by training\.decontaminate"):
        training_chunk(data, tokenizer, 64, seed=0, earlier=(), budget=10, leak_filter=leaks)


def test_messages_need_a_chat_template(chatty):
    chat = [ASKED, ANSWERED]
    source = DataSource(source="a.jsonl", format="messages")
    tokens = tokenize(SourceRow({"messages": chat}, source), chatty, 64)
    answer = [label for label in tokens.labels("completion") if label != IGNORED]
    assert chatty.decode(answer) == "2\n"
    with pytest.raises(InputError, match="no list in column 'chat'"):
        tokenize(SourceRow({"messages": chat}, source.model_copy(update={"messages": "chat"})), chatty, 64)
    chatty.chat_template = None
    with pytest.raises(InputError, match="chat_template is not set"):
        tokenize(SourceRow({"messages": chat}, source), chatty, 64)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt"\n', r"line 2 is not JSON \(.*, column 10\)"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n[1]\n', "line 2 must be a JSON object"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "row 2 of .* lacks 'completion'"),
        ("a.jsonl", b"\xff\xfe", "line 1 is not in UTF-8; convert"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xe9"}', "line 2 is not in UTF-8; convert"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": 1, "completion": 2}\n')[:-9], "is damaged"),
        ("a.parquet", b"not parquet", "no readable Parquet"),
        ("a.csv", b"a,b", "file; convert it "),
        ("a.json", b"[]", r"convert it \(of a JSON list: jq -c '.\[\]' "),
    ],
)
def test_errors_of_files_name_the_place(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        check_rows(DataSource(source=str(tmp_path / name)))
    assert name in str(error.value) and error.value.exit_code == 2


def test_a_missing_file_is_an_error():
    with pytest.raises(InputError, match=r"no file nowhere\.jsonl"):
        read_rows(DataSource(source="nowhere.jsonl"))


def test_calibration_batches_have_equal_lengths_together(tokenizer):
    settings = Calibration(data=PROBLEMS.sources[0], num_sequences=10, max_length=40, batch_size=4)
    batches = calibration_batches(settings, tokenizer, seed=0)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 2]
    for batch in batches:
        padded = batch["attention_mask"] == 0
        assert (batch["labels"][padded] == IGNORED).all() and batch["input_ids"].shape[1] <= 40
        assert (batch["labels"][:, 0] == IGNORED).all()  # the prompt is scored on, but its loss says nothing


NOT_TEXT = {
    "null": ({"prompt": "a", "completion": None}, "row 2 .* holds null for {completion}"),
    "not-a-number": ({"prompt": float("nan"), "completion": "b"}, "row 2 .* holds nan for {prompt}"),
    "list": ({"prompt": "a", "completion": ["b"]}, "row 2 .* holds a list for {completion}"),
    "infinite": ({"prompt": float("inf"), "completion": "b"}, "row 2 .* holds inf for {prompt}"),
    "half-a-pair": ({"prompt": "a", "completion": "\ud83d"}, "row 2 .* is no Unicode"),
}


@pytest.mark.parametrize("case", NOT_TEXT)
def test_a_value_that_is_no_text_is_refused_wherever_it_is_read(tokenizer, tmp_path, case):
    row, said = NOT_TEXT[case]
    source = DataSource(source=rows_file(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}, row]))
    with pytest.raises(InputError, match=said):
        check_rows(source)
    with pytest.raises(InputError, match=said):
        tokenize(SourceRow(row, source, 2), tokenizer, 64)
    with pytest.raises(InputError, match=said):
        decontamination.build(Decontaminate(against=[source]), None)


def test_bytes_of_a_table_are_no_text(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"text": [b"abc"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"row 1 .* holds a bytes for {text}"):
        check_rows(DataSource(source=str(tmp_path / "a.parquet"), format="text"))


def test_an_empty_line_is_no_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n\n')
    assert read_rows(DataSource(source=str(tmp_path / "a.jsonl"), format="text")) == [{"text": "a"}, {"text": "b"}]


def test_a_null_in_a_later_row_of_a_table_is_found_by_the_check(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"prompt": ["a", "b", "c"], "completion": ["1", "2", None]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"row 3 .* holds null for {completion}"):
        check_rows(DataSource(source=str(tmp_path / "a.parquet")))


def test_a_part_of_a_value_may_be_named():
    source = DataSource(source="a.jsonl", completion="{answer[steps][0]} #### {answer[value]}")
    row = {"prompt": "1+1?", "answer": {"steps": ["1+1=2"], "value": 2}}
    assert sources.texts(SourceRow(row, source, 1)) == ("1+1?", "1+1=2 #### 2")
    with pytest.raises(InputError, match=r"a dict in 'answer', with no part \[steps\]\[0\]"):
        sources.texts(SourceRow({"prompt": "1+1?", "answer": {}}, source, 1))
    with pytest.raises(InputError, match="with no part"):
        sources.texts(SourceRow({"prompt": "1+1?", "answer": "2"}, source, 1))


@pytest.mark.parametrize(
    "template", ["{x.foo}", "{x.__class__}", "{}", "{0}", "{", "x}", "{x[}", "{x[]}", "{x:{y.z}}", "{x:9999}", "{x!r}"]
)
def test_templates_name_columns_only(template):
    with pytest.raises(ValueError, match=r"is no template|which is no column"):
        DataSource(source="a.jsonl", prompt=template)
    with pytest.raises(ValueError, match=r"is no template|which is no column"):
        Reward(name="math", answer=template)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="{}[].!:x0 \ud800", max_size=9))
def test_any_template_is_refused_or_fills(template):
    """What the config accepts never ends in a traceback."""
    try:
        source = DataSource(source="a.jsonl", prompt=template)
    except ValueError:
        return
    with contextlib.suppress(InputError):
        assert isinstance(sources.texts(SourceRow({"prompt": "a", "completion": "b", "x": 1}, source, 1))[0], str)


CHATS = {
    "ends-with-the-user": ([ASKED, ANSWERED, ASKED], "ends with a turn of role 'user'"),
    "one-message": ([ASKED], "ends with a turn of role 'user'"),
    "an-answer-alone": ([ANSWERED], "nothing comes before"),
    "text": ("1+1?", "no list in column"),
    "list-of-texts": (["1+1?", "2"], "message 1 is no object"),
    "sharegpt": ([{"from": "human", "value": "1+1?"}], "has `from` and `value` .*from: human -> role: user"),
    "no-role": ([{"content": "1+1?"}, ANSWERED], "message 1 is no object with a role"),
    "null-content": ([ASKED, ANSWERED | {"content": None}], r"content of message 2 is no text \(null\)"),
    "parts": ([ASKED | {"content": [{"type": "text"}]}, ANSWERED], r"message 1 is no text \(a list\)"),
    "half-a-pair": ([ASKED | {"content": "\udc00"}, ANSWERED], "is no Unicode"),
}


@pytest.mark.parametrize("case", CHATS)
def test_chats_without_something_to_learn_are_refused_wherever_they_are_read(chatty, tmp_path, case):
    chat, said = CHATS[case]
    source = DataSource(source=rows_file(tmp_path / "a.jsonl", [{"messages": chat}]), format="messages")
    with pytest.raises(InputError, match=said):
        check_rows(source)
    with pytest.raises(InputError, match=said):
        tokenize(SourceRow({"messages": chat}, source, 1), chatty, 64)


def test_a_chat_without_an_answer_is_a_prompt_for_reinforcement_learning(tmp_path):
    rows = [{"messages": [ASKED]}, {"messages": [ASKED, ANSWERED, ASKED]}, {"messages": [ASKED, ANSWERED]}]
    source = DataSource(source=rows_file(tmp_path / "a.jsonl", rows), format="messages")
    check_rows(source, answers=False)
    prompts = [sources.prompt_of(SourceRow(row, source, 1)) for row in rows]
    assert prompts == [[ASKED], [ASKED, ANSWERED, ASKED], [ASKED]]


def test_a_turn_that_calls_tools_needs_no_content(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": 1}}}]}
    chat = [ASKED, call, {"role": "tool", "content": "2"}, ANSWERED]
    source = DataSource(source=rows_file(tmp_path / "a.jsonl", [{"messages": chat}]), format="messages")
    check_rows(source)
    assert sources.texts(SourceRow({"messages": chat}, source, 1)) == ("1+1?\n\n2", "2")


def test_a_chat_that_the_template_refuses_names_its_row(chatty):
    source = DataSource(source="a.jsonl", format="messages")
    chatty.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"row 7: .*roles must alternate"):
        tokenize(SourceRow({"messages": [ASKED, ANSWERED]}, source, 7), chatty, 64)


ROW = b'{"prompt": "a", "completion": "b"}\n'
DAMAGED = {
    "flipped": lambda packed: packed[:20] + bytes([packed[20] ^ 255]) + packed[21:],
    "truncated": lambda packed: packed[:-12],
    "wrong-checksum": lambda packed: packed[:-8] + b"\0\0\0\0" + packed[-4:],
    "no-gzip": lambda packed: ROW,
    "rubbish-behind": lambda packed: packed + b"rubbish",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_gzip_is_an_error_of_the_input(tmp_path, case):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(DAMAGED[case](gzip.compress(ROW * 50, mtime=0)))
    with pytest.raises(InputError, match=r"a\.jsonl\.gz"):
        check_rows(DataSource(source=str(path)))


@pytest.mark.parametrize("content", [b"0" * 300_000, b"{}\n" * 100_000], ids=["one-line", "many-lines"])
def test_a_bomb_of_gzip_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, content):
    monkeypatch.setattr(json_lines, "MAX_LINE", 10_000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(InputError, match=r"bytes so far from a file of [\d,]+ bytes"):
        read_rows(DataSource(source=str(path)))


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("{a[key]}", r"has a str in 'a', with no part \[key\], which a template names; correct the template: \{a\} is"),
        ("{b[1]}", r"has a list in 'b', with no part \[1\]"),
        ("{c}", r"lacks 'c', which a template names \(columns there: a, b\)"),
    ],
)
def test_errors_of_templates_name_what_is_missing(tmp_path, prompt, said):
    path = rows_file(tmp_path / "a.jsonl", [{"a": "x", "b": ["y"]}])
    with pytest.raises(InputError, match=said):
        check_rows(DataSource(source=path, prompt=prompt, completion="{a}"))


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + ROW)
    (row,) = read_rows(DataSource(source=str(tmp_path / "a.jsonl")))
    assert row == {"prompt": "a", "completion": "b"}


def test_json_that_is_too_deep_names_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(ROW + b"[" * 100_000 + b"\n")
    with pytest.raises(InputError, match="line 2 is not JSON"):
        check_rows(DataSource(source=str(tmp_path / "a.jsonl")))


def test_content_has_a_digest_wherever_it_is(s3, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n')
    local = DataSource(source=str(path))
    bucket, key = split(f"{s3.root}/data.jsonl")
    stored = DataSource(source=f"s3://{bucket}/{key}")
    before = []
    for content in ("a", "b", "a"):
        path.write_text(content)
        client().put_object(Bucket=bucket, Key=key, Body=content.encode())
        before.append((sources.content_digest(local), sources.content_digest(stored)))
    assert before[0] == before[2] and not set(before[0]) & set(before[1])
    assert sources.content_digest(DataSource(source="org/on-the-hub")) is None


def test_an_answer_that_is_no_s3_servers_is_an_error(monkeypatch):
    monkeypatch.setattr("ptl.storage.s3.client", lambda: SimpleNamespace(head_object=lambda **_: {"ContentLength": 5}))
    with pytest.raises(InputError, match="no ETag in the answer"):
        sources.local_file(DataSource(source="s3://bucket/rows.jsonl"))
