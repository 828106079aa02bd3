import json

import pytest

from ptl.errors import InputError
from ptl.evaluation import evaluate


def written(folder, *outcomes, task="t", start=0, digest="d"):
    folder.mkdir(exist_ok=True)
    lines = [
        {"task": task, "id": str(i), "prompt_digest": f"{digest}{i}", "correct": correct}
        for i, correct in enumerate(outcomes, start)
    ]
    with (folder / "items.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return folder


def test_equal_and_worse_models(tmp_path):
    a = written(tmp_path / "a", *[1] * 480, *[0] * 20)
    b = written(tmp_path / "b", *[1] * 440, *[0] * 60)
    equal, worse, better = (evaluate.compare(*pair, 0.02, 0.05)["t"] for pair in ((a, a), (a, b), (b, a)))
    assert [pair.fails(strict=False) for pair in (equal, worse, better)] == [False, True, False]
    assert worse.difference == pytest.approx(-0.08)
    assert (worse.regressions, worse.improvements) == (40, 0)


def test_unclear_fails_only_when_strict(tmp_path):
    a, b = written(tmp_path / "a", *[1] * 18, 0, 0), written(tmp_path / "b", *[1] * 17, 0, 0, 0)
    pair = evaluate.compare(a, b, 0.02, 0.05)["t"]
    assert (pair.verdict, pair.fails(strict=False), pair.fails(strict=True)) == ("unclear", False, True)


def test_each_benchmark_is_compared_and_alpha_is_shared(tmp_path):
    a, b = (written(tmp_path / name, *[1] * 100) for name in "ab")
    written(a, *[1] * 400, task="u")
    written(b, *[0] * 40, *[1] * 360, task="u")
    compared = evaluate.compare(a, b, 0.02, 0.05)
    assert {name: pair.verdict for name, pair in compared.items()} == {"t": "unclear", "u": "inferior"}
    assert compared["t"].alpha == 0.025


def test_table_shows_the_numbers(tmp_path):
    a = written(tmp_path / "a", *[1] * 480, *[0] * 20, task="tiny_reasoner")
    b = written(tmp_path / "b", *[1] * 440, *[0] * 60, task="tiny_reasoner")
    *_, first, second, _ = evaluate.comparison_table(evaluate.compare(a, b, 0.02, 0.05)).splitlines()
    assert first.replace("│", " ").split() == ["tiny_reasoner", "96.0%", "40", "-8.0", "9.1e-13", "inferior"]
    assert second.replace("│", " ").split() == ["500", "88.0%", "0", "(-10.0", "to", "-6.0)", "1.8e-12"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: written(folder, 1, 1), "different items"),
        (lambda folder: written(folder, 1, 1, 1, digest="e"), "prompts of t item 0 differ"),
        (lambda folder: folder, "no items.jsonl"),
    ],
)
def test_other_items_and_missing_files_are_errors(tmp_path, make, message):
    a = written(tmp_path / "a", 1, 1, 1)
    with pytest.raises(InputError, match=message):
        evaluate.compare(a, make(tmp_path / "b"), 0.02, 0.05)


@pytest.mark.parametrize("margin, alpha", [(-0.1, 0.05), (1.0, 0.05), (0.02, 0.0), (0.02, 0.5)])
def test_margin_and_alpha_are_checked(tmp_path, margin, alpha):
    a = written(tmp_path / "a", 1)
    with pytest.raises(InputError, match="compare: margin="):
        evaluate.compare(a, a, margin, alpha)
