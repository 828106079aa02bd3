"""Training rows that share text with a benchmark are left out, and what could not be compared is said."""

import json
import tempfile
import unicodedata
from pathlib import Path

import pytest
from rows import Letters, rows_file

from ptl.config.data import DataSource, Decontaminate, TrainingData
from ptl.data import decontamination
from ptl.data.sequences import prompt_rows, training_chunk
from ptl.data.sources import SourceRow
from ptl.errors import InputError
from ptl.evaluation.evaluate import read_items

TRAIN, TEXT = DataSource(source="train"), DataSource(source="train", format="text")
SENTENCE = "Ann buys seven green apples and nine red pears at the small market on Sunday morning"
WORDS = [f"word{number}" for number in range(20)]


def evaluated(folder, items, *unscored):
    """What `write_items` writes of (task, prompt, target), or of a prompt; of a task without prompts its name."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    items = [("words", item, "1") if isinstance(item, str) else item for item in items]
    rows = [dict(zip(("task", "prompt", "target"), item, strict=True)) for item in items]
    rows_file(folder / "items.jsonl", [*rows, *({"task": name} for name in unscored)])
    return folder


def filter_of(folder, items, *unscored):
    return decontamination.build(Decontaminate(), evaluated(folder, items, *unscored))


def counts(report):
    return tuple(
        report[name]
        for name in ("rows_compared", "rows_dropped", "benchmark_items", "benchmark_items_short")
    )


def kept(leak_filter, rows, source=TRAIN):
    """Which rows stay; a text is a row's prompt, or the whole row of a source of texts."""
    decisions = []
    for number, row in enumerate(rows, len(leak_filter.decisions)):
        columns = row if isinstance(row, dict) else {"prompt": row, "completion": "1", "text": row}
        decisions.append(leak_filter.keeps(SourceRow(columns, source, number)))
    return decisions


def words(begin, end):
    return " ".join(WORDS[begin:end])


def named(text):
    """Three items with two words of their own each."""
    return [text.format(x=f"x{i}", y=f"y{i}", i=i) for i in range(3)]


def kindly(template):
    return [f"Kindly {template} {text}" for text in (words(0, 20), " ".join(WORDS[::-1]))]


OTHERS = [f"a{i} b{i} c{i} d{i}" for i in range(6)]
STEADY = "Work slowly and check every step."
# 13 characters, which are 6 to 8 words
CHINESE = "\u5c0f\u660e\u661f\u671f\u5929\u5728\u5b66\u6821\u95e8\u53e3\u4e70\u4e86\u4e24"
LONG_CHINESE = (
    f"\u8bf7\u95ee{CHINESE}\u672c\u4e66\u548c\u4e09\u652f\u7b14\u5171\u7528\u591a\u5c11\u94b1"
)
PARTS = {  # items, a row, whether it stays
    "all words of a long line": ([words(0, 20)], f"So {words(0, 20)} it is", False),
    "thirteen": ([words(0, 20)], f"So {words(4, 17)} it is", False),
    "the last thirteen": ([words(0, 20)], f"So {words(7, 20)} it is", False),
    "twelve": ([words(0, 20)], f"So {words(4, 16)} it is", True),
    "thirteen with three of a template": (
        kindly("tell us"),
        f"Kindly tell us {words(0, 10)}",
        False,
    ),
    "thirteen with four of a template": (
        kindly("do tell us"),
        f"Kindly do tell us {words(0, 9)}",
        True,
    ),
    "the first four of six": ([words(0, 6)], words(0, 4), True),
    "four": ([words(0, 4)], f"So {words(0, 4)} it is", False),
    "three inside a line": ([words(0, 3)], f"So {words(0, 3)} it is", True),
    "three as a line": ([words(0, 3)], f"Q: {words(0, 3)}\nA:", False),
    "four of a second sentence": (
        [f"{words(0, 9)}.\n{words(10, 14)}."],
        f"So {words(10, 14)} it is",
        False,
    ),
    "words like a label": ([words(0, 6)], "word0\nword1 word2: word3 word4 word5", False),
    "the first of two lines": ([f"{words(0, 4)}\n{words(4, 8)}"], f"So {words(0, 4)} it is", True),
    "the last of two lines": ([f"{words(0, 4)}\n{words(4, 8)}"], f"So {words(4, 8)} it is", False),
    "own words first": (named("{x} {y} is the question"), "Hello x0 y0 is the thing", False),
    "own words last": (named("Tell me about the {x} {y}"), "Hello about the x0 y0 again", False),
    "below a table": (
        named("{i} 5 {i} 7 {i} 9\nWhich one is {x} {y} here?"),
        "So one is x0 y0 again",
        False,
    ),
    "words that a third shares": (named("Tell me about the {x} {y}") + OTHERS, "x0 y0", False),
    "words that fewer share": (named("Tell me about the {x} {y}")[:2] + OTHERS, "x0 y0", True),
    "a template's line": (
        [f"{STEADY}\n{words(0, 9)}", f"{STEADY}\n{words(9, 19)}"],
        f"{STEADY}\nWhy?",
        True,
    ),
    "a line of code": ([f"x = f(1, 2)\n{words(0, 9)}\nhere?"], "So x = f(1, 2) it is", True),
    "Chinese": ([LONG_CHINESE], f"\u597d\u3002{LONG_CHINESE}\u3002", False),
    "thirteen characters of Chinese": ([LONG_CHINESE], f"{CHINESE}\u74f6\u725b\u5976\u3002", True),
    "a long answer": ([("words", "Why?", words(0, 13))], f"So {words(0, 13)} it is", False),
    "a short answer": ([("words", "Why?", words(0, 12))], f"So {words(0, 12)} it is", True),
}


