"""Warnings of settings that are allowed and yet likely to waste a run."""

from dataclasses import replace

import huggingface_hub
import pytest
from bodies import body
from checkout import DENSE as CHECKPOINT
from checkout import SHIPPED, TINY
from huggingface_hub.errors import RepositoryNotFoundError
from typer.testing import CliRunner

from ptl.cli import app
from ptl.config.run import load_config
from ptl.config.schedule import Prune, Schedule
from ptl.errors import InputError
from ptl.local import run_directory
from ptl.model.dimensions import model_dimensions
from ptl.model.families import FAMILIES
from ptl.preflight import preflight, target

STAGE = {"method": "cpt", "decay": "each"}


def warnings(**fields):
    config = {"gate.enabled": True, "recover": [STAGE], "schedule.iterations": 8}
    config |= {name.replace("__", "."): value for name, value in fields.items()}
    return preflight.warnings(load_config(TINY, config))


def test_a_gate_with_few_tokens_first_and_a_rate_that_decays_only_at_the_end_are_warned_of():
    (warning,) = warnings()
    assert (
        warning.startswith("schedule.tokens=doubling, with the gate on")
        and "set schedule.tokens=uniform" in warning
    )
    for fields in (
        {"schedule__tokens": "uniform"},
        {"schedule__iterations": 1},
        {"gate__enabled": False},
    ):
        assert warnings(**fields) == []
    # No shipped config is warned of anything.
    assert not any(preflight.warnings(load_config(path)) for path in SHIPPED)
    stages = [STAGE | {"share": 0.5}, {"method": "distil"}]
    (warning,) = warnings(recover=stages, schedule__tokens="uniform")
    assert warning.startswith("recover.decay=0.5, with the gate on")
    # the last iteration is the only one
    assert warnings(recover=stages, schedule__iterations=1) == []
    assert warnings(gate__enabled=False, recover=stages) == []


def test_accelerators_that_a_step_cannot_use_are_warned_of():
    def idle(steps=None, **fields):
        resources = {"accelerator": "nvidia.com/gpu", "accelerators": 8, "steps": steps or {}}
        return [
            warning.removeprefix("resources.accelerators: ")
            for warning in warnings(gate__enabled=False, resources=resources, **fields)
        ]

    stages = [STAGE | {"processes": 4}, STAGE | {"processes": 2}]
    assert idle(recover=stages) == [
        "recover holds 8 and uses 4: set resources.steps.recover.accelerators, or raise recover.processes",
        "evaluate holds 8 and uses 1: set evaluate.backend=vllm with evaluate.speed.repeats=0, which uses all, or "
        "resources.steps.evaluate.accelerators=1",
    ]
    one = {"evaluate": {"accelerators": 1}}
    assert idle(one | {"recover": {"accelerators": 4}}, recover=stages) == []
    # The second stage uses all.
    assert idle(one, recover=[STAGE | {"processes": 4}, STAGE]) == []
    # vLLM uses all.
    by_vllm = {"evaluate__backend": "vllm", "evaluate__speed__repeats": 0}
    assert idle(recover=[STAGE], **by_vllm) == []


def after(model, prune, **schedule):
    """The models after each iteration, and what is said of them."""
    planned = Schedule(**{"iterations": 4, "target": 0.3, "recovery_tokens": 0} | schedule)
    config = load_config(TINY).model_copy(update={"schedule": planned, "prune": prune})
    sizes = [after for _, after in target.possible_paths(model, planned, prune)[0]]
    return sizes, " ".join(preflight.model_warnings(config, model))


# 100 neurons of 1,000 parameters, and as much again beside them
SIZES = {
    "params": 200_000,
    "layers": 4,
    "width": 100,
    "params_per_neuron": 1000,
    "params_per_layer": 40_000,
}
DENSE = body(**SIZES)
# 10 experts of 10,000 parameters, of which a token meets 2; a router of 100 for each
EXPERTS = {
    "experts": 10,
    "experts_per_token": 2,
    "params_per_expert": 10_100,
    "params_per_route": 100,
}
MIXTURE = body(**SIZES | EXPERTS | {"params": 201_000, "fewest_experts": 2})


