"""A model's own answers: written as it is served, verified, and read in the place of the rows'."""

import json
import shutil

import pytest
from chats import THINKER
from checkout import DENSE, EXAMPLE

from ptl.config.chat import Chat
from ptl.config.data import TrainingData
from ptl.config.recover import RecoverStage
from ptl.config.run import Calibration, Evaluate
from ptl.data.sequences import training_chunk
from ptl.errors import InputError, WorkError
from ptl.model import pretrained
from ptl.preflight.rows import check_data, check_own_answers
from ptl.recovery.answers import in_place_of, write_answers

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("answers")]
ROWS = {"source": str(EXAMPLE / "train.jsonl.gz"), "prompt": "{question}", "completion": "{answer}"}
OWN = ROWS | {
    "answers": "self",
    "num_prompts": 12,
    "max_new_tokens": 150,
    "reward": {"name": "final_answer"},
}
EVALUATE = Evaluate(tasks=[{"name": "gsm8k"}], batch_size=12)


def written(dst, src=THINKER, chat=True, **changes):
    """The report, the rows, and the training data with them."""
    settings = {"enabled": chat, "template_kwargs": {"enable_thinking": True} if chat else {}}
    data, chat = TrainingData(**OWN | changes), Chat(**settings)
    report = write_answers(src, dst, data, EVALUATE, chat, model="sha256:abc", seed=3)
    rows = [json.loads(line) for line in (dst / "answers.jsonl").read_text().splitlines()]
    return report, rows, data.model_copy(update={"sources": in_place_of(data.sources, dst, chat)})


def test_correct_answers_are_kept_with_their_thoughts_and_trained_on(tmp_path):
    report, rows, data = written(tmp_path / "a")
    assert (report.prompts, report.written, report.ended, report.sampling) == (12, 12, 12, {})
    assert 8 <= report.kept == len(rows) <= 12 and 20 < report.answer_tokens < 100
    for row in rows:
        question, answer = row["messages"]
        assert question["role"] == "user" and answer["content"].startswith("<think>")
        assert "</think>#### " in answer["content"]
        assert (row["sample"], row["seed"], row["model"], row["sampling"]) == (
            0,
            3,
            "sha256:abc",
            {},
        )
    assert written(tmp_path / "b")[1] == rows  # greedily
    tokenizer = pretrained.tokenizer(THINKER)
    budget = {"seed": 0, "earlier": [], "budget": 400, "chat": Chat(enabled=True)}
    texts = [
        tokenizer.decode(tokens.ids)
        for tokens in training_chunk(data, tokenizer, 256, **budget)[1:]
    ]
    said = {
        "<|user|>{}<|assistant|>{}<|eos|>".format(*(turn["content"] for turn in row["messages"]))
        for row in rows
    }
    assert texts and set(texts) <= said


def test_samples_are_drawn_as_the_makers_recommend_and_texts_stay(tmp_path):
    settings = {
        "answers": "self",
        "keep": "ended",
        "samples": 2,
        "num_prompts": 12,
        "max_new_tokens": 150,
    }
    sources = [ROWS | {"weight": 3}, {"source": "texts.jsonl", "format": "text"}]
    src = shutil.copytree(THINKER, tmp_path / "model")
    recommended = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "eos_token_id": 1,
    }
    (src / "generation_config.json").write_text(json.dumps(recommended))
    data, chat = TrainingData(sources=sources, **settings), Chat(enabled=True)
    for name in "ab":
        report = write_answers(src, tmp_path / name, data, EVALUATE, chat, model="m", seed=0)
    assert len({(tmp_path / name / "answers.jsonl").read_text() for name in "ab"}) == 1
    assert report.sampling == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert report.written == 24 and report.kept == report.ended
    rows = [json.loads(line) for line in (tmp_path / "a/answers.jsonl").read_text().splitlines()]
    answers = [
        {row["messages"][1]["content"] for row in rows if row["sample"] == sample}
        for sample in (0, 1)
    ]
    assert answers[0] != answers[1]
    own, texts = in_place_of(data.sources, tmp_path / "a", chat)
    assert (own.format, own.weight, texts) == ("messages", 3, data.sources[1])


