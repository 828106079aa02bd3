"""Warnings of settings that are allowed and yet likely to waste a run."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from typer.testing import CliRunner

from ptl.cli import app
from ptl.config.run import load_config
from ptl.config.schedule import Prune, Schedule
from ptl.errors import InputError
from ptl.model.dimensions import ModelDimensions
from ptl.preflight import advice

CONFIGS = sorted((Path(__file__).parents[2] / "pipelines/prune_tune_loop/configs").glob("*.yaml"))
TINY = next(path for path in CONFIGS if path.stem == "tiny")
REASONER = Path(__file__).parents[2] / "examples/tiny_reasoner/checkpoint"
BODY = ModelDimensions(params=213_568, layers=6, width=64, params_per_neuron=1_152, params_per_layer=30_000)
STAGE = {"method": "cpt", "decay": "each"}


def warnings(**fields):
    config = {"gate.enabled": True, "recover": [STAGE], "schedule.iterations": 8}
    return advice.warnings(
        load_config(TINY, config | {name.replace("__", "."): value for name, value in fields.items()})
    )


def test_an_iteration_with_a_large_cut_and_few_tokens_is_warned_of():
    (warning,) = warnings()  # cubic cuts and doubling tokens
    assert "schedule.tokens=doubling, with schedule.cuts=cubic" in warning
    assert "iteration 1 removes 33 % of what goes in all and gets 0.4 % of the recovery" in warning
    assert "set schedule.tokens=uniform" in warning


@pytest.mark.parametrize("cuts", ["uniform", "cubic"])
@pytest.mark.parametrize("iterations", [1, 4, 8, 64])
def test_the_remedy_leaves_no_warning(cuts, iterations):
    assert warnings(schedule__cuts=cuts, schedule__iterations=iterations, schedule__tokens="uniform") == []


def test_equal_cuts_with_doubling_tokens_starve_the_first_of_many():
    assert "iteration 1 removes 12 %" in warnings(schedule__cuts="uniform")[0]
    assert warnings(schedule__cuts="uniform", schedule__iterations=4) == []


def test_steps_of_reinforcement_learning_are_shared_out_like_tokens():
    fields = {"recover": [{"method": "grpo", "steps": 510}], "schedule__recovery_tokens": 0}
    assert "gets 0.4 % of the recovery" in warnings(**fields)[0]
    assert warnings(**fields, schedule__tokens="uniform") == []


def test_a_rate_that_decays_only_at_the_end_of_the_run_is_warned_of():
    stages = [STAGE | {"share": 0.5}, {"method": "distil"}]
    (warning,) = warnings(recover=stages, schedule__tokens="uniform")
    assert warning.startswith("recover.decay=0.5, with the gate on") and "set decay: each" in warning
    assert warnings(recover=stages, schedule__iterations=1) == []  # the last iteration is the only one


def test_accelerators_that_no_step_can_use_are_warned_of_in_one_sentence():
    given = {"gate__enabled": False, "resources": {"accelerator": "nvidia.com/gpu", "accelerators": 8}}
    assert warnings(**given) == []  # a prune step holds one
    steps = {"prune": {"accelerators": 2}, "report": {"accelerators": 1}}
    given["resources"]["steps"] = steps
    (warning,) = warnings(**given, evaluate__processes=4, recover=[STAGE | {"processes": 4}])
    assert (
        "prune holds 2 and uses 1, recover holds 8 and uses 4, evaluate holds 8 and uses 4 and report holds" in warning
    )
    assert warning.endswith(
        "1 and uses none: set the number that is used in resources.steps.<step>.accelerators, or "
        "raise the step's processes"
    )
    steps |= {"prune": {}, "report": {}, "evaluate": {"accelerators": 4}, "recover": {"accelerators": 4}}
    assert warnings(**given, evaluate__processes=4, recover=[STAGE | {"processes": 4}]) == []


def test_without_a_gate_the_demo_s_schedule_is_as_good_as_any():
    assert warnings(gate__enabled=False, recover=[{"method": "cpt"}]) == []


def test_an_iteration_that_removes_less_than_a_layer_is_warned_of():
    schedule = Schedule(target=0.4, iterations=8, recovery_tokens=0, cuts="cubic")
    (warning,) = advice.layer_warnings(schedule, Prune(target="neurons_then_layers"), 800_000, 50_000)
    assert warning.startswith("prune.target=neurons_then_layers, with schedule.cuts=cubic: planned for iteration 8 are")
    assert "at most 625 parameters, and a layer has 50,000" in warning and "set schedule.cuts=uniform" in warning
    uniform = schedule.model_copy(update={"cuts": "uniform"})
    assert advice.layer_warnings(uniform, Prune(target="neurons_then_layers"), 800_000, 40_000) == []
    assert advice.layer_warnings(schedule, Prune(), 800_000, 50_000) == []  # neurons alone


def test_a_target_in_parameters_that_is_deep_is_warned_of():
    deep = Schedule(target=85_312, recovery_tokens=0)
    (warning,) = advice.depth_warnings(deep, 213_568)
    assert (
        warning.startswith("schedule.iterations=auto is 4")
        and "removes 60 % of this model's 213,568 parameters" in warning
    )
    assert warning.endswith("set schedule.iterations=8")
    for schedule in (deep.model_copy(update={"iterations": 4}), Schedule(target=0.6, recovery_tokens=0)):
        assert advice.depth_warnings(schedule, 213_568) == []
    assert advice.depth_warnings(deep, 160_000) == []  # 47 % less


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_shipped_config_is_warned_of(path):
    assert advice.warnings(load_config(path)) == []


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (
            RepositoryNotFoundError.__new__(RepositoryNotFoundError, "no"),
            2,
            "training.sources.0.source: 'meta-math/NOPE' ",
        ),
        (OSError("no connection"), 0, "not looked at, as the hub cannot be asked: meta-math/NOPE and openai/gsm8k"),
        (None, 0, ""),
    ],
    ids=["unknown", "no-connection", "known"],
)
def test_validate_asks_the_hub_for_data_sets_or_says_that_it_did_not(answer, code, said, monkeypatch, tmp_path):
    asked = []

    def dataset_info(name, **options):
        asked.append((name, options["revision"]))
        if answer:
            raise answer

    monkeypatch.setattr(huggingface_hub, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("ptl.preflight.preflight.preflight", lambda *sections: (REASONER, BODY))
    (tmp_path / "task.yaml").write_text("task: mine\ndataset_path: openai/gsm8k\n")
    sets = ["training.source=meta-math/NOPE", "training.revision=abc"]
    sets.append(f"evaluate.tasks=[{{name: {tmp_path / 'task.yaml'}, metric: exact_match}}]")
    done = CliRunner().invoke(app.app, ["validate", str(TINY), *[part for pair in sets for part in ("--set", pair)]])
    assert asked[0] == ("meta-math/NOPE", "abc")
    if code:
        assert said in str(done.exception)
    else:
        assert done.exit_code == 0 and ("not looked at" in done.stdout) == bool(said) and said in done.stdout
        assert len(asked) == (1 if said else 2)  # one try is enough where there is no connection


@pytest.mark.parametrize("resource", ["gpu", "nvidia.com/", "/gpu", "nvidia.com/gpu/1"])
def test_an_accelerator_is_a_resource_with_a_domain(resource):
    with pytest.raises(InputError, match=r"resources.accelerator: .*for example nvidia.com/gpu"):
        load_config(TINY, {"resources.accelerator": resource})
    assert load_config(TINY, {"resources.accelerator": "amd.com/gpu"})


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_validate_and_plan_say_the_tokens_and_warn_of_passes(monkeypatch, command):
    monkeypatch.setattr("ptl.preflight.preflight.preflight", lambda *sections: (REASONER, BODY))
    done = CliRunner().invoke(app.app, [command, str(TINY), "--set", "schedule.recovery_tokens=5000000000"])
    assert done.exit_code == 0, done.output
    assert "5,000,000,000 recovery tokens: " in done.stdout
    assert "warning: 5,000,000,000 recovery tokens" in done.output and "passes help little" in done.output


@pytest.mark.parametrize("command", ["validate", "submit"])
def test_a_command_that_starts_something_warns_first(monkeypatch, command):
    monkeypatch.setattr("ptl.preflight.preflight.preflight", lambda *sections: (REASONER, BODY))
    monkeypatch.setattr("pipelines.prune_tune_loop.submit.submit", lambda *config, **options: 0)
    done = CliRunner().invoke(
        app.app, [command, str(TINY), "--set", "gate.enabled=true", "--set", "schedule.iterations=8"]
    )
    assert done.exit_code == 0, done.output
    assert "warning: schedule.tokens=doubling" in done.stderr and "warning: recover.decay=0.5" in done.stderr
