"""A rehearsal runs the steps of its run, each with little to do, and nothing ends it early."""

from pathlib import Path

import pytest
import yaml

from ptl.config import dag
from ptl.config.recover import MIN_TOKENS, Recovery
from ptl.config.rehearsal import changes, left_out, rehearsal
from ptl.config.run import Config, load_config
from ptl.config.schedule import plan
from ptl.evaluation import gate
from ptl.evaluation.paired import paired

FOLDER = Path(__file__).parents[2] / "pipelines/prune_tune_loop/configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))


def config(**fields):
    settings = yaml.safe_load((FOLDER / "tiny.yaml").read_text())
    for name, value in fields.items():
        settings[name] = {**settings[name], **value} if isinstance(settings.get(name), dict) else value
    return Config.model_validate(settings)


@pytest.mark.parametrize("gpus", [0, 1, 8, None])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_steps_are_those_of_the_run(path, gpus):
    run = load_config(path)
    rehearsed = rehearsal(run, gpus)
    assert dag.nodes(rehearsed) == dag.nodes(run)
    assert [stage.method for stage in rehearsed.recover] == [stage.method for stage in run.recover]
    assert [task.name for task in rehearsed.evaluate.tasks] == [task.name for task in run.evaluate.tasks]
    assert all(task.limit <= 8 for task in rehearsed.evaluate.tasks)
    assert rehearsed.schedule.target == run.schedule.target
    assert rehearsed.schedule.recovery_tokens <= max(run.schedule.recovery_tokens / 100, 2_000)
    assert rehearsed.name != run.name and rehearsed.storage.experiment != run.storage.experiment


@pytest.mark.parametrize("tokens", [2_000, 100_000, 10**10])
@pytest.mark.parametrize("growth", ["uniform", "doubling", "quadrupling"])
def test_every_stage_trains_in_every_iteration(growth, tokens):
    stages = [{"method": "cpt", "share": 0.05}, {"method": "distil"}, {"method": "grpo", "steps": 24}]
    schedule = {"iterations": 2, "tokens": growth, "recovery_tokens": tokens}
    rehearsed = rehearsal(config(schedule=schedule, recover=stages), gpus=0)
    budgets = [
        budget
        for iteration in plan(rehearsed.schedule, rehearsed.prune)
        for budget in Recovery(stages=rehearsed.recover).budgets(iteration.tokens)
        if budget is not None
    ]
    assert len(budgets) == 4 and min(budgets) >= MIN_TOKENS
    assert rehearsed.schedule.recovery_tokens <= min(tokens, 500_000)
    assert rehearsed.recover[2].steps == 2  # one in each iteration


def test_the_gate_accepts_the_worst_candidate():
    rehearsed = rehearsal(config(gate={"enabled": True, "strict": True}), gpus=0)
    settings = rehearsed.gate
    # two groups of eight tasks, of which each item was right before
    worst = paired([1] * 128, [0] * 128, settings.margin, settings.alpha)
    decision = gate.decide(
        settings, gate.State(), params=90, target_params=60, parent_params=100, baseline=worst, parent=worst
    )
    assert settings.enabled and decision.decision == "accepted"
    assert rehearsed.schedule.cuts == "uniform"  # no last part so small that the target is reached before it


def test_reinforcement_learning_is_short_and_unguarded():
    stage = {"method": "grpo", "batch_size": 64, "num_generations": 8, "accumulation": 4}
    (rehearsed,) = rehearsal(config(recover=[stage]), gpus=8).recover
    assert (rehearsed.steps, rehearsed.guard_prompts, rehearsed.accumulation) == (4, 0, 1)
    assert rehearsed.batch_size == 16  # a group of two on each GPU


def test_what_needs_a_gpu_is_replaced_and_named():
    run = config(
        recover=[
            {"method": "cpt", "dtype": "bfloat16", "sharding": "fsdp", "processes": 4},
            {"method": "grpo"},
        ],
        evaluate={"backend": "vllm", "speed": {"repeats": 0}},
        resources={"accelerator": "nvidia.com/gpu", "accelerators": 4},
    )
    rehearsed = rehearsal(run, gpus=0)
    assert rehearsed.evaluate.backend == "hf"
    assert left_out(run, rehearsed) == [
        "recover.dtype=bfloat16",
        "recover.sharding=fsdp",
        "evaluate.backend=vllm",
        "recover.processes=4",
    ]
    # on the cluster, where the run itself will be, all of it is there
    assert left_out(run, rehearsal(run, gpus=None)) == []


