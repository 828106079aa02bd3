"""A training's bar: a few lines with the time left."""

from ptl import log
from ptl.recovery.job import progress


def train(monkeypatch, show, seconds, steps=100):
    """A training of steps that take so many seconds each, whose loss is logged at every tenth."""
    now = [1000.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    on_log = progress(show, 10 * steps)
    for step in range(steps + 1):
        metrics = {"num_input_tokens_seen": 10.0 * step}
        on_log(metrics | ({"loss": 2.0} if step and step % 10 == 0 else {}), step)
        now[0] += seconds


def test_a_training_says_what_is_left_from_its_first_step_at_each_tenth_and_every_half_minute(
    monkeypatch,
):
    lines = []
    train(monkeypatch, lines.append, 0.1)
    assert lines[:3] == [
        "[----------] 0% 0 of 1,000 tokens",
        "[----------] 1% 9.9 s left, 10 of 1,000 tokens",
        "[#---------] 10% 9.0 s left, 100 of 1,000 tokens, loss 2.000",
    ]
    assert len(lines) == 12 and lines[-1] == "[##########] 100% 1,000 of 1,000 tokens, loss 2.000"
    train(monkeypatch, lines.append, 0.1, steps=2)  # a later stage begins a new bar
    assert [line.split(" ")[1] for line in lines[12:]] == ["0%", "50%", "100%"]
    slow = []
    train(monkeypatch, slow.append, 30)
    assert len(slow) == 101 and slow[50].endswith("25 min left, 500 of 1,000 tokens, loss 2.000")
