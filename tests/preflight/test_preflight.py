"""Warnings of settings that are allowed and yet likely to waste a run."""

from dataclasses import replace
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
from ptl.preflight import preflight, target

CONFIGS = sorted((Path(__file__).parents[2] / "pipelines/prune_tune_loop/configs").glob("*.yaml"))
TINY = next(path for path in CONFIGS if path.stem == "tiny")
REASONER = Path(__file__).parents[2] / "examples/tiny_reasoner/checkpoint"
BODY = ModelDimensions(params=213_568, layers=4, width=192, params_per_neuron=768, params_per_layer=50_000)
STAGE = {"method": "cpt", "decay": "each"}


def warnings(**fields):
    config = {"gate.enabled": True, "recover": [STAGE], "schedule.iterations": 8}
    return preflight.warnings(
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


def test_accelerators_that_a_step_cannot_use_are_warned_of():
    given = {"gate__enabled": False, "resources": {"accelerator": "nvidia.com/gpu", "accelerators": 8}}
    assert warnings(**given) == []
    said = warnings(**given, evaluate__processes=4, recover=[STAGE | {"processes": 4}])
    assert [warning.partition(": set ")[0] for warning in said] == [
        "resources.accelerators: recover holds 8 and uses 4",
        "resources.accelerators: evaluate holds 8 and uses 4",
    ]
    given["resources"]["steps"] = {"evaluate": {"accelerators": 4}, "recover": {"accelerators": 4}}
    assert warnings(**given, evaluate__processes=4, recover=[STAGE | {"processes": 4}]) == []


def test_without_a_gate_the_demo_s_schedule_is_as_good_as_any():
    assert warnings(gate__enabled=False, recover=[{"method": "cpt"}]) == []


def after(model, prune, **schedule):
    planned = Schedule(**{"iterations": 4, "target": 0.3, "recovery_tokens": 0} | schedule)
    config = load_config(TINY).model_copy(update={"schedule": planned, "prune": prune})
    sizes = [after for _, after in target.after_iterations(model, planned, prune)]
    return sizes, preflight.model_warnings(config, model)


# 100 neurons of 1,000 parameters, and as much again beside them
DENSE = ModelDimensions(params=200_000, layers=4, width=100, params_per_neuron=1000, params_per_layer=40_000)
# 10 experts of 10,000 parameters, of which a token meets 2; a router of 100 for each
MIXTURE = replace(
    DENSE,
    params=201_000,
    experts=10,
    experts_per_token=2,
    params_per_expert=10_100,
    params_per_route=100,
    fewest_experts=2,
)


def test_widths_are_rounded_down_as_prune_does():
    # cubic: 34,688, 52,500, 59,063 and 60,000 parameters are asked for
    sizes, said = after(DENSE, Prune(width_multiple=1))
    assert [each.params for each in sizes] == [165_000, 147_000, 140_000, 140_000]
    assert "for iteration 4, as" in said[0]
    sizes, (warning,) = after(DENSE, Prune(width_multiple=8))
    assert [each.params for each in sizes] == [164_000, 140_000, 140_000, 140_000]
    assert "nothing is left to remove for iterations 3 and 4, as" in warning and "prune.width_multiple=8" in warning
    assert after(DENSE, Prune(width_multiple=8), cuts="uniform", target=0.32)[1] == []


def test_whole_layers_go():
    sizes, (warning,) = after(DENSE, Prune(target="layers"))
    assert [each.params for each in sizes] == [160_000, 120_000, 120_000, 120_000]
    assert "for iterations 3 and 4, as" in warning and "layers go in whole" in warning
    assert after(DENSE, Prune(target="layers"), cuts="uniform", iterations=2, target=0.4)[1] == []


def test_whole_experts_go_as_prune_removes_them():
    # cubic: 34,862, 52,762, 59,358 and 60,300 parameters are asked for
    sizes, (warning,) = after(MIXTURE, Prune(target="experts"))
    assert [each.experts for each in sizes] == [6, 4, 4, 4]
    assert [each.params for each in sizes] == [160_600, 140_400, 140_400, 140_400]
    assert [each.active_params for each in sizes] == [120_600, 120_400, 120_400, 120_400]
    assert "for iterations 3 and 4, as" in warning and "experts go in whole" in warning


def test_neurons_of_experts_go_by_eights():
    sizes, (warning,) = after(MIXTURE, Prune(width_multiple=1))
    assert [each.width for each in sizes] == [64, 40, 40, 32]
    assert [each.active_params for each in sizes] == [113_800, 109_000, 109_000, 107_400]
    assert "set schedule.cuts=uniform" in warning


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_shipped_config_is_warned_of(path):
    assert preflight.warnings(load_config(path)) == []


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
