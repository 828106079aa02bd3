"""Rewards: right, wrong and malformed answers."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from ptl.config.data import Reward
from ptl.errors import WorkError
from ptl.recovery.rewards import REWARDS, program, text_of
from ptl.sandbox import runner


def score(name, answer, reference, **settings):
    (value,) = REWARDS[name]([answer], [reference], Reward(name=name, **settings))
    return value


def test_final_answer_must_stand_alone_and_math_compares_values_in_other_threads_too():
    for name, answer, reference, reward in (
        ("final_answer", "74-34=40\n#### 40", "70-30=40\n#### 40", 1),
        ("final_answer", "#### 4\n#### 40", "40", 1),  # the last one counts
        ("final_answer", "#### 40 or 41", "40", 0),  # it must stand alone
        ("final_answer", "so #### 40", "40", 0),
        ("final_answer", "#### 1,024", "1024", 1),
        ("final_answer", "#### 0.5", "#### 0.50", 0),  # digit for digit
        ("final_answer", "#### 7", "no number", 0),
        ("math", r"The answer is $\boxed{\frac{1}{2}}$.", "0.5", 1),
        ("math", r"\boxed{2x+1}", "1+2x", 1),
        ("math", r"\boxed{3}", "4", 0),
        ("math", "5*2=10\n#### 10", "3+7=10\n#### 10", 1),
        ("math", "#### 1,000", "#### 1000", 1),
        ("math", "#### (1, 2)", "#### (1, 2)", 1),
        ("math", "#### [2, 5)", "[2, 5)", 1),
        ("math", r"#### \(\boxed{(1, 2)}\)", r"#### (1, 2)", 1),
        ("math", "#### (1, 3)", "#### (1, 2)", 0),
        ("math", "#### 1,2", "#### 12", 0),
        ("math", "#### (100, 200)", "(100,200)", 1),
        ("math", r"\boxed{(100,200)}", "(100,200)", 1),
        ("math", r"#### \$1,800.50", "1800.5", 1),
        ("math", "", "4", 0),
        ("math", r"\boxed{3}", "", None),  # not judged without a reference that can be read
    ):
        assert score(name, answer, reference) == reward, (name, answer)
    with ThreadPoolExecutor() as threads:
        assert threads.submit(score, "math", r"\boxed{0.5}", r"\frac{1}{2}").result() == 1


def test_code_runs_the_tests_in_the_sandbox(monkeypatch):
    try:
        runner.require_support()
    except WorkError as error:
        pytest.skip(f"no sandbox here: {error}")
    tests, reward = ["assert double(3) == 6"] * 3, Reward(name="code")
    answers = [
        "```python\ndef double(x):\n    return 2 * x\n```",
        "def double(x): return x",
        "not python",
    ]
    assert REWARDS["code"](answers, tests, reward) == [1.0, 0.0, 0.0]
    outcomes = [runner.Outcome(False, "timeout", ""), runner.Outcome(True, "passed", "")]
    monkeypatch.setattr(runner, "run_many", lambda pairs: outcomes)
    assert REWARDS["code"](answers[:2], tests[:2], reward, (logged := {}).__setitem__) == [0.0, 1.0]
    assert logged == {"code_timeouts": 0.5}
    # the first block
    assert program("Sure:\n```py\nx = 1\n```\nor\n```py\nx = 2\n```\n") == "x = 1\n"
    # cut off by the limit of tokens
    assert program("```python\nx = 1") == "x = 1" == program("x = 1")
    assert program("```Python \r\nx = 1\n```\nThis works.") == "x = 1\n"
    assert program("Use ```x``` like\n```py3\nx = 1\n```\nprose") == "x = 1\n"
    assert program("Run:\n```bash\nls\n```\nThen\n```python3\nx = 1\n```") == "x = 1\n"


def test_format_matches_the_whole_answer():
    assert [
        score("format", text, "") for text in ("2+2=4\n#### 4", r"so \boxed{4}.", "it is 4")
    ] == [1, 1, 0]
    assert score("format", "<think>a</think>b c", "", pattern=r"<think>.*</think>b") == 0
    assert text_of([{"role": "assistant", "content": "4"}]) == text_of("4") == "4"
