"""The DAG as data: its steps and what they wait for, whatever the options of structure."""

from itertools import product
from pathlib import Path

import pytest

from ptl.config.dag import arm_of, iteration_of, nodes, stage_of
from ptl.config.run import load_config

CONFIGS = sorted((Path(__file__).parents[2] / "pipelines/prune_tune_loop/configs").glob("*.yaml"))
TINY = next(path for path in CONFIGS if path.stem == "tiny")
EXPORTS = [{"format": "gguf", "type": "q4_k_m"}, {"format": "compressed-tensors", "type": "fp8"}]


def dag_of(iterations=2, *, gate=False, control="off", doctor=False, export=()):
    changes = {"schedule.iterations": iterations, "gate.enabled": gate, "resources.doctor": doctor, "export": export}
    changes |= {"control": control != "off"} | ({"resources.control": control} if control != "off" else {})
    return nodes(load_config(TINY, changes))


def lines(dag):
    """A line for each step: its inputs, and what else it waits for."""
    for node in dag:
        inputs = [f"{name}={source.step}.{source.output}" for name, source in node.inputs.items()]
        yield " ".join([node.name, *inputs, *(["after", *node.after] if node.after else [])])


CASES = {
    "control beside the loop, an export": (
        {"control": "beside", "export": EXPORTS[:1]},
        """import-model
        evaluate-0 model=import-model.out
        prune-1 model=import-model.out
        recover-1 model=prune-1.out
        evaluate-1 model=recover-1.out
        prune-2 model=recover-1.out
        recover-2 model=prune-2.out
        evaluate-2 model=recover-2.out
        control-prune model=import-model.out
        control-recover model=control-prune.out
        control-evaluate model=control-recover.out
        export-gguf-q4-k-m model=evaluate-2.accepted dense=import-model.out after evaluate-0
        report final=evaluate-2.accepted control=control-evaluate.accepted after evaluate-1 export-gguf-q4-k-m""",
    ),
    # The first verdict waits for the dense model's scores, which a training need not.
    "gate, control after the loop, doctor": (
        {"gate": True, "control": "after", "doctor": True},
        """doctor
        import-model after doctor
        evaluate-0 model=import-model.out
        prune-1 model=import-model.out
        recover-1 model=prune-1.out
        evaluate-1 model=recover-1.out fallback=import-model.out after evaluate-0
        prune-2 model=evaluate-1.accepted
        recover-2 model=prune-2.out
        evaluate-2 model=recover-2.out fallback=evaluate-1.accepted
        control-prune model=import-model.out after evaluate-2
        control-recover model=control-prune.out
        control-evaluate model=control-recover.out
        report final=evaluate-2.accepted control=control-evaluate.accepted""",
    ),
}


def test_steps_inputs_and_order():
    for name, (options, expected) in CASES.items():
        assert list(lines(dag_of(**options))) == [line.strip() for line in expected.splitlines()], name


def test_every_dag_can_be_executed_in_its_order():
    structures = product((1, 3), (False, True), ("off", "beside", "after"), (False, True), ((), EXPORTS))
    for iterations, gate, control, doctor, export in structures:
        executable(dag_of(iterations, gate=gate, control=control, doctor=doctor, export=export))
    for path in CONFIGS:
        executable(nodes(load_config(path)))


def executable(dag):
    ended, behind = set(), {}
    for node in dag:
        assert node.name not in ended and set(node.needs) <= ended, node
        # Kubeflow's metadata store refuses the second event of an artifact and an execution: the run fails there.
        assert len(set(node.inputs.values())) == len(node.inputs), node
        behind[node.name] = {*node.needs, *(name for needed in node.needs for name in behind[needed])}
        ended.add(node.name)
    # The report comes after everything, and waits for nothing twice.
    assert behind["report"] == ended - {"report"}
    assert not {*dag[-1].after} & {source.step for source in dag[-1].inputs.values()}


def test_names_say_stage_arm_and_iteration():
    expected = {"doctor": ("doctor", "loop", 0), "import-model": ("import", "loop", 0)}
    expected |= {"report": ("report", "loop", 0), "evaluate-0": ("evaluate", "loop", 0)}
    for stage in ("prune", "recover", "evaluate"):
        expected |= {f"{stage}-{i}": (stage, "loop", i) for i in range(1, 13)}
        expected[f"control-{stage}"] = (stage, "control", 1)
    expected |= {f"export-{name}": ("export", "export", 0) for name in ("gguf-q4-k-m", "compressed-tensors-fp8")}
    dag = dag_of(12, control="beside", doctor=True, export=EXPORTS)
    assert {node.name: (stage_of(node.name), arm_of(node.name), iteration_of(node.name)) for node in dag} == expected
    for name in ("", "prune-", "prune-2-driver"):
        with pytest.raises(ValueError, match="no step"):
            stage_of(name)
