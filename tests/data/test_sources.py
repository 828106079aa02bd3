"""Where rows come from, and what is refused or warned of before any work: files, lines, columns, chats, amounts."""

import errno
import gzip
import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from chats import tokenizer_with
from datasets.exceptions import DatasetGenerationError
from httpx2 import ReadTimeout
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from rows import ANSWERED, ASKED, rows_file

from ptl.config.chat import Chat
from ptl.config.data import DataSource, Decontaminate, Reward, TrainingData
from ptl.config.run import Calibration
from ptl.data import decontamination, sources
from ptl.data.sequences import tokenize
from ptl.data.sources import SourceRow, check_rows, read_rows
from ptl.errors import InputError, WorkError
from ptl.model import hub
from ptl.preflight.rows import check_data
from ptl.storage.s3 import client, split

ROW = b'{"prompt": "a", "completion": "b"}\n'
PACKED = gzip.compress(ROW * 50, mtime=0)
FILES = {  # name, content, what is said
    "empty": ("a.jsonl", b"\n\n", "is empty"),
    "truncated": ("a.jsonl", ROW + b'\n{"prompt"\n', r"line 3 is not JSON \(.*, column 10\)"),
    "too deep": ("a.jsonl", ROW + b"[" * 100_000 + b"\n", "line 2 is not JSON"),
    "Latin 1": ("a.jsonl", ROW + b'{"prompt": "\xe9"}', "line 2 is not in UTF-8"),
    "cut": ("a.jsonl.gz", PACKED[:-12], r"is damaged after line [1-9]"),
    "rubbish behind": ("a.jsonl.gz", PACKED + b"rubbish", "is damaged"),
    "no Parquet": ("a.parquet", b"not parquet", "no readable Parquet"),
    "a list": (
        "a.jsonl",
        b"\xef\xbb\xbf[" + ROW + b"]",
        r"is a JSON list, .* a line; convert it: jq -c '\.\[\]' ",
    ),
    "a list in one line": (
        "a.jsonl",
        b'\n[{"prompt": "a"}]\n',
        "is a JSON list, not one JSON object a line",
    ),
    "UTF-16": (
        "a.jsonl",
        ROW.decode().encode("utf-16"),
        "is in UTF-16, .*; convert it: iconv -f utf-16 -t utf-8 ",
    ),
    "UTF-16 unmarked": ("a.jsonl", ROW.decode().encode("utf-16-le"), "is in UTF-16, not in UTF-8"),
    "other kind": ("a.csv", b"a,b", "is no .jsonl, .jsonl.gz or .parquet file"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_read_is_named_with_the_place(tmp_path, case):
    name, content, said = FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        check_rows(DataSource(source=str(tmp_path / name)), field="training.sources.1")
    assert (error.value.field, name in str(error.value)) == ("training.sources.1.source", True)


GOOD = {"prompt": "a", "completion": "b", "text": "c", "messages": [ASKED, ANSWERED]}
FIRST = GOOD | {"c": "x", "part": {"key": "xyz"}}
CHAT = {"format": "messages"}


def thinking(**fields):
    """A chat whose answer has these fields too."""
    return {"messages": [ASKED, ANSWERED | fields]}


ROWS = {  # fields of the source, of the second row, what is said
    "null": ({}, {"completion": None}, "holds null for {completion}, which is no text"),
    "not a number": ({}, {"prompt": float("nan")}, "holds nan for {prompt}"),
    "list": ({}, {"completion": ["b"]}, "holds a list for {completion}"),
    "half a pair": ({}, {"completion": "\ud83d"}, "character 0 is no Unicode"),
    "blank answer": ({}, {"completion": " \n"}, "has nothing in '{completion}', the answer"),
    "no column": (
        {"prompt": "{c}"},
        {},
        r"lacks 'c', which .* \(columns there: completion, messages, prompt, text\)",
    ),
    "no key": (
        {"prompt": "{part[key]}"},
        {"part": "x"},
        r"has a str in 'part', with no part \[key\]",
    ),
    "no chat": (CHAT, {"messages": "1+1?"}, "has no list in column 'messages'"),
    "no turns": (
        CHAT,
        {"messages": []},
        "has an empty list in column 'messages', a chat without turns",
    ),
    "ends with a tool": (
        CHAT,
        {"messages": [ASKED, ANSWERED | {"role": "tool"}]},
        "ends with a turn of role 'tool'",
    ),
    "an answer alone": (CHAT, {"messages": [ANSWERED]}, "nothing comes before"),
    "ShareGPT": (
        CHAT,
        {"messages": [{"from": "human", "value": "1+1?"}]},
        "message 1 has `from` and `value`",
    ),
    "no content": (
        CHAT,
        {"messages": [ASKED, {"role": "assistant"}]},
        r"of message 2 is no text \(null\)",
    ),
    "parts": (
        CHAT,
        {"messages": [ASKED | {"content": [{}]}, ANSWERED]},
        r"of message 1 is no text \(a list\)",
    ),
    "a list as thought": (
        CHAT,
        thinking(reasoning_content=[]),
        r"the reasoning_content of message 2 .* \(a list\)",
    ),
    "a number as thought": (
        CHAT,
        thinking(thinking=0),
        r"the thinking of message 2 is no text \(a int\)",
    ),
    "half a pair in a thought": (CHAT, thinking(reasoning="\ud83d"), "is no Unicode"),
    "half a pair in a call": (
        CHAT,
        thinking(tool_calls=[{"function": {"arguments": {"a": "\ud83d"}}}]),
        "no Unicode",
    ),
    "two thoughts": (
        CHAT,
        thinking(reasoning_content="a", thinking="b"),
        "in reasoning_content and thinking",
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_that_cannot_be_learned_from_is_refused_wherever_it_is_read(tmp_path, case):
    fields, change, said = ROWS[case]
    source = DataSource(source=rows_file(tmp_path / "a.jsonl", [FIRST, GOOD | change]), **fields)
    with pytest.raises(InputError, match=f"row 2 of .*{said}") as error:
        check_rows(source, field="calibration.data")
    assert error.value.field == f"calibration.data.{source.format}" and error.value.remedy
    with pytest.raises(InputError, match=f"row 2 of .*{said}"):
        tokenize(SourceRow(GOOD | change, source, 2), SimpleNamespace(eos_token_id=0), 64)
    if source.format == "prompt_completion":
        with pytest.raises(InputError, match=f"row 2 of .*{said}"):
            decontamination.build(Decontaminate(against=[source]), None)


def test_a_chat_may_end_without_an_answer_and_call_tools(tmp_path):
    call = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": 1}}}],
    }
    tools = [ASKED, call, {"role": "tool", "content": "2"}, ANSWERED]
    chats = [[ASKED], [ASKED, ANSWERED, ASKED], tools]
    source = DataSource(
        source=rows_file(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats]), **CHAT
    )
    check_rows(source, answers=False)
    rows = list(sources.numbered_rows(source))
    assert list(map(sources.prompt_of, rows)) == [[ASKED], [ASKED, ANSWERED, ASKED], tools[:-1]]
    prompt = '1+1?\n[{"function": {"name": "add", "arguments": {"a": 1, "b": 1}}}]\n2'
    assert sources.texts(rows[2]) == (prompt, "2")
    assert sources.prompt_of(SourceRow(GOOD, DataSource(source="x"))) == "a"
    with pytest.raises(InputError, match="format `text` has no prompt"):
        sources.prompt_of(SourceRow(GOOD, DataSource(source="x", format="text")))


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_is_trained_on_by_each_of_its_names(name):
    tokenizer, chat = tokenizer_with("qwen3"), Chat(enabled=True)
    row = SourceRow(
        thinking(**{name: "1+1", "reasoning_content": "1+1"}), DataSource(source="x", **CHAT)
    )
    assert sources.texts(row) == ("1+1?", "1+1\n2")
    tokens = tokenize(row, tokenizer, 512, chat)
    assert tokenizer.decode(tokens.ids[tokens.prompt :]) == "<think>\n1+1\n</think>\n\n2<|im_end|>"
    # The one name that is there may be null in all other rows of a table.
    other = SourceRow(
        thinking(**{"reasoning_content": None, name: "1+1"}), DataSource(source="x", **CHAT)
    )
    assert tokenize(other, tokenizer, 512, chat) == tokens


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    from datasets import Dataset

    rows = [{"prompt": f"{i}\n", "completion": str(i)} for i in range(5)]
    lines = [json.dumps(row) for row in rows]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    # A byte order mark and empty lines are no part of a row.
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(lines) + "\n \n")
    for name in ("a.parquet", "a.jsonl.gz", "a.jsonl"):
        source = DataSource(source=str(tmp_path / name))
        check_rows(source)
        assert list(read_rows(source)) == rows


def test_every_row_of_a_table_is_checked_and_its_bytes(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    text = DataSource(source=str(path), format="text")
    for values, refusal in ((["a", None], "row 2 .* null"), ([b"1"], "row 1 .* a bytes")):
        parquet.write_table(pyarrow.table({"text": values}), path)
        with pytest.raises(InputError, match=refusal):
            check_rows(text)
    for damaged, offset in ((b"ARROW:schema", 14), (b"plain text 3", 2)):
        table = pyarrow.table({"text": [f"plain text {i}" for i in range(9)]})
        parquet.write_table(table, path, compression="none", use_dictionary=False)
        check_rows(text)
        content = bytearray(path.read_bytes())
        content[content.index(damaged) + offset] ^= 0x80
        path.write_bytes(content)
        with pytest.raises(InputError, match="no readable Parquet"):
            check_rows(text)


def test_the_hub_is_asked_for_the_pinned_revision(monkeypatch):
    """A mock stands for the hub, which tests do not reach."""
    asked = []
    source = DataSource(source="org/set", subset="main", split="test", revision="abc")
    rows = iter([[{"text": "a"}]] * 2)
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or next(rows)
    )
    check_rows(source)  # without a download
    assert asked == []
    with pytest.raises(InputError, match="row 1 of org/set lacks 'prompt'"):
        check_data(Calibration(data=source), TrainingData(sources=[source]), [], hub_rows=True)
    assert len(asked) == 1
    asked.clear()
    assert read_rows(source) == [{"text": "a"}]
    assert asked == [(("org/set", "main"), {"split": "test", "revision": "abc"})]
    with pytest.raises(InputError, match="revision abc"):
        read_rows(source)
    assert sources.content_digest(source) is None


def test_what_a_later_attempt_may_have_from_the_hub_is_no_wrong_input(monkeypatch):
    def answer(status):
        return HfHubHTTPError(
            "", response=SimpleNamespace(status_code=status, headers={}, request=None)
        )

    source = DataSource(source="org/set")
    full, hidden = (
        OSError(errno.ENOSPC, "No space left"),
        DatasetGenerationError("An error occurred"),
    )
    hidden.__cause__ = full
    for error, kind, remedy in (
        (ConnectionError("no route"), WorkError, "check the id"),
        (ReadTimeout("slow"), WorkError, "check the id"),
        (answer(429), WorkError, "check the id"),
        (answer(503), WorkError, "check the id"),
        (full, WorkError, "free some"),
        (hidden, WorkError, "free some"),
        (OSError(errno.EACCES, "Permission denied"), InputError, "check the id"),
        (answer(404), InputError, "check the id"),
        (ValueError("Unknown split"), InputError, "check the id"),
    ):
        monkeypatch.setattr("datasets.load_dataset", Mock(side_effect=error))
        with pytest.raises(kind, match=f"cannot be loaded: .*; {remedy}"):
            read_rows(source)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", Mock(side_effect=LocalEntryNotFoundError("not cached"))
    )
    with pytest.raises(InputError, match="connect"):
        hub.locate("org/model", None)


