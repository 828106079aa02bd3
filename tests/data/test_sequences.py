"""Rows become token sequences: labels, exact budgets, disjoint chunks, mixing, batches, prompts."""

import itertools

import pytest
from chats import TURN_ENDS, tokenizer_with
from rows import ANSWERED, ASKED, EOS, Letters, rows_file

from ptl.config.chat import Chat
from ptl.config.data import DataSource, TrainingData
from ptl.config.run import Calibration
from ptl.data import sequences
from ptl.data.sequences import IGNORED, order, prompt_rows, tokenize, training_chunk
from ptl.data.sources import GENERAL, SourceRow
from ptl.errors import InputError

BOS = 1


def numbered(folder, name, count):
    """Rows of six tokens, each of one letter: of the prompt three, of the completion two, and EOS."""
    letters = [chr(ord(name) + i) for i in range(count)]
    return rows_file(
        folder / f"{name}.jsonl", [{"prompt": 3 * x, "completion": 2 * x} for x in letters]
    )


@pytest.mark.parametrize("end", [[], [EOS]], ids=["plain", "eos"])
@pytest.mark.parametrize("begin", [[], [BOS]], ids=["no-bos", "bos"])
def test_a_sequence_begins_and_ends_once_and_its_prompt_has_no_labels(begin, end):
    tokenizer = Letters(begin, end)
    row = SourceRow({"prompt": "ab", "completion": "c"}, DataSource(source="x"))
    tokens = tokenize(row, tokenizer, 64)
    assert (tokens.ids, tokens.prompt, tokens.cut) == (
        [*begin, 97, 98, 99, EOS],
        len(begin) + 2,
        False,
    )
    assert tokens.labels("completion") == [IGNORED] * tokens.prompt + [99, EOS]
    assert tokens.labels("all") == tokens.ids
    text = tokenize(SourceRow({"text": "c"}, DataSource(source="x", format="text")), tokenizer, 64)
    assert (text.ids, text.prompt) == ([*begin, 99, EOS], 0)
    # A prompt that fills max_length leaves no completion.
    for length, cut in ((len(tokens.ids), False), (len(tokens.ids) - 1, True), (1, True)):
        short = tokenize(row, tokenizer, length)
        assert (short.ids, short.prompt, short.cut) == (
            tokens.ids[:length],
            min(tokens.prompt, length),
            cut,
        )


