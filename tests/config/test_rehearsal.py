"""A rehearsal runs the steps of its run, each with little to do, and nothing ends it early."""

from itertools import product

import yaml
from checkout import SHIPPED, TINY

from ptl.config import dag
from ptl.config.parameters import parameters
from ptl.config.recover import MIN_TOKENS, Recovery
from ptl.config.rehearsal import changes, is_rehearsal, left_out, rehearsal
from ptl.config.run import Config, Gate, load_config
from ptl.config.schedule import plan
from ptl.evaluation import gate
from ptl.evaluation.paired import Outcomes, paired


def config(**fields):
    settings = yaml.safe_load(TINY.read_text())
    for name, value in fields.items():
        settings[name] = (
            {**settings[name], **value} if isinstance(settings.get(name), dict) else value
        )
    return Config.model_validate(settings)


def shrunk(run, gpus=0):
    return {field: values for field, *values in changes(run, rehearsal(run, gpus))}


def test_what_decides_only_how_long_a_step_works_shrinks():
    expected = {
        "name": ["tiny", "tiny-rehearsal"],
        "calibration.num_sequences": [128, 4],
        "schedule.tokens": ["doubling", "uniform"],
        "schedule.recovery_tokens": [100_000_000, 500_000],  # at most
        # 125,000 tokens of an iteration are 30 batches of 16 x 256
        "recover.0.save_steps": [50, 30],
        "evaluate.tasks.0.limit": [100, 8],
        "evaluate.tasks.0.max_new_tokens": [None, 64],
        "evaluate.tasks.1.limit": [None, 8],
        "evaluate.tasks.1.samples": [8, 2],
        "evaluate.speed.repeats": [3, 1],
        "storage.experiment": ["ptl", "ptl-rehearsal"],
    }
    tasks = [{"name": "gsm8k", "limit": 100}, {"name": "mbpp", "max_new_tokens": 32, "samples": 8}]
    run = config(schedule={"recovery_tokens": 10**8}, evaluate={"tasks": tasks})
    assert shrunk(run) == expected
    # The gate works, and accepts everything.
    gated = {
        "gate.alpha": [0.05, 1e-300],
        "gate.strict": [True, False],
        "schedule.cuts": ["cubic", "uniform"],
    }
    assert (
        shrunk(run.model_copy(update={"gate": Gate(enabled=True, strict=True)})) == expected | gated
    )
    # Where layers come last, equal cuts would be another plan.
    last = config(gate={"enabled": True}, prune={"target": "neurons_then_layers"})
    assert "schedule.cuts" not in shrunk(last)
    assert shrunk(last)["recover.0.save_steps"] == [50, 1]  # 1,250 tokens are no batch
    # Of width what is chosen and what is set stays.
    run = config(gate={"enabled": True}, prune={"target": "width", "width": {"kv": 1}})
    assert rehearsal(run, gpus=0).prune == run.prune and shrunk(run)["schedule.cuts"] == [
        "cubic",
        "uniform",
    ]


def test_the_steps_are_those_of_the_run_and_its_names_others():
    for path, gpus in product(SHIPPED, (0, 1, 8, None)):
        run = load_config(path)
        rehearsed = rehearsal(run, gpus)
        assert dag.nodes(rehearsed) == dag.nodes(run), (path, gpus)
        assert [stage.method for stage in rehearsed.recover] == [
            stage.method for stage in run.recover
        ]
        assert rehearsed.schedule.target == run.schedule.target
        assert rehearsed.schedule.recovery_tokens <= max(run.schedule.recovery_tokens / 100, 2_000)
        assert is_rehearsal(rehearsed.name, rehearsed.storage.experiment)
        assert not is_rehearsal(run.name, run.storage.experiment)
    run = config(name="a" * 52 + "-" + "b" * 10)
    assert rehearsal(run, gpus=0).name == "a" * 52 + "-rehearsal"


def test_a_rehearsal_registers_no_model():
    for storage in ({}, {"registered_model": "mine"}):
        run = config(storage=storage)
        assert parameters(run)["registered_model"] == storage.get("registered_model", "tiny")
        assert parameters(rehearsal(run, gpus=0))["registered_model"] == ""


