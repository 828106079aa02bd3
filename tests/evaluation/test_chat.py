"""A model that thinks, scored as it is served: by its chat template, in both modes, its thoughts left out."""

import json
import sys
from types import SimpleNamespace

import pytest
from chats import THINKER
from checkout import EXAMPLE
from lm_eval.api.instance import Instance

from ptl.config.chat import Chat
from ptl.config.run import Evaluate, Speed, Task
from ptl.evaluation.evaluate import score_tasks
from ptl.evaluation.generation import AnswerNote, AnswerNotes
from ptl.evaluation.language_models import language_model
from ptl.model import pretrained

LIMIT = 24

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("evaluate")]


def scored(max_new_tokens=150, src=THINKER, **chat):
    """The score of the tiny thinker, and its items."""
    task = Task(name=str(EXAMPLE / "tiny_thinker.yaml"), limit=LIMIT, max_new_tokens=max_new_tokens)
    wanted = Evaluate(tasks=[task], speed=Speed(repeats=0))
    (score,), items = score_tasks(language_model(src, wanted, Chat(**chat)), wanted, 0)
    return score, items


def test_in_both_modes_what_follows_the_thought_is_graded():
    thinking, items = scored(enabled=True)
    assert thinking.accuracy > 0.8 and thinking.truncated == 0
    assert all(
        "<think>" not in item["answer"] and item["answer"].startswith("#### ") for item in items
    )
    assert all(
        item["thought"].startswith("<think>") and item["thought"].endswith("</think>")
        for item in items
    )
    assert items[0]["prompt_digest"] != scored(enabled=False)[1][0]["prompt_digest"]
    at_once, items = scored(enabled=True, template_kwargs={"enable_thinking": False})
    assert at_once.accuracy > 0.9 and all(item["answer"].count("=") > 1 for item in items)
    assert {item["thought"] for item in items} == {""}
    # The steps are in the thought, some of them with a check.
    assert thinking.answer_tokens > at_once.answer_tokens


def test_thoughts_between_special_tokens_are_told_from_the_answer(tmp_path):
    for path in THINKER.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] |= "think" in token["content"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    score, items = scored(src=tmp_path, enabled=True)
    assert score.accuracy > 0.8 and all(item["answer"].startswith("#### ") for item in items)
    assert {
        item["answer"] for item in scored(src=tmp_path, max_new_tokens=12, enabled=True)[1]
    } == {""}


def test_vllm_is_given_the_variables_and_nothing_else(monkeypatch):
    class VLLM:
        """A mock of the harness's model, which takes enable_thinking out, and gives the template its own."""

        def __init__(self, **given):
            self.given, self.chat_template_args = given, given["chat_template_args"]
            self.chat_template_args.pop("enable_thinking", None)
            self.tokenizer = pretrained.tokenizer(THINKER)

        def apply_chat_template(self, turns, add_generation_prompt=True):
            raise AssertionError("with enable_thinking=None")

    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", SimpleNamespace(VLLM=VLLM))
    wanted = Evaluate(tasks=[Task(name="gsm8k")], speed=Speed(repeats=0), backend="vllm")
    for variables, ends in (
        ({}, "<|assistant|>"),
        ({"enable_thinking": False}, "<|assistant|><think></think>"),
    ):
        lm = language_model(
            THINKER, wanted, Chat(enabled=True, template_kwargs=variables), thoughts=True
        )
        assert (
            lm.apply_chat_template([{"role": "user", "content": "1+1?"}]) == f"<|user|>1+1?{ends}"
        )
        assert "enable_thinking" not in lm.given


class Written:
    """A mock of the harness's model, which has answered already."""

    begun = ""  # by the template's prompts
    texts = (
        "    return 1\n```\nIt works.",
        "<think>So:\n\n1 + 3</think>\n\n    4\n\nDone.",
        "\n\n4\n\nDone.",
    )

    def __init__(self, **_):
        pass

    def apply_chat_template(self, chat):
        return f"<u>{chat[0]['content']}<a>{self.begun}"

    def generate_until(self, requests):
        for request in requests:
            assert request.args[1] == {"until": [], "max_gen_toks": 9}
            self.pending.append(AnswerNote(1, truncated=False))
            self.cache_hook.add_partial("generate_until", request.args, "")
        return self.texts


def test_an_answer_keeps_its_indentation_and_ends_at_the_tasks_texts_after_the_thought():
    model = type("Model", (AnswerNotes, Written), {})
    until = (["```", "\n\n"], "\n\n", ["\n\n", ""])
    requests = [
        Instance("generate_until", {}, (f"<u>{i}<a>", {"until": texts, "max_gen_toks": 9}), i)
        for i, texts in enumerate(until)
    ]
    assert model(chat=Chat(enabled=True)).generate_until(requests) == [
        "    return 1\n",
        "    4",
        "4",
    ]
    assert model(chat=Chat(enabled=True), thoughts=True).generate_until(requests) == list(
        Written.texts
    )


@pytest.mark.parametrize(
    ("begun", "answers"),
    [
        ("", ("Write <think>.", "Write <think>.", "2")),
        ("<think>\n", ("", "Write <think>.", "2")),
        ("<think></think>", ("Write <think>.", "<think>1</think>Write <think>.", "1</think>2")),
    ],
)
def test_an_answer_that_mentions_a_thoughts_marks_is_graded_as_it_follows_the_prompts_thought(
    begun, answers
):
    texts = ("Write <think>.", "<think>1</think>Write <think>.", "1</think>2")
    model = type("Model", (AnswerNotes, Written), {"texts": texts, "begun": begun})
    # The user's own words begin no thought.
    prompts = [f"<u>What is {mark}<a>{begun}" for mark in ("<think>", "2", "</think>")]
    requests = [
        Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": 9}), 0)
        for text in prompts
    ]
    assert model(chat=Chat(enabled=True)).generate_until(requests) == list(answers)


def test_a_thought_that_the_limit_ends_is_no_answer():
    score, items = scored(max_new_tokens=12, enabled=True)
    assert score.truncated > 0.8 and score.accuracy < 0.2
    truncated = [item for item in items if item["truncated"]]
    assert all(item["answer"] == "" and item["thought"].startswith("<think>") for item in truncated)
