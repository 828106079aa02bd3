"""Rows are recognised by their columns: format and templates as a config has them, or a refusal with a remedy."""

import json
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from ptl.data.row_formats import recognise, settings_of
from ptl.data.sources import SourceRow, texts
from ptl.errors import InputError

CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
# Rows of each kind, and the prompt and completion that training reads of the first one.
KINDS = {
    "gsm8k": ([{"question": "1+1?", "answer": "#### 2"}], "Question: 1+1?\nAnswer:", " #### 2"),
    "math": ([{"problem": "1+1?", "solution": "It is 2.", "answer": 2}], "Question: 1+1?\nAnswer:", " It is 2."),
    "result-alone": ([{"question": "1+1?", "answer": 2}], "Question: 1+1?\nAnswer:", " 2"),
    "metamath": ([{"query": "1+1?", "response": "2", "type": "x"}], "Question: 1+1?\nAnswer:", " 2"),
    "alpaca": (
        [
            {"instruction": "Add", "input": "1 1", "output": "2", "text": "Add 1 1 2"},
            {"instruction": "Hi", "input": "", "output": "Hi"},
        ],
        "Add\n1 1\n",
        "2",
    ),
    "alpaca-without-input": ([{"instruction": "Add 1 and 1", "output": "2"}], "Add 1 and 1\n", "2"),
    "trl": ([{"prompt": "1+1=", "completion": " 2"}], "1+1=", " 2"),
    "prompt-without-space": ([{"prompt": "1+1?", "response": "2"}], "1+1?\n", "2"),
    "mbpp": ([{"text": "Add", "code": "a + b", "test_list": ["x"]}], "Add\n", "a + b"),
    "text": ([{"text": "1+1=2", "url": "x"}], "", "1+1=2"),
    "messages": ([{"messages": CHAT, "prompt": "1+1?"}], "1+1?", "2"),
    "conversations": ([{"conversations": CHAT}], "1+1?", "2"),
}


@pytest.fixture
def written(tmp_path):
    """A JSONL file with these rows."""

    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_recognised_and_read_like_that(kind, written):
    rows, prompt, completion = KINDS[kind]
    recognised = recognise(written(rows), field="--data")
    assert texts(SourceRow(rows[0], recognised.source, 1)) == (prompt, completion)
    lengths = [sum(map(len, texts(SourceRow(row, recognised.source)))) for row in rows]
    assert recognised.characters == sum(lengths)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]}], "role: user"),
        ([{"messages": CHAT[:1]}], "row 1 .* no answer"),
        ([{"instruction": "Add", "input": None, "output": "2"}], 'row 1 has null in column .input.* write a text .*""'),
        (
            [{"instruction": "Add", "input": "1", "output": "2"}, {"instruction": "Add", "output": "2"}],
            "row 2 has nothing in column 'input'.*or remove the column",
        ),
        ([{"title": "x", "body": "y"}], r"\(body, title\).*rename them"),
        ([{"question": "", "answer": ""}], "none that are recognised"),
    ],
    ids=["sharegpt", "no-answer", "null-input", "input-in-some-rows", "unknown", "empty"],
)
def test_rows_that_cannot_be_read_are_refused_with_the_field_of_the_caller(rows, said, written):
    with pytest.raises(InputError, match=f"(?s)^--data: .*{said}"):
        recognise(written(rows), field="--data")


def test_a_column_that_one_row_lacks_is_not_taken():
    rows = [{"question": "1+1?", "answer": "2", "text": "a"}, {"question": "2+2?", "answer": None, "text": "b"}]
    assert settings_of(rows)["format"] == "text"


def test_the_length_is_that_of_long_rows_but_not_of_the_longest(written):
    rows = [{"text": "x" * 100}] * 94 + [{"text": "x" * 500}] * 5 + [{"text": "x" * 9000}]
    assert recognise(written(rows), field="--data").long == 500


def test_of_a_hub_data_set_the_first_rows_are_read_of_a_commit(monkeypatch):
    calls = []

    def streamed(name, subset, **options):
        calls.append((name, subset, options["split"], options["revision"], options["streaming"]))
        return iter([{"question": "1+1?", "answer": "2"}] * 10_000)

    monkeypatch.setattr(datasets, "load_dataset", streamed)
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda *_, **__: SimpleNamespace(sha="0123abc"))
    recognised = recognise("openai/gsm8k", "main", field="--data")
    source = recognised.source
    assert (source.source, source.subset, source.revision) == ("openai/gsm8k", "main", "0123abc")
    assert recognised.characters is None
    assert calls == [("openai/gsm8k", "main", "train", "0123abc", True)]


def test_a_missing_file_and_an_unknown_data_set_name_the_option(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"^--data: no file"):
        recognise(str(tmp_path / "none.jsonl"), field="--data")

    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "dataset_info", offline)
    with pytest.raises(InputError, match=r"^--data: 'a/b' is no file here.*no route.*ID:SUBSET"):
        recognise("a/b", field="--data")