def test_models_after_each_iteration_have_whole_units():
    # cubic: 34,688, 52,500, 59,063 and 60,000 parameters of the dense model are asked for
    for model, prune, params, idle in (
        (DENSE, {"width_multiple": 1}, [165_000, 147_000, 140_000, 140_000], "iteration 4"),
        (DENSE, {"width_multiple": 8}, [164_000, 140_000, 140_000, 140_000], "iterations 3 and 4"),
        (DENSE, {"target": "layers"}, [160_000, 120_000, 120_000, 120_000], "iterations 3 and 4"),
        (
            MIXTURE,
            {"target": "experts"},
            [160_600, 140_400, 140_400, 140_400],
            "iterations 3 and 4",
        ),
    ):
        sizes, said = after(model, Prune(**prune))
        assert [each.params for each in sizes] == params, prune
        assert f"nothing is left to remove for {idle}, as" in said, prune
    assert after(DENSE, Prune(width_multiple=8), cuts="uniform", target=0.32)[1] == ""
    # Fewer KV heads leave nothing to the eighth, a smaller hidden size nothing to the seventh.
    _, said = after(
        model_dimensions(CHECKPOINT, FAMILIES["llama"]),
        Prune(width_multiple=1),
        target=0.65,
        iterations=8,
    )
    assert said.startswith("perhaps nothing is left to remove for iterations 7 and 8, as")
    assert [each.active_params for each in sizes] == [120_600, 120_400, 120_400, 120_400]
    sizes, _ = after(MIXTURE, Prune(width_multiple=1))  # an expert's neurons go by eights
    assert [(each.width, each.active_params) for each in sizes[::2]] == [
        (64, 113_800),
        (40, 109_000),
    ]
    # Of a mixture's three layers that have experts one goes, with a third of all that is in them.
    first = after(replace(MIXTURE, dense_layers=(0,)), Prune(target="layers"))[0][0]
    assert (first.layers, first.params_per_neuron, first.params_per_expert) == (3, 500, 5050)


@pytest.fixture
def command(monkeypatch):
    """A command on tiny.yaml, without its checks of the model and its start."""
    model = body(
        params=213_568, layers=4, width=192, params_per_neuron=768, params_per_layer=50_000
    )
    monkeypatch.setattr("ptl.preflight.preflight.preflight", lambda *sections: (CHECKPOINT, model))
    monkeypatch.setattr("pipelines.prune_tune_loop.submit.submit", lambda *config, **options: 0)

    def run(name, *sets):
        return CliRunner().invoke(
            app.app, [name, str(TINY), *[part for entry in sets for part in ("--set", entry)]]
        )

    return run


@pytest.mark.parametrize("error", [None, OSError, RepositoryNotFoundError])
def test_validate_asks_the_hub_for_data_sets_or_says_that_it_did_not(
    error, command, monkeypatch, tmp_path
):
    questions = []

    def dataset_info(name, **options):
        questions.append((name, options["revision"]))
        if error:
            raise error.__new__(error, "no")

    monkeypatch.setattr(huggingface_hub, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "task.yaml").write_text("task: mine\ndataset_path: openai/gsm8k\n")
    task = f"evaluate.tasks=[{{name: {tmp_path / 'task.yaml'}, metric: exact_match}}]"
    done = command("validate", "training.source=meta-math/NOPE", "training.revision=abc", task)
    if error is None:
        assert questions == [("meta-math/NOPE", "abc"), ("openai/gsm8k", None)]
    if error is RepositoryNotFoundError:
        assert (
            isinstance(done.exception, InputError)
            and done.exception.field == "training.sources.0.source"
        )
    else:
        not_asked = "not looked at, as the hub cannot be asked: meta-math/NOPE and openai/gsm8k"
        assert done.exit_code == 0 and (not_asked in done.stdout) == (error is OSError)


def test_commands_say_the_tokens_and_warn_before_anything_starts(command):
    for name in ("validate", "plan", "submit"):
        done = command(
            name,
            "schedule.recovery_tokens=5000000000",
            "gate.enabled=true",
            "schedule.iterations=8",
        )
        assert done.exit_code == 0, done.output
        assert name == "submit" or "warning: 5,000,000,000 recovery tokens" in done.stderr
        assert (
            "warning: schedule.tokens=doubling" in done.stderr
            and "warning: recover.decay=0.5" in done.stderr
        )
    assert command("plan", "chat.enabled=true").exit_code == 0  # of a model without a template


def test_a_batch_that_this_machines_processes_cannot_divide_is_refused_before_a_run_begins(
    command, monkeypatch
):
    monkeypatch.setattr(run_directory, "open_run", lambda *_: pytest.fail("a run has begun"))
    done = command("run", "recover.0.processes=3")
    assert "times the 3 training processes" in str(done.exception)


def test_what_only_the_control_cannot_reach_is_refused_where_there_is_one(command):
    """The loop ends with layers, the control's one cut is of neurons alone."""
    far = (
        "prune.target=neurons_then_layers",
        "schedule.cuts=uniform",
        "schedule.iterations=2",
        "schedule.target=0.7",
    )
    for name in ("validate", "plan"):
        assert "cannot be reached" in str(command(name, *far).exception)
        assert command(name, *far, "control=false").exit_code == 0