def test_a_chat_is_learned_from_where_its_answer_begins():
    source, tokenizer = DataSource(source="x", format="messages"), Letters()
    tokens = tokenize(SourceRow({"messages": [ASKED, ANSWERED]}, source, 1), tokenizer, 64)
    assert "".join(map(chr, tokens.ids)) == "u1+1?;a2;"
    assert [label for label in tokens.labels("completion") if label != IGNORED] == [
        ord("2"),
        ord(";"),
    ]
    tokenizer.apply_chat_template = lambda chat, **_: {"input_ids": [len(chat)]}
    with pytest.raises(InputError, match=r"row 1 of x: .* writes the prompt otherwise"):
        tokenize(SourceRow({"messages": [ASKED, ANSWERED]}, source, 1), tokenizer, 64)


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("template", ["qwen3", "deepseek_r1_distill"])
def test_a_completion_is_what_the_model_writes_after_the_prompt_with_its_thought(template, thinks):
    tokenizer, chat = (
        tokenizer_with(template),
        Chat(enabled=True, template_kwargs={"enable_thinking": thinks}),
    )
    answer = "<think>\n1+1\n</think>\n\n2"
    row = SourceRow({"prompt": "1+1?", "completion": answer}, DataSource(source="x"), 1)
    tokens = tokenize(row, tokenizer, 512, chat)
    prompt, completion = (
        tokenizer.decode(tokens.ids[: tokens.prompt]),
        tokenizer.decode(tokens.ids[tokens.prompt :]),
    )
    begun = tokenizer.apply_chat_template(
        [ASKED], tokenize=False, add_generation_prompt=True, enable_thinking=thinks
    )
    # The prompt may have begun the thought, or ended it.
    expected = (
        answer.removeprefix("<think>\n") if "deepseek" in template else answer if thinks else "2"
    )
    assert (prompt, completion) == (begun, expected + TURN_ENDS[template])
    # Texts without a prompt, such as those of another source, are no chats.
    text = SourceRow({"text": "1+1"}, DataSource(source="x", format="text"), 1)
    assert tokenize(text, tokenizer, 512, chat) == tokenize(text, tokenizer, 512)
    messages = SourceRow(
        {"messages": [ASKED, ANSWERED]}, DataSource(source="x", format="messages"), 1
    )
    ended = "\n</think>\n\n" if "deepseek" in template else ""
    assert (
        tokenizer.decode(tokenize(messages, tokenizer, 512, chat).ids)
        == begun + ended + "2" + TURN_ENDS[template]
    )
    # What calls tools is as the template writes it.
    calls = [{"function": {"name": "add", "arguments": {}}, "type": "function"}]
    rows = {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]}
    if "qwen" in template:
        called = tokenize(
            SourceRow(rows, DataSource(source="x", format="messages"), 1), tokenizer, 512, chat
        )
        assert '<tool_call>\n{"name": "add"' in tokenizer.decode(called.ids)


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("template", ["qwen3", "deepseek_r1_distill"])
def test_an_answer_that_was_truncated_has_no_end_and_stays_where_it_was(template, thinks):
    tokenizer, chat = (
        tokenizer_with(template),
        Chat(enabled=True, template_kwargs={"enable_thinking": thinks}),
    )
    question = ASKED | {"content": "What is <think>"}
    begun = tokenizer.apply_chat_template(
        [question], tokenize=False, add_generation_prompt=True, enable_thinking=thinks
    )
    begins_thought = "deepseek" in template
    for answer, completion in (
        ("<think>\n1+1", "1+1" if begins_thought else "<think>\n1+1" if thinks else ""),
        ("<think>\n1+1\n</think>\n\nIt is", "1+1\n</think>\n\nIt is" if begins_thought else None),
    ):
        chats = {"messages": [question, ANSWERED | {"content": answer}], "truncated": True}
        pair = {"prompt": question["content"], "completion": answer, "truncated": True}
        rows = [(chats, DataSource(source="x", format="messages")), (pair, DataSource(source="x"))]
        expected = completion if completion is not None else answer if thinks else "It is"
        for row, source in rows:
            assert (
                tokenizer.decode(tokenize(SourceRow(row, source, 1), tokenizer, 512, chat).ids)
                == begun + expected
            )
    # A completion that follows a text, of a tokenizer that ends every text too.
    row = SourceRow({"prompt": "ab", "completion": "c", "truncated": True}, DataSource(source="x"))
    assert tokenize(row, Letters(end=[EOS]), 64).ids == [97, 98, 99]


@pytest.mark.parametrize("enabled", [True, False])
def test_an_answer_is_trained_on_up_to_the_first_end_of_its_turn(enabled):
    """Phi-3's template ends a chat with EOS too; Cohere's has another token before the end of the turn."""
    tokenizer = tokenizer_with("phi3")
    tokenizer.add_tokens(["<|end|>", "<|user|>", "<|assistant|>", "<|stop|>"])
    source, chat = DataSource(source="x", format="messages"), Chat(enabled=enabled)
    row = SourceRow({"messages": [ASKED, ANSWERED]}, source, 1)
    phi3 = tokenizer.chat_template
    cohere = phi3.replace(
        "'<|assistant|>\n' + message['content'] + '",
        "'<|assistant|>\n' + message['content'] + '<|stop|>",
    )
    assert cohere != phi3
    for template, end in ((phi3, "<|end|>"), (cohere, "<|stop|><|end|>")):
        tokenizer.chat_template = template
        tokens = tokenize(row, tokenizer, 512, chat)
        assert tokenizer.decode(tokens.ids[tokens.prompt :]) == f"2{end}"