@pytest.mark.parametrize("case", PARTS)
def test_which_part_of_an_item_is_a_copy(tmp_path, case):
    items, row, stays = PARTS[case]
    assert kept(filter_of(tmp_path, items), [row]) == [stays]


def test_the_report_counts_each_row_once_and_quotes_five(tmp_path):
    leaks = filter_of(tmp_path, [SENTENCE, ("words", "Why?", "1"), ("words", "Why?", "2")])
    prompts = [*(f"{number}: {SENTENCE}{'!' * 300}" for number in range(7)), "One plus one?"]
    rows = [
        SourceRow({"prompt": prompt, "completion": "2"}, TRAIN, i)
        for i, prompt in enumerate(prompts)
    ]
    for _ in range(2):  # epochs
        assert list(map(leaks.keeps, rows)) == [False] * 7 + [True]
    report = leaks.report()
    assert counts(report) == (8, 7, 3, 2)
    assert report["examples"] == [
        f"train row {i}: {prompt[:200]}" for i, prompt in enumerate(prompts[:5])
    ]
    counted = [{"rows_compared": rows} for rows in (1, 3, 2)]
    assert decontamination.most(counted) == counted[1]
    # Not by the name of the source alone.
    for subset, row, stays in (("algebra", rows[7], True), ("geometry", rows[0], False)):
        assert (
            leaks.keeps(SourceRow(row.columns, DataSource(source="hub/math", subset=subset), 1))
            == stays
        )


def test_training_and_prompts_leave_out_what_shares_text_with_a_benchmark(tmp_path):
    clean = [{"prompt": f"Bob has {i} cups.\n", "completion": f"{i}"} for i in range(10)]
    leaked = [
        # inside, other case and punctuation
        {"prompt": f"Hello! {SENTENCE.upper()}, how many?\n", "completion": "16"},
        {"prompt": "One plus one?\n", "completion": "2"},  # a short item as a whole
        {"prompt": "other\n", "completion": f"so {SENTENCE}"},  # in the answer
    ]
    tests = [
        {"prompt": f"{SENTENCE}. Total?", "completion": "1"},
        {"prompt": "one plus ONE", "completion": "2"},
    ]
    source = DataSource(source=rows_file(tmp_path / "train.jsonl", clean + leaked))
    against = Decontaminate(against=[{"source": rows_file(tmp_path / "test.jsonl", tests)}])

    def trained_on(leaks):
        data = TrainingData(sources=[source])
        chunk = training_chunk(
            data, Letters(), 200, seed=0, earlier=(), budget=800, leak_filter=leaks
        )
        return {"".join(map(chr, tokens.ids[: tokens.prompt])) for tokens in chunk[1:]}

    def asked(leaks):
        return {
            row.columns["prompt"]
            for row in prompt_rows(source, seed=0, skip=0, count=20, leak_filter=leaks)
        }

    for read in (trained_on, asked):
        leaks = decontamination.build(against, None)
        assert read(leaks) == {row["prompt"] for row in clean}
        report = leaks.report()
        assert counts(report) == (13, 3, 2, 1)
        assert report["not_compared"] == ["evaluate.tasks"]
    # Each dropped: an error instead of an endless search.
    rows_file(tmp_path / "train.jsonl", leaked)
    for read in (trained_on, asked):
        with pytest.raises(InputError, match=r"training\.decontaminate"):
            read(decontamination.build(against, None))


