"""Whether the final model reaches the run's goal in memory, by its own shapes."""

import pytest
from run_records import limits, scores

from ptl.report.build import build
from ptl.report.words import checks

GOAL = {
    **{"kind": "memory", "memory": "1kB", "bytes": 1000, "dense": 2000, "sequences": 2, "tokens": 5},
    **{"dtype": "bfloat16", "itemsize": 2, "cached_numbers_per_layer": 4},
}


@pytest.mark.parametrize(
    ("params", "layers", "needed", "reached"), [(420, 2, 1000, True), (421, 2, 1002, False), (420, 1, 920, True)]
)
def test_memory_is_that_of_the_final_checkpoint(records, settings, params, layers, needed, reached):
    """2 bytes for each of 420 parameters and of 2 sequences x 5 tokens x 2 layers x 4 keys and values."""
    records["import-model"].metadata["goal"] = GOAL
    records["evaluate-4"].metadata["scores"] = scores(params, 0.98, 8) | {"widths": [8] * layers}
    result = build(records, settings)
    assert (result.goal.final, result.goal.is_reached) == (needed, reached)
    sentence = dict(checks(result))["Target"]
    # What is missed by little is not said to be the goal.
    beginning = f"Goal {'' if reached else 'not '}reached: the final model needs"
    assert sentence.startswith(beginning)
    assert sentence.endswith(" for 2 sequences of 5 tokens in bfloat16, the dense one 2.0 kB; the goal is 1kB.")
    assert (sentence in limits(result)) == (not reached)


def test_without_a_score_nothing_is_claimed(records, settings):
    records["import-model"].metadata["goal"] = GOAL
    final = records["evaluate-4"].metadata
    final["accepted"] = final["accepted"] | {"digest": "sha256:" + "b" * 64}
    assert "was not scored" in dict(checks(build(records, settings)))["Target"]
