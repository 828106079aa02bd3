"""Whether the final model reaches the run's goal, from its own shapes and its measured speed."""

from ptl.report import goal

MEMORY = {
    **{"kind": "memory", "memory": "1kB", "bytes": 1000, "dense": 2000, "sequences": 2, "tokens": 5},
    **{"dtype": "bfloat16", "itemsize": 2, "cached_numbers_per_layer": 4},
}
SPEED = {"kind": "speed", "times": 1.5, "dense": 600}


def final(params=420, layers=2, flops=400):
    return {"params": params, "widths": [8] * layers, "scores": {"flops_per_token": flops}}


def speed(dense, pruned):
    """Decode as fast as given, at one batch size; prefill does not gain."""

    def model(decode):
        row = {"batch": 1, "prefill_tokens_per_s": 10.0, "decode_tokens_per_s": decode}
        return {"speed": [row], "seconds_per_solved": None}

    return {"models": {"dense": model(dense), "final": model(pruned)}}


def test_memory_is_that_of_the_final_checkpoint():
    """2 bytes for each of 420 parameters and of 2 sequences x 5 tokens x 2 layers x 4 keys and values."""
    enough = goal.outcome(MEMORY, final(), {})
    assert (enough["final"], enough["reached"]) == (1000, True)
    assert not goal.outcome(MEMORY, final(params=421), {})["reached"]
    assert goal.outcome(MEMORY, final(layers=1), {})["final"] == 920
    assert goal.sentence(enough) == (
        "Goal reached: the final model needs 1.0 kB for weights and a KV cache for 2 sequences of 5 tokens in "
        "bfloat16, the dense one 2.0 kB; the goal is 1kB."
    )


def test_what_is_missed_by_little_is_not_said_to_be_the_goal():
    speed_goal = {"kind": "speed", "times": 1.35, "dense": 1_350_000}
    missed = goal.sentence(goal.outcome(speed_goal, final(flops=1_000_100), {}))
    assert missed.startswith("Goal not reached by FLOPs per token: 1.3499 times; the goal is 1.35 times")
    assert goal.sentence(goal.outcome(speed_goal, final(flops=1_000_000), {})).startswith("Goal reached")
    missed = goal.sentence(goal.outcome(MEMORY, final(params=421), {}))
    assert missed.startswith("Goal not reached: the final model needs 1.0 kB (2 B too much) for weights and")


def test_speed_is_by_flops_with_the_measured_beside_it():
    forecast = goal.outcome(SPEED, final(), {})
    assert forecast["reached"] and not goal.outcome(SPEED, final(flops=401), {})["reached"]
    assert goal.sentence(forecast) == (
        "Goal reached by FLOPs per token: 1.50 times; the goal is 1.5 times. Speed was not measured."
    )
    measured = goal.outcome(SPEED, final(flops=500), speed(10.0, 16.0))
    assert measured["measured"] == [1.0, 1.6]
    assert goal.sentence(measured) == (
        "Goal not reached by FLOPs per token: 1.20 times; the goal is 1.5 times. Measured: 1.00 to 1.60 times, enough "
        "in 1 of 2 measurements of prefill and decode."
    )


def test_without_a_goal_or_a_score_nothing_is_claimed():
    assert goal.sentence(goal.outcome({}, final(), {})) == ""
    assert "was not scored" in goal.sentence(goal.outcome(MEMORY, None, {}))
