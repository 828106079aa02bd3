"""The config: every wrong field is named, and the plan adds up exactly."""

from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ptl.config.dag import nodes
from ptl.config.run import Config, essentials, load_config, pairs
from ptl.config.schedule import (
    EXPERT_CRITERIA,
    NEURON_CRITERIA,
    Prune,
    Schedule,
    one_shot,
    plan,
    removal,
    token_weights,
)
from ptl.errors import InputError
from ptl.pruning.importance import CRITERIA
from ptl.recovery.recover import RECOVERIES

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "pipelines/prune_tune_loop/configs").glob("*.yaml"))
TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"

schedules = st.builds(
    Schedule,
    iterations=st.integers(1, 40),
    target=st.floats(0.01, 0.9),
    cuts=st.sampled_from(["uniform", "cubic"]),
    tokens=st.sampled_from(["uniform", "doubling"]),
    recovery_tokens=st.integers(0, 10**12),
)


@given(schedules)
def test_cuts_and_tokens_add_up_exactly(schedule):
    rounds = plan(schedule, Prune())
    assert sum(it.cut for it in rounds) == Fraction(1)
    assert rounds[-1].progress == 1
    assert sum(it.tokens for it in rounds) == schedule.recovery_tokens
    assert [it.tokens_before for it in rounds[1:]] == [it.tokens_before + it.tokens for it in rounds[:-1]]
    assert all(it.cut > 0 and it.tokens >= 0 for it in rounds)
    assert [it.last for it in rounds] == [False] * (schedule.iterations - 1) + [True]


def test_curves_are_those_that_are_promised():
    uniform = plan(Schedule(iterations=4, target=0.4, cuts="uniform", tokens="uniform", recovery_tokens=400), Prune())
    assert [it.cut for it in uniform] == [Fraction(1, 4)] * 4
    assert [it.tokens for it in uniform] == [100] * 4
    shaped = plan(Schedule(iterations=4, target=0.4, recovery_tokens=150), Prune())
    assert [it.cut for it in shaped] == [Fraction(37, 64), Fraction(19, 64), Fraction(7, 64), Fraction(1, 64)]
    assert [it.tokens for it in shaped] == [10, 20, 40, 80]


def test_layers_come_last_and_the_control_has_one_round():
    schedule = Schedule(iterations=5, target=0.4, recovery_tokens=100)
    both = plan(schedule, Prune(target="neurons_then_layers"))
    assert [it.unit for it in both] == ["neurons"] * 4 + ["layers"]
    assert [it.unit for it in plan(schedule, Prune(target="layers"))] == ["layers"] * 5
    (control,) = plan(one_shot(schedule), Prune(target="neurons_then_layers"))
    assert (control.cut, control.tokens, control.unit, control.last) == (1, 100, "neurons", True)


def test_experts_have_a_criterion_of_their_own_by_default():
    assert Prune(target="experts").criterion == "reap" and Prune().criterion == "taylor"
    assert Prune(target="experts", criterion="random").criterion == "random"
    chosen = Prune(target="experts")
    assert Prune.model_validate(chosen.model_dump()) == chosen
    assert {iteration.unit for iteration in plan(Schedule(target=0.4, recovery_tokens=1), chosen)} == {"experts"}


@pytest.mark.parametrize(("target", "iterations"), [(0.49, 4), (0.5, 8), (0.9, 8), (150_000, 4)])
def test_half_and_more_is_removed_in_eight_iterations(target, iterations):
    schedule = Schedule(target=target, recovery_tokens=1000)
    assert schedule.num_iterations == len(plan(schedule, Prune())) == len(token_weights(schedule)) == iterations
    assert schedule.model_copy(update={"iterations": 3}).num_iterations == 3
    assert len(plan(one_shot(schedule), Prune())) == 1
    deep = load_config(TINY, {"schedule.iterations": "auto", "schedule.target": target})
    assert len([node for node in nodes(deep) if node.name.startswith("prune-")]) == iterations
    assert essentials(deep)["schedule"].get("iterations") is None  # a default is not carried along


def test_target_is_a_share_or_the_parameters_to_end_with():
    assert removal(1000, 0.4) == 400
    assert removal(1000, 0.3) == 300  # 0.3 * 1000 is exact, though the binary form of 0.3 is below it
    assert removal(1000, 700) == 300


