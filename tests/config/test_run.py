"""The plan adds up exactly, targets are shares, counts or memory, and overrides are checked like the file."""

import json
from fractions import Fraction
from typing import get_args

from checkout import SHIPPED, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from ptl.config import schedule as planning
from ptl.config.run import Config, essentials, load_config, pairs
from ptl.config.schedule import MemoryGoal, Prune, Schedule, plan, removal

schedules = st.builds(
    Schedule,
    iterations=st.integers(1, 40),
    target=st.floats(0.01, 0.9),
    cuts=st.sampled_from(["uniform", "cubic"]),
    tokens=st.sampled_from(["uniform", "doubling", "quadrupling"]),
    recovery_tokens=st.integers(0, 10**12),
)


def loaded(*sets):
    return load_config(TINY, pairs("--set", sets))


@settings(deadline=None)
@given(schedules)
def test_cuts_and_tokens_add_up_exactly(schedule):
    iterations = plan(schedule, Prune())
    assert [it.index for it in iterations] == list(range(1, schedule.iterations + 1))
    assert sum(it.cut for it in iterations) == iterations[-1].progress == Fraction(1)
    assert sum(it.tokens for it in iterations) == schedule.recovery_tokens
    assert iterations[0].tokens_before == 0
    assert [it.tokens_before for it in iterations[1:]] == [
        it.tokens_before + it.tokens for it in iterations[:-1]
    ]
    assert all(it.cut > 0 and it.tokens >= 0 for it in iterations)
    assert [it.last for it in iterations] == [False] * (schedule.iterations - 1) + [True]


def test_curves_are_those_that_are_promised():
    def planned(number, **fields):
        return plan(Schedule(iterations=4, target=0.4, recovery_tokens=number, **fields), Prune())

    uniform = planned(402, cuts="uniform", tokens="uniform")
    assert [it.cut for it in uniform] == [Fraction(1, 4)] * 4
    assert [it.tokens for it in uniform] == [100, 101, 100, 101]  # sums of 100.5 are rounded down
    shaped = planned(150)
    assert [it.cut for it in shaped] == [
        Fraction(37, 64),
        Fraction(19, 64),
        Fraction(7, 64),
        Fraction(1, 64),
    ]
    assert [it.progress for it in shaped] == [
        Fraction(37, 64),
        Fraction(56, 64),
        Fraction(63, 64),
        1,
    ]
    assert [it.tokens for it in shaped] == [10, 20, 40, 80]
    assert [it.tokens for it in planned(850, tokens="quadrupling")] == [10, 40, 160, 640]


def test_layers_come_last_and_the_control_has_one_iteration():
    schedule = Schedule(iterations=5, target=0.4, recovery_tokens=100)
    both = Prune(target="neurons_then_layers")
    assert [it.unit for it in plan(schedule, both)] == ["neurons"] * 4 + ["layers"]
    assert [it.unit for it in plan(schedule, Prune(target="layers"))] == ["layers"] * 5
    assert [it.unit for it in plan(schedule, Prune())] == ["width"] * 5
    # which scores nothing else
    assert [it.unit for it in plan(schedule, Prune(criterion="max"))] == ["neurons"] * 5
    (control,) = plan(planning.one_shot(schedule), both)
    assert (control.cut, control.tokens, control.unit, control.last) == (1, 100, "neurons", True)


def test_the_criteria_and_methods_of_the_config_are_those_of_the_code():
    from ptl.pruning import experts, importance
    from ptl.recovery.recover import RECOVERIES

    assert importance.CRITERIA.keys() == experts.CRITERIA_OF_NEURONS.keys()
    assert all(
        Prune(target="neurons", criterion=name).criterion == name for name in importance.CRITERIA
    )
    assert [*importance.CRITERIA, "reap"] == [*get_args(Prune.model_fields["criterion"].annotation)]
    stage = Config.model_json_schema()["$defs"]["RecoverStage"]["properties"]
    assert stage["method"]["enum"] == list(RECOVERIES)
    # By default experts have their own.
    assert Prune(target="experts").criterion == "reap" and Prune().criterion == "taylor"


def test_target_is_a_share_the_parameters_to_end_with_or_a_memory():
    assert removal(1000, 0.4) == 400
    assert 0.29 * 100 < 29 and removal(100, 0.29) == 29  # a share is taken as it is written
    assert removal(1002, 0.3) == 300  # rounded down
    assert removal(3000, 1000) == 2000
    assert Schedule(target=1000, recovery_tokens=1).target == 1000
    whole = loaded("schedule.target={memory: 1.5 GB, sequences: 8, tokens: 4096}").schedule.target
    assert (whole.bytes, whole.sequences, whole.tokens, whole.itemsize) == (
        1_500_000_000,
        8,
        4096,
        2,
    )
    both = loaded("schedule.target.memory=16GiB", "schedule.target.sequences=8").schedule.target
    assert both == MemoryGoal(memory="16GiB", sequences=8)
    config = loaded("schedule.target={memory: 300kB, tokens: 10}")
    assert essentials(config)["schedule"]["target"] == {"memory": "300kB", "tokens": 10}
    sizes = {"16GiB": 16 << 30, "16 Gi": 16 << 30, "2kB": 2000, "0.5MB": 500_000, "1T": 10**12}
    assert {text: planning.memory_bytes(text) for text in sizes} == sizes


def test_whole_numbers_are_doubles_in_a_container():
    for path in SHIPPED:
        config = load_config(path)
        assert (
            Config.model_validate(json.loads(config.model_dump_json(), parse_int=float)) == config
        )


def test_overrides_name_parts_of_lists_numbers_as_people_write_them_and_one_section_alone():
    assert loaded("schedule.target=0.2").schedule.target == 0.2
    assert loaded("recover.0.method=distil").recover[0].model_dump()["method"] == "distil"
    off = loaded("training.decontaminate=off").training.decontaminate  # false in YAML 1.1
    assert not off.tasks and not off.against
    # Reinforcement learning may do without tokens, and needs a step in each iteration: 1, 2, 4, 8.
    stage = loaded("recover=[{method: grpo, steps: 15}]", "schedule.recovery_tokens=0").recover[0]
    assert (stage.method, stage.steps) == ("grpo", 15)
    for text in ("8.2e6", "8.2M", "8200k", "8_200_000"):
        assert loaded(f"schedule.recovery_tokens={text}").schedule.recovery_tokens == 8_200_000
    shared = TINY.with_name("onprem.yaml")
    before, after = (
        load_config(shared),
        load_config(shared, {"training.source": "s3://b/other.jsonl"}),
    )
    assert before.training.sources[0].source == before.calibration.data[0].source  # one anchor
    assert (
        after.training.sources[0].source == "s3://b/other.jsonl"
        and after.calibration == before.calibration
    )
