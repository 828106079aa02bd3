"""The benchmark of a pretrained model: which models it measures, and what its table compares."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import real_model
from real_model import Cell
from transformers import AutoTokenizer

ONE_SHOT, LOOP = "one-shot, taylor", "loop of 4, taylor"
GIVEN = Namespace(
    arms=[ONE_SHOT, LOOP],
    shares=[0.2, 0.3],
    tokens=1000,
    methods=["cpt", "distil"],
    learning_rates=[1e-4, 3e-4],
    seeds=[1],
)


def row(cell, loss, texts=8):
    """A model that has this loss, a little more or less from text to text."""
    losses = [[10 * loss + text % 2, 10] for text in range(texts)]
    return real_model.asdict(cell) | {"params": 100, "gsm8k": losses, "other": losses}


def test_all_arms_have_the_same_sizes_tokens_and_rates():
    found = real_model.cells(GIVEN)
    assert len(found) == len(set(found))
    arms = {}
    for cell in found:
        arms.setdefault(cell.arm, set()).add((cell.share, cell.tokens, cell.method, cell.learning_rate, cell.seed))
    assert arms[ONE_SHOT] == arms[LOOP] and len(arms[LOOP]) == 8
    # The dense model as it is, and trained on the same tokens.
    assert arms["dense"] == {(0.0, 0, "none", 0.0, 0), (0.0, 1000, "cpt", 1e-4, 1), (0.0, 1000, "cpt", 3e-4, 1)}


def test_without_tokens_nothing_is_trained():
    given = Namespace(**vars(GIVEN) | {"tokens": 0, "shares": [0.3]})
    dense, one_shot, loop = real_model.cells(given)
    assert one_shot == Cell(ONE_SHOT, 0.3, 0, "none", 0.0, 1) and loop.arm == LOOP and dense.arm == "dense"


def test_the_table_shows_each_arm_with_its_better_rate(capsys):
    cells = [Cell(arm, 0.2, 1000, "cpt", rate, 1) for arm in (ONE_SHOT, LOOP) for rate in (1e-4, 3e-4)]
    real_model.print_table([row(cell, loss) for cell, loss in zip(cells, (1.0, 1.2, 1.3, 0.9), strict=True)])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 2
    assert f"{ONE_SHOT} | cpt | 1,000 | 1 | 0.0001 | 2.86 |" in lines[0]
    assert f"{LOOP} | cpt | 1,000 | 1 | 0.0003 | 2.59 | 2.59 | 0.905 (0.905 to 0.905) |" in lines[1]


def test_the_interval_is_of_the_paired_difference():
    reference = [[10.0, 10], [20.0, 10], [30.0, 10], [40.0, 10]]
    same = real_model.ratio(reference, reference)
    assert same == "1.000 (1.000 to 1.000)"
    # Half of the texts lose one a token, the others gain as much.
    mixed = [[loss + 10 * (-1) ** text, count] for text, (loss, count) in enumerate(reference)]
    assert real_model.ratio(mixed, reference).startswith("1.000 (0.3")


def test_the_other_text_is_what_python_ships():
    texts = real_model.other_texts()
    assert len(texts) > 50 and all(prompt == "" and len(text) > 200 for prompt, text in texts)


@pytest.mark.slow
def test_losses_are_those_of_the_answers_alone():
    folder = real_model.ROOT / "examples/tiny_reasoner/checkpoint"
    question = "Mia has 74 pens. Later she loses 34 pens. How many pens does Mia have now?\n"
    answer = "74-34=40\n#### 40"
    ((loss, count),) = real_model.text_losses(folder, [(question, answer)])
    assert count == len(AutoTokenizer.from_pretrained(folder)(answer)["input_ids"]) and loss / count < 0.1
    assert real_model.text_losses(folder, [(question * 20, "unseen")]) == []