def test_white_space_before_an_answer_is_trained_on_with_what_is_beside_it():
    """Mistral's template has it behind a prompt that ends without one."""
    tokenizer = tokenizer_with(None)
    tokenizer.add_tokens(["[INST]", "[/INST]"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + "
        "eos_token }}{% endfor %}"
    )
    chat = Chat(enabled=True)
    row = SourceRow({"prompt": "1+1?", "completion": "2 is it"}, DataSource(source="x"), 1)
    tokens = tokenize(row, tokenizer, 512, chat)
    text = "[INST] 1+1? [/INST] 2 is it<|im_end|>"
    assert tokenizer.decode(tokens.ids) == text
    assert tokens.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens.ids[tokens.prompt :]) == " 2 is it<|im_end|>"


def test_messages_need_a_chat_template():
    row = SourceRow({"messages": [ASKED, ANSWERED]}, DataSource(source="x", format="messages"), 7)
    with pytest.raises(InputError, match=r"row 7 of x: .*chat_template is not set"):
        tokenize(row, tokenizer_with(None), 64)


def test_the_order_is_a_permutation_for_each_pass_and_prompts_follow_it(tmp_path):
    assert list(itertools.islice(order(5, seed=0), 15)) == [
        2,
        3,
        4,
        1,
        0,
        4,
        3,
        2,
        1,
        0,
        2,
        0,
        4,
        1,
        3,
    ]
    drawn = list(itertools.islice(order(50, seed=0), 150))
    passes = [tuple(drawn[begin : begin + 50]) for begin in (0, 50, 100)]
    assert all(sorted(rows) == list(range(50)) for rows in passes) and len(set(passes)) == 3
    assert drawn[:50] != list(itertools.islice(order(50, seed=1), 50))
    source = DataSource(source=numbered(tmp_path, "a", 6))
    drawn = list(itertools.islice(order(6, seed=4), 9))
    picked = prompt_rows(source, seed=4, skip=5, count=4)
    assert [row.number - 1 for row in picked] == drawn[5:]
    assert [row.columns["prompt"] for row in picked] == [3 * chr(ord("a") + i) for i in drawn[5:]]


def test_budgets_take_one_after_another_from_one_stream(tmp_path):
    """Each is exact: its last sequence is truncated at its front, comes first, and is none of the next budget."""
    data = TrainingData(sources=[{"source": numbered(tmp_path, "a", 8)}])
    drawn = list(itertools.islice(order(8, seed=3), 12))

    def whole(i):
        return [ord("a") + drawn[i]] * 5 + [EOS]

    budgets = {10: (0, 1), 8: (2, 3), 12: (4, 5), 1: (6,), 19: (7, 8, 9, 10)}
    earlier = []
    for budget, rows in budgets.items():
        chunk = training_chunk(data, Letters(), 64, seed=3, earlier=earlier, budget=budget)
        excess = 6 * len(rows) - budget
        *others, last = sorted(rows)
        expected = [whole(i) for i in others]
        expected = [whole(last)[excess:], *expected] if excess else [*expected, whole(last)]
        assert [tokens.ids for tokens in chunk] == expected
        assert chunk[0].prompt == max(0, 3 - excess) and not chunk[0].cut
        assert sorted(tokens.passes for tokens in chunk) == [(i + 1) / 8 for i in sorted(rows)]
        earlier.append(budget)


def test_the_source_that_is_furthest_behind_its_share_of_tokens_comes_next(tmp_path):
    # of three tokens, not of six
    short = rows_file(tmp_path / "short.jsonl", [{"prompt": "A", "completion": "A"}])
    sources = [{"source": numbered(tmp_path, "a", 20)}, {"source": short, "weight": 2}]
    chunk = training_chunk(
        TrainingData(sources=sources), Letters(), 64, seed=0, earlier=(), budget=42
    )
    assert "".join("aA"[tokens.ids[0] < ord("a")] for tokens in chunk) == "aAAAAaAAAAa"