def test_s3_sources_are_fetched_once_per_version(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("PTL_SCRATCH", str(tmp_path))
    bucket, key = split(f"{s3.root}/data.jsonl")
    source, copy = DataSource(source=f"s3://{bucket}/{key}"), tmp_path / "copy.jsonl"
    digests, fetched, local = [], [], []
    for content in (b'{"text": "a"}\n', b'{"text": "b"}\n', b'{"text": "a"}\n'):
        client().put_object(Bucket=bucket, Key=key, Body=content)
        copy.write_bytes(content)
        assert read_rows(source) == [json.loads(content)]
        digests.append(sources.content_digest(source))
        fetched.append(sources.local_file(source))
        local.append(sources.content_digest(DataSource(source=str(copy))))
    for seen in (digests, fetched, local):
        assert seen[0] == seen[2] != seen[1]
    fetched[0].write_text('{"text": "there already"}\n')
    assert read_rows(source) == [{"text": "there already"}]
    assert len(list((tmp_path / "ptl-data").rglob("*.jsonl"))) == 2  # and no partial one
    with pytest.raises(InputError, match="no object s3://"):
        read_rows(DataSource(source=f"{s3.root}/none.jsonl"))
    monkeypatch.setattr(
        "ptl.storage.s3.client", lambda: SimpleNamespace(head_object=lambda **_: {})
    )
    # of a web page in place of the server
    with pytest.raises(InputError, match="no ETag in the answer"):
        sources.local_file(source)


def test_templates_name_columns_and_their_parts():
    source = DataSource(
        source="a.jsonl", prompt="{n}{b}", completion="{answer[steps][0]} #### {answer[value]}"
    )
    row = {"n": 1, "b": True, "answer": {"steps": ["1+1=2"], "value": 2}}
    assert sources.texts(SourceRow(row, source, 1)) == ("1True", "1+1=2 #### 2")
    for template in (
        "{x.__class__}",
        "{}",
        "{0}",
        "{",
        "x}",
        "{x[}",
        "{x[]}",
        "{x:{y.z}}",
        "{x:9}",
        "{x!r}",
    ):
        for make in (
            lambda text: DataSource(source="a", prompt=text),
            lambda text: Reward(name="math", answer=text),
        ):
            with pytest.raises(ValueError, match=r"is no template|which is no column"):
                make(template)
