"""The DAG as data: its steps and what they wait for, for every shipped config and every option of structure."""

from functools import cache
from itertools import product
from pathlib import Path

import pytest

from ptl.config.dag import Source, arm_of, iteration_of, nodes, stage_of
from ptl.config.run import Config, check, load_config

CONFIGS = sorted((Path(__file__).parents[2] / "pipelines/prune_tune_loop/configs").glob("*.yaml"))
OPTIONS = list(product((False, True), ("off", "beside", "after"), (False, True)))


@cache
def config_of(path, gate, control, doctor):
    changes = {"gate.enabled": gate, "control": control != "off", "resources.doctor": doctor}
    return load_config(path, changes | ({"resources.control": control} if control != "off" else {}))


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def shipped(request):
    return request.param


@pytest.fixture(
    params=OPTIONS,
    ids=lambda option: f"{'gate' if option[0] else 'no-gate'}-control-{option[1]}{'-doctor' * option[2]}",
)
def case(request, shipped):
    """A config, its gate, its control (off, beside, after), and its nodes by name."""
    gate, control, doctor = request.param
    config = config_of(shipped, gate, control, doctor)
    return config, gate, control, {node.name: node for node in nodes(config)}


def before(dag, name):
    """Every step that must have ended before `name` starts, found by walking the graph."""
    found, left = set(), [name]
    while left:
        for needed in dag[left.pop()].needs:
            if needed not in found:
                found.add(needed)
                left.append(needed)
    return found


def test_names_are_unique_and_listed_in_an_order_that_can_be_executed(case):
    config, _, _, dag = case
    listed = nodes(config)
    assert len(listed) == len(dag)
    done = set()
    for node in listed:
        assert set(node.needs) <= done, node
        done.add(node.name)


def test_no_step_takes_one_artifact_twice(case):
    """Kubeflow's metadata store refuses the second event of an artifact and an execution: the run fails there."""
    for node in case[3].values():
        assert len(set(node.inputs.values())) == len(node.inputs), node


def test_only_what_compares_with_the_dense_model_waits_for_its_scores(case):
    """With the gate that is the first verdict, before which the dense model is scored beside a training."""
    _, gate, control, dag = case
    waiting = {name for name, node in dag.items() if "evaluate-0" in node.needs}
    assert waiting == {"evaluate-1" if gate else "control-prune" if control == "after" else "report"}
    assert all("evaluate-0" in before(dag, name) for name in ("report", *(["evaluate-1"] if gate else [])))
    assert "evaluate-0" not in before(dag, "recover-1")


def test_an_iteration_waits_for_the_verdict_only_with_the_gate(case):
    config, gate, _, dag = case
    for k in range(1, config.schedule.iterations):
        assert (f"evaluate-{k}" in before(dag, f"prune-{k + 1}")) == gate
        start = Source(f"evaluate-{k}", "accepted") if gate else Source(f"recover-{k}", "out")
        assert dag[f"prune-{k + 1}"].inputs == {"model": start}
        fallback = {"fallback": start} if gate else {}
        recovered = Source(f"recover-{k + 1}", "out")
        assert dag[f"evaluate-{k + 1}"].inputs == {"model": recovered} | fallback


def test_the_control_needs_nothing_of_the_loop_unless_it_comes_after(case):
    _, _, control, dag = case
    arm = [name for name in dag if arm_of(name) == "control"]
    if control == "off":
        assert arm == [] and "control" not in dag["report"].inputs
        return
    assert arm == ["control-prune", "control-recover", "control-evaluate"]
    shared = {"doctor", "import-model", "evaluate-0"} & set(dag)
    loop = {name for name in dag if arm_of(name) == "loop"} - shared - {"report"}
    for name in arm:
        of_loop = before(dag, name) - set(arm)
        assert (shared | loop == of_loop) if control == "after" else (of_loop <= shared), name
    assert not any(before(dag, name) & set(arm) for name in loop | shared)
    assert dag["control-prune"].inputs == {"model": Source("import-model", "out")}


def test_the_report_comes_after_every_other_step(case):
    config, _, _, dag = case
    assert before(dag, "report") == set(dag) - {"report"}
    assert dag["report"].inputs["final"] == Source(f"evaluate-{config.schedule.iterations}", "accepted")
    assert not set(dag["report"].after) & {source.step for source in dag["report"].inputs.values()}


def test_exports_take_the_final_and_the_dense_model_and_come_before_the_report(case):
    config = case[0]
    forms = [{"format": "gguf", "type": "q4_k_m"}, {"format": "compressed-tensors", "type": "fp8"}]
    dag = {node.name: node for node in nodes(check(Config, config.model_dump() | {"export": forms}, "config"))}
    names = ["export-gguf-q4-k-m", "export-compressed-tensors-fp8"]
    accepted = dag["report"].inputs["final"]
    for name in names:
        assert dag[name].inputs == {"model": accepted, "dense": Source("import-model", "out")}
        assert (stage_of(name), arm_of(name), iteration_of(name)) == ("export", "export", 0)
        assert "evaluate-0" in before(dag, name)  # they are compared with its items
    assert set(names) <= set(dag["report"].needs)


def test_the_doctor_comes_first(case):
    config, _, _, dag = case
    assert ("doctor" in dag) == config.resources.doctor
    assert all("doctor" in before(dag, name) for name in set(dag) - {"doctor"} if config.resources.doctor)


def test_names_say_stage_arm_and_iteration(case):
    config, _, control, dag = case
    stages = ("prune", "recover", "evaluate")
    expected = {"import-model": ("import", "loop", 0), "evaluate-0": ("evaluate", "loop", 0)}
    expected |= {"report": ("report", "loop", 0)} | ({"doctor": ("doctor", "loop", 0)} if "doctor" in dag else {})
    for i in range(1, config.schedule.iterations + 1):
        expected |= {f"{stage}-{i}": (stage, "loop", i) for stage in stages}
    if control != "off":
        expected |= {f"control-{stage}": (stage, "control", 1) for stage in stages}
    assert {name: (stage_of(name), arm_of(name), iteration_of(name)) for name in dag} == expected


def test_what_is_no_step_has_no_stage():
    for name in ("", "prune-", "prune-x", "prune-2-driver", "control", "executor"):
        with pytest.raises(ValueError, match="no step"):
            stage_of(name)