def test_a_prompt_that_fills_max_length_is_no_training_sequence(tmp_path):
    long, short = {"prompt": 32 * "a", "completion": "b"}, {"prompt": "a", "completion": 9 * "b"}
    mixed = TrainingData(sources=[{"source": rows_file(tmp_path / "a.jsonl", [long, short])}])
    # In 50 passes both orders come up: two useless rows one after another do not end it.
    chunk = training_chunk(mixed, Letters(), 10, seed=0, earlier=(), budget=500)
    assert len(chunk) == 50 and {(tuple(tokens.ids), tokens.cut) for tokens in chunk} == {
        ((97, *[98] * 9), True)
    }
    useless = TrainingData(sources=[{"source": rows_file(tmp_path / "b.jsonl", [long])}])
    assert (
        training_chunk(useless, Letters(), 33, seed=0, earlier=(), budget=33)[0].labels(
            "completion"
        )[-1]
        == 98
    )
    with pytest.raises(InputError, match=r"recover\.max_length=32") as error:
        training_chunk(useless, Letters(), 32, seed=0, earlier=(), budget=40)
    assert error.value.field == "training"


def test_blank_texts_are_passed_over_and_counted(tmp_path):
    """As of wikitext, a third of whose rows are blank."""
    path = rows_file(tmp_path / "a.jsonl", [{"text": text} for text in (" ", "ab", "", "\n", "cd")])
    source = DataSource(source=path, format="text")
    chunk = training_chunk(
        TrainingData(sources=[source]), Letters(), 64, seed=0, earlier=(), budget=60
    )
    assert {tokens.ids[0] for tokens in chunk} == {97, 99} and len(chunk) == 20
    # of ten passes, the last one's end not read
    assert 25 <= sum(tokens.passed_over for tokens in chunk) <= 30
    given = Calibration(data=source, num_sequences=2, max_length=5)
    drawn = sequences.calibration_rows(given, Letters(), seed=0)
    assert sorted(tokens.ids[0] for tokens in drawn) == [97, 99]
    blank = TrainingData(
        sources=[DataSource(source=rows_file(tmp_path / "b.jsonl", [{"text": " "}]), format="text")]
    )
    with pytest.raises(InputError, match="each is blank or"):
        training_chunk(blank, Letters(), 64, seed=0, earlier=(), budget=9)


def test_calibration_batches_have_equal_lengths_together(tmp_path):
    rows = [{"prompt": "a" * i, "completion": "b"} for i in (9, 1, 2)]
    source = DataSource(source=rows_file(tmp_path / "a.jsonl", rows))
    given = Calibration(data=source, num_sequences=10, max_length=5, batch_size=2)
    first, second = sequences.calibration_batches(given, Letters(), seed=1)  # none twice
    assert first["input_ids"].tolist() == [[97, 98, EOS, 0], [97, 97, 98, EOS]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    # The prompt is scored on, but its loss says nothing.
    assert first["labels"].tolist() == [[IGNORED, 98, EOS, IGNORED], [IGNORED, IGNORED, 98, EOS]]
    assert second["input_ids"].tolist() == [[97] * 5]  # of max_length
    two = given.model_copy(update={"num_sequences": 2})
    expected = [(5, 1, 2)[i] for i in itertools.islice(order(3, seed=5), 2)]
    assert [
        tokens.prompt for tokens in sequences.calibration_rows(two, Letters(), seed=5)
    ] == expected
    # Several sources divide the sequences by weight, and each has one at least.
    guard = {"source": GENERAL, "format": "text", "weight": 4}
    divided = given.model_copy(
        update={"data": (source, DataSource(**guard), DataSource(**guard | {"weight": 0.1}))}
    )
    of_text = [
        tokens.prompt == 0 for tokens in sequences.calibration_rows(divided, Letters(), seed=0)
    ]
    assert of_text == [False] * 2 + [True] * 9