def test_processes_of_a_run_on_cpus_stay_and_others_are_as_many_as_gpus():
    parts = {"recover": [{"method": "cpt", "processes": 4}], "evaluate": {"processes": 4}}
    on_cpus = rehearsal(config(**parts), gpus=0)
    assert on_cpus.recover[0].processes == on_cpus.evaluate.processes == 4
    on_gpus = config(**parts, resources={"accelerator": "nvidia.com/gpu", "accelerators": 4})
    rehearsed = rehearsal(on_gpus, gpus=2)
    assert rehearsed.recover[0].processes == rehearsed.evaluate.processes == 2


LACKS = ["recover.processes=8"]


@pytest.mark.parametrize(
    ("gpus", "processes", "lacks"),
    [(0, 1, LACKS), (1, 1, LACKS), (3, 2, LACKS), (8, 8, []), (16, 8, [])],
)
def test_a_run_with_a_process_for_each_gpu_on_a_machine_with_others(gpus, processes, lacks):
    resources = {"accelerator": "nvidia.com/gpu", "accelerators": 8}
    stage = {"method": "cpt", "batch_size": 32, "accumulation": 4, "dtype": "float32"}
    run = config(recover=[stage], resources=resources)
    rehearsed = rehearsal(run, gpus)
    # three GPUs cannot share the eight sequences of a pass
    assert rehearsed.recover[0].processes == processes
    assert left_out(run, rehearsed) == lacks
    on_this_machine = config(recover=[stage])
    assert left_out(on_this_machine, rehearsal(on_this_machine, gpus)) == []


def test_one_process_alone_shards_nothing():
    resources = {"accelerator": "nvidia.com/gpu", "accelerators": 4}
    run = config(recover=[{"method": "cpt", "batch_size": 4, "sharding": "fsdp"}], resources=resources)
    rehearsed = rehearsal(run, gpus=3)  # on two of them it would
    assert (rehearsed.recover[0].processes, rehearsed.recover[0].sharding) == (2, "fsdp")
    assert rehearsal(run, gpus=1).recover[0].sharding == "none"
    run = config(
        recover=[{"method": "cpt", "batch_size": 25, "sharding": "fsdp"}], resources=resources | {"accelerators": 5}
    )
    rehearsed = rehearsal(run, gpus=3)
    assert rehearsed.recover[0].processes == 1 and "recover.sharding=fsdp" in left_out(run, rehearsed)


def test_a_batch_that_the_run_cannot_divide_is_not_hidden():
    stage = {"method": "cpt", "batch_size": 6, "processes": 4}
    run = config(recover=[stage], resources={"accelerator": "nvidia.com/gpu", "accelerators": 4})
    assert rehearsal(run, gpus=4).recover[0].processes == 4


def test_a_long_name_stays_a_name_and_the_registered_model_another():
    run = config(name="a" * 52 + "-" + "b" * 10, storage={"registered_model": "mine"})
    rehearsed = rehearsal(run, gpus=0)
    assert rehearsed.name == "a" * 52 + "-rehearsal"
    assert rehearsed.storage.registered_model == "mine-rehearsal"


def test_each_entry_of_a_list_is_a_change():
    run = config(evaluate={"tasks": [{"name": "gsm8k", "limit": 100}, {"name": "mbpp"}]})
    limits = [change[1:] for change in changes(run, rehearsal(run, 0)) if change.field.endswith(".limit")]
    assert limits == [(100, 8), (None, 8)]


def test_nodes_are_rehearsed_as_groups_of_processes_on_cpus_and_on_the_cluster():
    stage = {"method": "grpo", "batch_size": 64, "num_generations": 8}
    gpus = {"accelerator": "nvidia.com/gpu", "accelerators": 8}
    run = config(recover=[stage], resources=gpus | {"steps": {"recover": {"nodes": 2}}})
    on_cpus = rehearsal(run, gpus=0)
    assert on_cpus.resources.nodes_of("recover") == 2 and on_cpus.recover[0].batch_size == 4
    assert rehearsal(run, gpus=8).resources.nodes_of("recover") == 1
