"""The benchmarks that a user runs on machines of his own: what they measure next, and what their tables say."""

import json
import sys

import pytest
from checkout import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import depth
import depth_report
import loops
from depth import CHOICE, RATES, RESULT, Results, Study

LOOP, ONE_SHOT = Study("loop of 4", 0.6, 1000), Study("one-shot", 0.6, 1000)


def row(cell, accuracy, solved=""):
    return depth.asdict(cell) | {"accuracy": accuracy, "solved": solved, "params": 100, "flops": 6e9, "seconds": 3.0}


def answer(results, study, accuracy_of):
    """Measure what is missing, by a function of the learning rate, until nothing is."""
    asked = []
    while missing := results.missing(study):
        asked.append({(cell.phase, cell.learning_rate) for cell in missing})
        for cell in missing:
            results.add(row(cell, accuracy_of(cell.learning_rate)))
    return asked


def test_rates_are_added_while_the_best_is_at_an_edge_of_the_grid(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    lowest = RATES[depth.FIRST_RATES[0]]
    asked = answer(results, LOOP, lambda rate: -abs(rate - lowest))
    assert asked[1:] == [{("choice", RATES[depth.FIRST_RATES[0] - 1])}, {("result", lowest)}] and len(asked[0]) == 3
    assert results.best_rate(LOOP) == lowest and len(results.of(LOOP)) == depth.FEWEST_SEEDS
    # The choice is on other seeds and problems than the results.
    assert not set(CHOICE.seeds) & set(RESULT.seeds) and CHOICE.problem_seed != RESULT.problem_seed
    # An interrupted study measures only what is missing.
    path = tmp_path / "interrupted.jsonl"
    first, *others = Results(path).missing(LOOP)
    Results(path).add(row(first, 0.5))
    assert Results(path).missing(LOOP) == others


def test_a_study_measures_what_its_file_lacks(tmp_path):
    path = tmp_path / "results.jsonl"
    loops.study(path, [{"arm": "a", "seed": 1}], lambda cell: {"solved": [1, 0]})
    loops.study(path, [{"arm": "a", "seed": 1}, {"arm": "a", "seed": 2}], lambda cell: {"solved": [cell["seed"]]})
    found = [{"arm": "a", "seed": 1, "solved": [1, 0]}, {"arm": "a", "seed": 2, "solved": [2]}]
    assert loops.json_rows(path) == found


def test_the_table_compares_with_the_best_one_shot_by_seed(tmp_path, capsys):
    results = Results(tmp_path / "results.jsonl")
    answer(results, ONE_SHOT, lambda rate: 0.5)
    answer(results, LOOP, lambda rate: 0.75)
    # Each seed of the loop solves eight problems more than the one before; the last has no counterpart.
    for study, seeds, pattern, more in ((ONE_SHOT, 6, "01" * 1000, 0), (LOOP, 7, "0111" * 500, 8)):
        best = results.best_rate(study)
        for number, seed in enumerate(RESULT.seeds[:seeds]):
            bits = pattern.replace("0", "1", more * number)
            cell = study.cell(RESULT, best, seed)
            results.add(row(cell, bits.count("1") / len(bits), f"{int(bits, 2):0500x}"))
    depth_report.print_table(results)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| 60% | 1,000 | one-shot | ") and "| reference | - |" in lines[2]
    # By hand: differences of 25.0 to 27.0 points, so t = 85 with five degrees of freedom.
    assert "76.2 ± 0.8 | 7 | +26.0 ± 0.8 points | 4e-09 |" in lines[3]


@pytest.mark.nightly
@pytest.mark.parametrize("part", ["recovery", "prune", "evaluate-plain", "evaluate-hf"])
def test_every_part_is_measured(part, tmp_path, monkeypatch, capsys):
    import gpu
    import train

    train.make("0.5M", tmp_path)
    tiny = "--shape 0.5M --steps 4 --warmup 2 --length 32 --batch-size 2 --items 4 --new-tokens 4 --sequences 4"
    options = [*tiny.split(), "--repeats", "1", "--gpu", "h100", "--eval-batch-size", "4", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options, "--measure", part, "--folder", str(tmp_path)])
    monkeypatch.chdir(gpu.ROOT)
    gpu.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    if part == "recovery":
        assert found["ptl"]["tokens_per_s"] > 0 and found["bare"]["tokens_per_s"] > 0
        assert found["peak_flops"] == 67e12 and 0 < found["ptl"]["mfu"] < 1
    elif part == "prune":
        assert found["params"] < 0.9 * 492_384 and found["seconds"] > 0
    else:
        assert found["items_per_s"] == pytest.approx(4 / found["seconds"])