def test_every_stage_trains_in_every_iteration():
    stages = [
        {"method": "cpt", "share": 0.05},
        {"method": "distil"},
        {"method": "grpo", "steps": 24},
    ]
    for growth, tokens in product(("uniform", "doubling", "quadrupling"), (2_000, 100_000, 10**10)):
        schedule = {"iterations": 2, "tokens": growth, "recovery_tokens": tokens}
        rehearsed = rehearsal(config(schedule=schedule, recover=stages), gpus=0)
        recovery, iterations = (
            Recovery(stages=rehearsed.recover),
            plan(rehearsed.schedule, rehearsed.prune),
        )
        budgets = [
            budget
            for each in iterations
            for budget in recovery.budgets(each.tokens)
            if budget is not None
        ]
        assert len(budgets) == 4 and min(budgets) >= MIN_TOKENS, (growth, tokens)
        assert rehearsed.schedule.recovery_tokens <= min(tokens, 500_000)
        assert rehearsed.recover[2].steps == 2  # one in each iteration


def test_the_gate_accepts_the_worst_candidate():
    rehearsed = rehearsal(config(gate={"enabled": True, "strict": True}), gpus=0)
    settings = rehearsed.gate
    # Of sixteen tasks of eight items each was right before.
    worst = paired(Outcomes([1] * 128, [0] * 128), settings.margin, settings.alpha)
    sizes = {"params": 90, "target_params": 60, "parent_params": 100}
    decision = gate.decide(settings, gate.State(), **sizes, baseline=worst, parent=worst)
    assert settings.enabled and decision.decision == "accepted"


GPUS = {"accelerator": "nvidia.com/gpu", "accelerators": 8}
GRPO = {"method": "grpo", "batch_size": 64, "num_generations": 8, "accumulation": 4}


def test_reinforcement_learning_is_short_and_unguarded():
    (stage,) = rehearsal(config(recover=[GRPO]), gpus=8).recover
    assert (stage.steps, stage.guard_prompts, stage.accumulation, stage.save_steps) == (4, 0, 1, 1)
    # a group on each GPU
    assert (stage.num_generations, stage.batch_size, stage.max_completion_length) == (2, 16, 64)
    # Only the cluster has nodes.
    run = config(
        recover=[GRPO | {"accumulation": 1}], resources=GPUS | {"steps": {"recover": {"nodes": 2}}}
    )
    on_cpus, on_gpus, on_cluster = (rehearsal(run, gpus) for gpus in (0, 8, None))
    assert [each.resources.nodes_of("recover") for each in (on_cpus, on_gpus, on_cluster)] == [
        1,
        1,
        2,
    ]
    assert [each.recover[0].batch_size for each in (on_cpus, on_gpus, on_cluster)] == [2, 16, 32]


def test_what_needs_a_gpu_is_replaced_and_named_and_processes_on_cpus_stay():
    run = config(
        recover=[
            {"method": "cpt", "dtype": "bfloat16", "sharding": "fsdp", "processes": 4},
            {"method": "grpo"},
        ],
        evaluate={"backend": "vllm", "speed": {"repeats": 0}},
        resources=GPUS | {"accelerators": 4},
    )
    lacks = [
        "recover.dtype=bfloat16",
        "recover.sharding=fsdp",
        "evaluate.backend=vllm",
        "recover.processes=4",
    ]
    assert left_out(run, rehearsal(run, gpus=0)) == lacks
    # On the cluster, where the run itself will be, all of it is there.
    assert left_out(run, rehearsal(run, gpus=None)) == []
    rehearsed = rehearsal(config(recover=[{"method": "cpt", "processes": 4}]), gpus=0)
    assert rehearsed.recover[0].processes == 4


def test_a_run_with_a_process_for_each_gpu_on_a_machine_with_others():
    for batch_size, gpus, processes in (
        (32, 0, 1),
        (32, 1, 1),
        (32, 3, 2),
        (32, 8, 8),
        (32, 16, 8),
        (6, 8, 8),
    ):
        stage = {"method": "cpt", "batch_size": batch_size, "sharding": "fsdp", "dtype": "float32"}
        run = config(recover=[stage], resources=GPUS)
        rehearsed = rehearsal(run, gpus)
        # Three GPUs cannot share a batch of 32; one that the run itself cannot divide is not hidden.
        assert rehearsed.recover[0].processes == processes, (batch_size, gpus)
        assert rehearsed.recover[0].sharding == ("fsdp" if processes > 1 else "none")
        fewer = ["recover.processes=8"] * (processes < 8)
        assert left_out(run, rehearsed) == ["recover.sharding=fsdp"] * (processes == 1) + fewer
