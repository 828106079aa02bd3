"""Rewards: right, wrong and malformed answers."""

import pytest

from ptl.config.recover import Reward
from ptl.errors import WorkError
from ptl.recovery.rewards import REWARDS, program, text_of
from ptl.sandbox import runner


def score(name, answer, reference, **settings):
    (value,) = REWARDS[name]([answer], [reference], Reward(name=name, **settings))
    return value


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("74-34=40\n#### 40", 1),
        ("#### 4\n#### 40", 1),  # the last one counts
        ("#### 41", 0),
        ("#### 40 or 41", 0),
        ("40", 0),
        ("so #### 40", 0),
        ("####", 0),
        ("", 0),
    ],
)
def test_final_answer_must_stand_alone(answer, reward):
    assert score("final_answer", answer, "70-30=40\n#### 40") == reward


def test_final_answer_reads_thousands_and_plain_references():
    assert score("final_answer", "#### 1,024", "1024") == 1
    assert score("final_answer", "#### -7", "#### -7") == 1
    assert score("final_answer", "#### 7", "#### -7") == 0
    assert score("final_answer", "#### 7", "no number") == 0


@pytest.mark.parametrize(
    ("answer", "reference", "reward"),
    [
        (r"The answer is $\boxed{\frac{1}{2}}$.", "0.5", 1),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1),
        (r"\boxed{2x+1}", "1+2x", 1),
        (r"\boxed{(1, 2)}", "(1,2)", 1),
        (r"\boxed{3}", "4", 0),
        ("5*2=10\n#### 10", "3+7=10\n#### 10", 1),
        ("#### 1,000", "#### 1000", 1),
        ("#### 10", "#### 11", 0),
        ("I do not know", "4", 0),
        ("", "4", 0),
    ],
)
def test_math_compares_values(answer, reference, reward):
    assert score("math", answer, reference) == reward


def test_math_does_not_judge_without_a_readable_reference():
    assert score("math", r"\boxed{3}", "") is None


def test_code_runs_the_tests_in_the_sandbox(monkeypatch):
    try:
        runner.require_support()
    except WorkError as error:
        pytest.skip(f"no sandbox here: {error}")
    tests = "assert double(3) == 6"
    answers = ["```python\ndef double(x):\n    return 2 * x\n```", "def double(x): return x", "not python"]
    assert REWARDS["code"](answers, [tests] * 3, Reward(name="code")) == [1.0, 0.0, 0.0]
    outcomes = [runner.Outcome(False, "timeout", ""), runner.Outcome(True, "passed", "")]
    monkeypatch.setattr(runner, "run_many", lambda pairs: outcomes)
    logged = {}
    assert REWARDS["code"](answers[:2], [tests] * 2, Reward(name="code"), logged.__setitem__) == [0.0, 1.0]
    assert logged == {"code_timeouts": 0.5}
    assert program("Sure:\n```py\nx = 1\n```\nDone.") == "x = 1\n"


def test_format_matches_the_whole_answer():
    assert score("format", "2+2=4\n#### 4", "") == 1
    assert score("format", r"so \boxed{4}.", "") == 1
    assert score("format", "it is 4", "") == 0
    assert score("format", "<think>a</think>b", "", pattern=r"<think>.*</think>.+") == 1
    with pytest.raises(ValueError, match="no regular expression"):
        Reward(name="format", pattern="(")


def test_references_and_texts():
    assert Reward(name="code").reference_template == "{test}"
    assert Reward(name="math", answer="{solution}").reference_template == "{solution}"
    assert text_of([{"role": "assistant", "content": "4"}]) == text_of("4") == "4"