def test_the_criteria_of_the_config_are_those_of_the_code():
    criteria = set(Prune.model_fields["criterion"].annotation.__args__)
    assert criteria == set(CRITERIA) | set(EXPERT_CRITERIA) and set(CRITERIA) == {*NEURON_CRITERIA, "random"}
    methods = Config.model_json_schema()["properties"]["recover"]
    assert all(name in str(Config.model_json_schema()) for name in RECOVERIES) and methods


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path):
    assert load_config(path).name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"colour": "red"}, "colour: unknown field"),
        ({"prune": {"criterium": "max"}}, "prune.criterium: unknown field"),
        ({"prune": {"criterion": "magic"}}, "prune.criterion: 'magic': Input should be 'max'"),
        ({"schedule": {"target": 0, "recovery_tokens": 1}}, "schedule.target: 0: Input should be greater than 0"),
        ({"schedule": {"target": 0.4}}, "schedule.recovery_tokens: missing"),
        ({"schedule": {"target": 0.4, "recovery_tokens": -1}}, "schedule.recovery_tokens: -1"),
        ({"seed": "many"}, "seed: 'many'"),
        ({"name": "Not A Name"}, "name: 'Not A Name'"),
        ({"evaluate": {"tasks": []}}, "evaluate.tasks"),
        ({"recover": [{"packing": True}]}, "packing=true needs loss=all"),
        (
            {
                "prune": {"target": "neurons_then_layers"},
                "schedule": {"iterations": 1, "target": 0.4, "recovery_tokens": 99},
            },
            "prune.target=neurons_then_layers needs schedule.iterations=2 or more",
        ),
        (
            {"prune": {"target": "experts", "criterion": "taylor"}},
            "criterion=taylor does not score what target=experts removes: set one of reap, frequency, norm, random",
        ),
        ({"prune": {"criterion": "reap"}}, "criterion=reap does not score what target=neurons removes: set one of max"),
        ({"schedule": {"target": 0.4, "recovery_tokens": 14}}, "recovery_tokens=14 leaves no token for a stage"),
        ({"schedule": {"target": 0.4, "recovery_tokens": 15}}, "recovery_tokens=15 leaves 1 token for a stage"),
        (
            {"recover": [{"share": 0.5}, {"method": "distil"}], "schedule": {"target": 0.4, "recovery_tokens": 15}},
            "=15",
        ),
        ({"recover": [{"method": "grpo", "steps": 14}]}, "recover.steps=14, shared out over 4 iterations, leaves one"),
    ],
)
def test_errors_name_field_value_and_remedy(tmp_path, change, said):
    raw = yaml.safe_load(TINY.read_text()) | change
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(InputError) as error:
        load_config(path)
    assert said in str(error.value) and error.value.exit_code == 2


def test_files_that_are_no_config(tmp_path):
    for text, said in [("a: [1", "not valid YAML"), ("- 1", "must hold a mapping")]:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            load_config(path)
    with pytest.raises(InputError, match="no file"):
        load_config(tmp_path / "none.yaml")


def test_overrides_are_checked_like_the_file():
    assert load_config(TINY, {"schedule.target": 0.2}).schedule.target == 0.2
    with pytest.raises(InputError, match=r"schedule\.target"):
        load_config(TINY, {"schedule.target": -1})
    with pytest.raises(InputError, match="is not a section"):
        load_config(TINY, {"name.first": 1})
    assert load_config(TINY, {"recover.0.method": "distil"}).recover[0].model_dump()["method"] == "distil"
    for name in ("recover.learning_rate", "recover.1.learning_rate", "recover.-1.learning_rate", "recover.².x"):
        with pytest.raises(InputError, match="is no entry of a list of 1; number its entries from 0"):
            load_config(TINY, {name: 1e-4})


def test_initials_of_a_field_are_understood():
    with pytest.raises(InputError, match=r"unknown field; did you mean recover\.learning_rate\?"):
        load_config(TINY, {"recover.0.lr": 1e-4})


@pytest.mark.parametrize("text", ["1e6", "1M", "1000k", "0.001G", "1_000_000"])
def test_a_number_of_tokens_as_people_write_it(text):
    assert load_config(TINY, pairs("--set", [f"schedule.recovery_tokens={text}"])).schedule.recovery_tokens == 10**6


@pytest.mark.parametrize("text", ["5m", "0.5", "1.5", "1.2345k", "1Ki", "many"])
def test_what_is_no_whole_number_of_tokens_is_refused(text):
    with pytest.raises(InputError, match=r"schedule\.recovery_tokens"):
        load_config(TINY, pairs("--set", [f"schedule.recovery_tokens={text}"]))


def test_an_override_leaves_other_sections_of_the_same_anchor():
    shared = TINY.with_name("onprem.yaml")
    before, after = load_config(shared), load_config(shared, {"training.source": "s3://b/other.jsonl"})
    assert before.training.sources[0].source == before.calibration.data.source  # one anchor
    assert after.training.sources[0].source == "s3://b/other.jsonl" and after.calibration == before.calibration


def test_a_bare_off_is_off():
    overrides = pairs("--set", ["training.decontaminate=off"])
    assert overrides == {"training.decontaminate": False}  # YAML 1.1
    told = load_config(TINY, overrides).training.decontaminate
    assert not told.tasks and not told.against


def test_reinforcement_learning_may_do_without_tokens():
    stage = {"method": "grpo", "steps": 15}  # 1, 2, 4, 8
    assert load_config(TINY, {"recover": [stage], "schedule.recovery_tokens": 0}).recover[0].method == "grpo"
