"""The study of depth: what it measures next, how it resumes, and what its table says."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import depth
import depth_report
import loops
from depth import CHOICE, RATES, RESULT, Results, Study
from recovery import CPT

from ptl.model import checkpoint

LOOP = Study("loop of 4", 0.6, 1000)
ONE_SHOT = Study("one-shot", 0.6, 1000)


def row(cell, accuracy, solved=""):
    return depth.asdict(cell) | {
        "accuracy": accuracy,
        "solved": solved,
        "params": 100,
        "flops": 6e9,
        "seconds": 3.0,
    }


def answer(results, study, accuracy_of):
    """Measure what is missing, by a function of the learning rate, until nothing is."""
    asked = []
    while missing := results.missing(study):
        asked.append({(cell.phase, cell.learning_rate) for cell in missing})
        for cell in missing:
            results.add(row(cell, accuracy_of(cell.learning_rate)))
    return asked


def test_rates_are_added_while_the_best_is_at_an_edge(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    lowest = RATES[depth.FIRST_RATES[0]]
    asked = answer(results, LOOP, lambda rate: -abs(rate - lowest))
    assert [len(each) for each in asked] == [3, 1, 1]
    assert asked[1] == {("choice", RATES[depth.FIRST_RATES[0] - 1])}
    assert asked[2] == {("result", lowest)}
    assert results.best_rate(LOOP) == lowest and len(results.of(LOOP)) == depth.FEWEST_SEEDS


@pytest.mark.parametrize("direction", [1, -1])
def test_the_grid_ends(direction, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    answer(results, LOOP, lambda rate: direction * rate)
    assert results.best_rate(LOOP) == (max(RATES) if direction == 1 else min(RATES))


def test_an_interrupted_study_measures_only_what_is_missing(tmp_path):
    path = tmp_path / "results.jsonl"
    results = Results(path)
    first, *others = results.missing(LOOP)
    results.add(row(first, 0.5))
    assert Results(path).missing(LOOP) == others
    assert results.best_rate(LOOP) is None and results.of(LOOP) == []
    assert len(results.missing(ONE_SHOT)) == len(others) + 1


def test_the_choice_is_on_other_seeds_and_problems_than_the_results():
    assert not set(CHOICE.seeds) & set(RESULT.seeds) and CHOICE.problem_seed != RESULT.problem_seed
    assert depth.FEWEST_SEEDS >= 5 and RESULT.items >= 2000


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
    assert lines[2].startswith("| 60% | 1,000 | one-shot | ") and "| reference |" in lines[2]
    # By hand: differences of 25.0 to 27.0 points, so t = 85 with five degrees of freedom.
    assert "76.2 ± 0.8 | 7 | +26.0 ± 0.8 points | 4e-09 |" in lines[3]
    depth_report.plot(results, tmp_path / "picture.svg")
    assert "one-shot" in (tmp_path / "picture.svg").read_text()


@pytest.mark.slow
def test_scored_once_keeps_the_neurons_that_one_cut_would_keep(tmp_path):
    """Nothing is trained in between, so the weights are those of pruning to the final size at once."""
    prune = loops.Prune(width_multiple=1, criterion="weight")
    finals = []
    for iterations in (1, 3):
        schedule = loops.Schedule(target=0.5, recovery_tokens=0, iterations=iterations)
        once = loops.scored_once(loops.TINY, prune, 1)
        finals.append(loops.run(loops.TINY, schedule, prune, [], 1, tmp_path / str(iterations), once))
    one, three = (dict(checkpoint.tensors(final.checkpoint / checkpoint.WEIGHTS)) for final in finals)
    assert finals[0].params == finals[1].params == 106_048
    assert all(torch.equal(tensor, three[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_a_run_that_was_interrupted_continues(tmp_path):
    """Iterations that are done are not done again: their sources may be gone."""
    schedule = loops.Schedule(target=0.4, recovery_tokens=2000, iterations=2)
    stage = CPT | {"save_steps": 10**9}
    arguments = (loops.TINY, schedule, loops.Prune(width_multiple=1), [stage], 1, tmp_path)
    first = loops.run(*arguments)
    (tmp_path / "done-2").unlink()
    (tmp_path / "pruned-1/model.safetensors").unlink()
    weights = (first.checkpoint / checkpoint.WEIGHTS).read_bytes()
    assert loops.run(*arguments) == first
    assert (first.checkpoint / checkpoint.WEIGHTS).read_bytes() == weights


@pytest.mark.slow
def test_a_cell_is_measured():
    cell = depth.Cell("loop of 2", 0.4, 3000, 1e-3, "choice", 1)
    measured = depth.measure(cell)
    json.dumps(measured)
    assert measured["params"] == 127_552 and len(measured["solved"]) == CHOICE.items / 4
    assert bin(int(measured["solved"], 16)).count("1") == measured["accuracy"] * CHOICE.items
    assert 0.1 < measured["accuracy"] < 1 and measured["flops"] > 6 * 3000 * 127_552