def test_items_may_hold_any_character_and_a_benchmark_may_be_named_twice(tmp_path):
    scored = evaluated(tmp_path, [])
    item = {"task": "words", "prompt": "One\u2028two\x85three", "target": "1"}
    # as evaluate writes it
    (scored / "items.jsonl").write_text(json.dumps(item, ensure_ascii=False) + "\n")
    path = rows_file(
        tmp_path / "test.jsonl", [{"short": "Four five six?", "long": SENTENCE, "answer": "1"}]
    )
    twice = [
        {"source": path, "prompt": prompt, "completion": "{answer}"}
        for prompt in ("{short}", "{long}")
    ]
    for tasks, first in ((True, False), (False, True)):
        leaks = decontamination.build(Decontaminate(tasks=tasks, against=twice), scored)
        assert kept(leaks, ["one two three", "four five six", SENTENCE, "seven"]) == [
            first,
            False,
            False,
            True,
        ]
    assert read_items(scored)[0]["prompt"] == item["prompt"]
    assert decontamination.build(Decontaminate(tasks=False), scored) is None


QUESTIONS = {
    "long": [f"Zoé buys {i} green apples, {i + 1} pears and a brûlée for {i + 2} boys; how many?" for i in range(100)],
    "sums": [f"What is {i} + {i + 3}?" for i in range(100)],  # two words beside the template
    "Chinese": [f"小明有{i}个苹果又买了{i + 3}个\uff0c一共几个\uff1f" for i in range(100)],  # full-width , and ?
}  # fmt: skip
SYSTEM = {"role": "system", "content": "You are a careful assistant. Think, then answer."}
MESSAGES = DataSource(source="train", format="messages")
TEMPLATE = DataSource(source="train", prompt="### Problem: {q}\n", completion="### Solution: {a}")


