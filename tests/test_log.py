"""A training's bar: in a log a few lines with the time left, on a terminal one that is rewritten."""

import io

import pytest

from ptl import log
from ptl.recovery.job import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass by themselves: none."""
    now = [1000.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    return now


def train(show, clock, seconds, steps=100):
    """A training of steps that take `seconds` each, whose loss is logged at every tenth."""
    on_log = progress(show, 10 * steps)
    for step in range(steps + 1):
        metrics = {"num_input_tokens_seen": 10.0 * step}
        on_log(metrics | ({"loss": 2.0} if step and step % 10 == 0 else {}), step)
        clock[0] += seconds


def test_a_training_says_what_is_left_from_its_first_step_and_then_at_each_tenth(clock):
    lines = []
    train(lines.append, clock, 0.1)
    assert lines[:3] == [
        f"[{'-' * 20}] 0% 0 of 1,000 tokens",
        f"[{'-' * 20}] 1% 10 of 1,000 tokens, 9.9 s left",
        f"[##{'-' * 18}] 10% 100 of 1,000 tokens, loss 2.0000, 9.0 s left",
    ]
    assert len(lines) == 12 and lines[-1] == f"[{'#' * 20}] 100% 1,000 of 1,000 tokens, loss 2.0000"


def test_slow_steps_say_so_every_half_minute(clock):
    lines = []
    train(lines.append, clock, 30)
    assert len(lines) == 101 and lines[50].endswith("500 of 1,000 tokens, loss 2.0000, 25 min left")


def test_reinforcement_learning_shows_steps_and_rewards():
    lines = []
    on_log = progress(lines.append, 1000)
    on_log({"progress": 0.0}, 0)
    on_log({"progress": 0.5, "reward": 0.25, "completions/mean_length": 12.0}, 4)
    assert lines[1].startswith(f"[{'#' * 10}{'-' * 10}] 50% step 4, reward 0.250, answers of 12 tokens")


def test_a_later_stage_begins_a_new_bar(clock):
    lines = []
    for _ in range(2):
        train(lines.append, clock, 0.1, steps=2)
    assert [line.split(" ")[1] for line in lines] == ["0%", "50%", "100%"] * 2


def test_a_log_of_a_run_has_bars_only_where_it_would_be_silent(clock):
    file = io.StringIO()
    show = log.on_terminal(file)
    show("recover-1: started")
    train(show, clock, 0.1)
    show("recover-1: done")
    assert file.getvalue() == "recover-1: started\nrecover-1: done\n"
    train(show, clock, 3)
    assert len(file.getvalue().splitlines()) == 2 + 300 // 30


def test_a_terminal_has_one_line_that_fits(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    show = log.on_terminal(terminal)
    show("recover-1: started")
    train(show, clock, 0.1)
    show("recover-1: done")
    first, *others = terminal.getvalue().removeprefix("recover-1: started\n").splitlines()
    assert others.pop() == "recover-1: done" and not first.startswith(log.ONE_UP)
    assert len(others) == 11 and all(line.startswith(log.ONE_UP) for line in others)
    assert max(len(line.removeprefix(log.ONE_UP)) for line in (first, *others)) == 29
