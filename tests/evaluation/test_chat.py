"""A model that thinks, scored as it is served: by its chat template, in both modes, its thoughts left out."""

import pytest
from chats import THINKER
from checkout import EXAMPLE

from ptl.config.chat import Chat
from ptl.config.run import Evaluate, Speed, Task
from ptl.evaluation.evaluate import score_tasks
from ptl.evaluation.language_models import language_model

LIMIT = 24

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("evaluate")]


def scored(max_new_tokens=150, **chat):
    """The score of the tiny thinker, and its items."""
    task = Task(name=str(EXAMPLE / "tiny_thinker.yaml"), limit=LIMIT, max_new_tokens=max_new_tokens)
    wanted = Evaluate(tasks=[task], speed=Speed(repeats=0))
    (score,), items = score_tasks(language_model(THINKER, wanted, Chat(**chat)), wanted, 0)
    return score, items


def test_in_both_modes_what_follows_the_thought_is_graded():
    thinking, items = scored(enabled=True)
    assert thinking.accuracy > 0.8 and thinking.truncated == 0
    assert all("<think>" not in item["answer"] and item["answer"].startswith("#### ") for item in items)
    assert items[0]["prompt_digest"] != scored(enabled=False)[1][0]["prompt_digest"]
    at_once, items = scored(enabled=True, template_kwargs={"enable_thinking": False})
    assert at_once.accuracy > 0.9 and all(item["answer"].count("=") > 1 for item in items)
    # The steps are in the thought, some of them with a check.
    assert thinking.answer_tokens > at_once.answer_tokens


def test_a_thought_that_the_limit_ends_is_no_answer():
    score, items = scored(max_new_tokens=12, enabled=True)
    assert score.truncated > 0.8 and score.accuracy < 0.2
    assert all(item["answer"] == "" for item in items if item["truncated"])