def test_answers_that_the_limit_cuts_are_of_no_use_unless_all_are_kept(tmp_path, capsys):
    none = r"^training\.answers: none of 12 answers ended; raise training"
    with pytest.raises(WorkError, match=none):
        written(tmp_path / "a", max_new_tokens=8)
    with pytest.raises(
        WorkError, match=r"12 ended, and none of them is correct; correct training\.reward"
    ):
        written(tmp_path / "c", reward={"name": "final_answer", "answer": "#### 1234"})
    # Before anything is pruned the log says that only the short ones are left.
    report, *_ = written(tmp_path / "d", max_new_tokens=25)
    assert (
        0 < report.kept <= report.ended < 9
        and "hit the limit of 25 tokens" in capsys.readouterr().out
    )
    report, rows, _ = written(tmp_path / "b", max_new_tokens=8, keep="all")
    assert (report.ended, report.kept) == (0, 12) and all(
        row["messages"][1]["content"] for row in rows
    )
    assert all(row["truncated"] for row in rows)
    # Nor is one of use to a prompt whose beginning the context has no room for: others are answered.
    report, short, _ = written(tmp_path / "e", max_new_tokens=200, keep="all")
    lengths = [
        [
            len(pretrained.tokenizer(THINKER)(row["messages"][0]["content"])["input_ids"])
            for row in each
        ]
        for each in (short, rows)
    ]
    assert report.prompts == 12 and max(lengths[0]) < 56 < max(lengths[1])


@pytest.mark.parametrize("begun", ["", "<think>"])
def test_truncated_answers_are_trained_on_as_they_were_written(begun, tmp_path):
    """Without an end of the turn, and within the thought that the prompt may have begun."""
    src = shutil.copytree(THINKER, tmp_path / "model")
    with (src / "chat_template.jinja").open("a") as template:
        template.write("{%- if add_generation_prompt %}{{ '" + begun + "' }}{%- endif %}")
    report, rows, data = written(tmp_path / "a", src, max_new_tokens=8, keep="all")
    assert (report.ended, report.kept) == (0, 12)
    said = {
        "<|user|>{}<|assistant|>{}".format(*(turn["content"] for turn in row["messages"]))
        for row in rows
    }
    assert all("<|assistant|><think>" in text for text in said)
    budget = {"seed": 0, "earlier": [], "budget": 400, "chat": Chat(enabled=True)}
    tokenizer = pretrained.tokenizer(src)
    texts = [
        tokenizer.decode(tokens.ids)
        for tokens in training_chunk(data, tokenizer, 256, **budget)[1:]
    ]
    assert texts and set(texts) <= said


def test_rows_need_no_answers_of_their_own(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": f"Tom has {n} pens. How many?"}) + "\n" for n in range(9))
    )
    settings = {"source": str(rows), "prompt": "{question}", "answers": "self", "keep": "ended"}
    data = TrainingData(**settings, num_prompts=4, max_new_tokens=150)
    check_own_answers(data)
    check_data(Calibration(data=data.sources[0], answers="self"), data, [RecoverStage()])
    with pytest.raises(
        InputError, match=r"row 1 of .*rows\.jsonl lacks 'answer', which a template names"
    ):
        check_own_answers(data.model_copy(update={"keep": "correct"}))
    report = write_answers(
        THINKER, tmp_path / "a", data, EVALUATE, Chat(enabled=True), model="m", seed=0
    )
    assert report.kept == report.ended > 0
    given = data.model_copy(update={"answers": "given"})
    with pytest.raises(InputError, match="lacks 'completion', which a template names"):
        check_data(Calibration(data=data.sources[0]), given, [RecoverStage()])


def test_without_a_chat_a_completion_follows_its_prompt(tmp_path):
    report, rows, data = written(tmp_path / "a", DENSE, chat=False, prompt="{question}\n")
    assert report.kept >= 10 and data.sources[0].format == "prompt_completion"
    assert all(
        row["prompt"].endswith("?\n") and row["completion"].count("#### ") == 1 for row in rows
    )