def chat(question, answer, *before):
    return {
        "messages": [
            *before,
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


ROWS = {
    "template of the config": (TEMPLATE, lambda q, a: {"q": q, "a": a}),
    "template in the rows": (TRAIN, lambda q, a: {"prompt": f"Q: {q}\nA:", "completion": f" {a}"}),
    "text": (TEXT, lambda q, a: {"text": f"Some words. {q} It is {a}."}),
    "messages": (MESSAGES, lambda q, a: chat(q, a, SYSTEM)),
    "a later turn": (
        MESSAGES,
        lambda q, a: chat(f"Thanks. {q.upper()}", a, {"role": "user", "content": "Hello!"}),
    ),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("questions", QUESTIONS)
def test_every_exact_copy_is_found(tmp_path, questions, row):
    """The defect: of 100 exact copies in rows of another form none was left out."""
    asked, (source, make) = QUESTIONS[questions], ROWS[row]
    for form, template in (("NFC", "{}"), ("NFD", "Question: {}\nAnswer:")):
        leaks = filter_of(
            tmp_path, [("words", template.format(q), str(i)) for i, q in enumerate(asked)]
        )
        copies = [
            make(unicodedata.normalize(form, question), str(i)) for i, question in enumerate(asked)
        ]
        others = [
            make(f"How many words has sentence number {i} of the book on our table?", str(i))
            for i in range(100)
        ]
        assert kept(leaks, copies + others, source) == [False] * 100 + [True] * 100


def test_what_could_not_be_compared_is_said(tmp_path):
    short = "2 of 3 benchmark items have too few words of their own to be found inside a row."
    found = "1 of 1 training rows were left out: they share text with a benchmark."
    unknown = "Training rows were not compared with perplexity, whose items are not known."
    for items, unscored, said in (
        (
            [WORDS[0], SENTENCE, ""],
            [],
            f"None of 1 training rows shares text with one of 1 benchmark items. {short}",
        ),
        (["Hello to all of you"], ["perplexity"], f"{found} {unknown}"),
        ([], ["perplexity"], unknown),
        ([], [], "Training rows were not compared with a benchmark: there are no items."),
    ):
        leaks = filter_of(tmp_path, items, *unscored)
        kept(leaks, ["Hello to all of you"])
        assert decontamination.sentence(leaks.report()) == said


GROUPS = {
    "two templates": lambda q, i: (f"Question: {q}\nAnswer:", f"Problem: {q}\nSolution:")[i % 2],
    "instruction": lambda q, i: (
        f"Answer the question below with one number, after all of your steps. {q} Let's go."
    ),
    "labels in a line": lambda q, i: f"Q: {q} A:",
    "other subjects": lambda q, i: f"The subject of number {i} here\n{q}\nAnswer:",
    "options": lambda q, i: (
        f"{q}\nA. all of the {i} apples\nB. {i + 4} only\nC. none of these\nAnswer:"
    ),
}
SHORT_QUESTIONS = {
    "nine words": lambda i: (
        f"How many {('red', 'green', 'old', 'new')[i % 4]} apples does Ann sell for {i + 3}?"
    ),
    "sums": lambda i: f"What is {i + 2} + {3 * i + 1}?",
}


@pytest.mark.parametrize("group", GROUPS)
def test_a_copy_of_a_short_question_is_found_whatever_template_its_group_has(tmp_path, group):
    """The defect: 10 verbatim copies, none found, and `None of 10 rows shares text`."""
    for question in SHORT_QUESTIONS.values():
        asked = [question(i) for i in range(10)]
        leaks = filter_of(
            tmp_path, [GROUPS[group](question, i) for i, question in enumerate(asked)]
        )
        assert not any(kept(leaks, [f"Hello there. {question}\nThank you." for question in asked]))
        # trained on in the benchmark's own form
        others = [
            GROUPS[group](f"Where do {i + 60} white boats go with Bob?", i) for i in range(10, 20)
        ]
        assert all(kept(leaks, others)) and leaks.report()["benchmark_items_short"] == 0


HIDDEN = [
    (
        "Is Tom &amp; Ann&#39;s &quot;big&quot; shop &lt; 5&nbsp;km away",
        'Is Tom & Ann\'s "big" shop < 5 km away',
    ),
    (json.dumps(json.dumps('Caf\u00e9 one\nsells "two"\tcakes')), "Caf\u00e9 one sells two cakes"),
    # invisible
    ("\u200bHow\u2060 ma\u00adny b\u200bo\u034fx\ufe0fes has\u2063 Ann", "How many boxes has Ann"),
    ("Pay 12,500 of 1{,}234,567 euros now", "Pay 12500 of 1234567 euros now"),
    ("\u210cow \U0001d40cany boxes has Ann", "how many boxes has Ann"),  # letters of mathematics
    ("Die STRASSE ist sehr lang", "Die Straße ist sehr lang"),
]


def test_what_hides_a_copy_is_undone_and_an_item_whose_copy_is_not_found_not_compared(tmp_path):
    for hidden in HIDDEN:
        for row, item in (hidden, hidden[::-1]):
            assert kept(filter_of(tmp_path, [item]), [f"So: {row}, yes?"], TEXT) == [False], row
    # One word of a question is its own, and two items ask the same of other tables.
    capitals = [f"Please say: What is the capital of {name}?" for name in ("Peru", "Chad", "Fiji")]
    tables = [
        f"{row}\nWhich of these numbers is the largest?" for row in ("3 5 6", "7 1 8", "2 4 9")
    ]
    assert [
        filter_of(tmp_path, items).report()["benchmark_items_short"] for items in (capitals, tables)
    ] == [3, 3]


def test_rows_are_compared_by_column_and_as_trained(tmp_path):
    """The template's words are in the way of some items, and a part of another."""
    parts = (words(0, 8), words(8, 16))
    for item, prompt, completion, columns in (
        (words(0, 16), "Question: {a}\nAnswer: ", "{b}", parts),
        (words(0, 16), "{a}", "Answer: {b}", parts),
        (words(0, 5), "Problem: {a}\n", "Solution: {b}", (words(0, 3), words(3, 5))),
        ("Subtract the number 17 from 1", "Subtract the number {a} from {b}", "{a}", ("17", "1")),
    ):
        source = DataSource(source="train", prompt=prompt, completion=completion)
        assert kept(
            filter_of(tmp_path, [item]), [dict(zip("ab", columns, strict=True))], source
        ) == [False], prompt


def test_thoughts_and_calls_of_tools_are_compared_too(tmp_path):
    question, source = words(0, 16), DataSource(source="train", format="messages")
    asked = {"role": "user", "content": "1+1?"}
    calls = [{"function": {"name": "ask", "arguments": {"question": question}}}]
    written = [{"function": {"name": "ask", "arguments": json.dumps({"question": question})}}]
    answers = [
        {"reasoning_content": question},
        {"thinking": question},
        {"tool_calls": calls},
        {"tool_calls": written},
    ]
    turns = [{"role": "assistant", "content": "2", **fields} for fields in ({}, *answers)]
    rows = [{"messages": [asked, turn]} for turn in turns]
    later = [{"messages": [asked, turn, asked, turns[0]]} for turn in turns]
    assert kept(filter_of(tmp_path, [question]), rows + later, source) == [True, *[False] * 4] * 2


def test_a_benchmark_of_chats_is_compared_without_its_system_messages(tmp_path):
    """Four of them, each in a quarter of the chats, are no words that all items share, and no items."""
    texts = [f"{words(5 * number, 20)} {words(0, 5 * number)}." for number in range(4)]
    systems = [SYSTEM | {"content": text} for text in texts]
    chats = [
        chat(f"How many crêpes are {n} and {n * n} and {n + 7}?", str(n), systems[n % 4])
        for n in range(80)
    ]
    path = rows_file(tmp_path / "chats.jsonl", chats)
    leaks = decontamination.build(
        Decontaminate(against=[{"source": path, "format": "messages"}]), None
    )
    rows = [f"{texts[0]}\nWhat is the capital of France?", "how many crêpes are 3 and 9 and 10"]
    assert kept(leaks, rows) == [True, False]
