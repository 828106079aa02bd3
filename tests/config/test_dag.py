"""The DAG as data: its steps and what they wait for, whatever the options of structure."""

from itertools import product
from typing import get_args

import golden_messages
import pytest
from checkout import SHIPPED, TINY

from ptl.config.cluster import StepName
from ptl.config.dag import arm_of, iteration_of, kind_of, nodes, stage_of
from ptl.config.run import load_config
from ptl.errors import InputError

EXPORTS = [{"format": "gguf", "type": "q4_k_m"}, {"format": "compressed-tensors", "type": "fp8"}]


def dag_of(iterations=2, *, gate=False, control="off", doctor=False, export=(), answers="given"):
    changes = {
        "schedule.iterations": iterations,
        "gate.enabled": gate,
        "resources.doctor": doctor,
        "export": export,
    }
    changes["training.answers"] = answers
    changes |= {"control": control != "off"} | (
        {"resources.control": control} if control != "off" else {}
    )
    return nodes(load_config(TINY, changes))


def test_golden_steps_inputs_and_order():
    """A line for each step: its inputs, and what else it waits for.

    The first verdict waits for the dense model's scores, which a training need not.
    """

    def lines(*options):
        with_control = next((each for each in options if each in ("beside", "after")), "off")
        export = EXPORTS[: "export" in options]
        settings = {"gate": "gate" in options, "doctor": "doctor" in options}
        settings["answers"] = "self" if "self" in options else "given"
        for node in dag_of(control=with_control, export=export, **settings):
            inputs = [
                f"{name}={source.step}.{source.output}" for name, source in node.inputs.items()
            ]
            yield " ".join([node.name, *inputs, *(["after", *node.after] if node.after else [])])

    golden_messages.check("dag.txt", lambda *options: "\n".join(lines(*options)))


def test_every_dag_can_be_executed_in_its_order():
    controls, answers = ("off", "beside", "after"), ("given", "self")
    names = ("gate", "control", "doctor", "export", "answers")
    for iterations, *choice in product(
        (1, 3), (False, True), controls, (False, True), ((), EXPORTS), answers
    ):
        executable(dag_of(iterations, **dict(zip(names, choice, strict=True))))
    for path in SHIPPED:
        executable(nodes(load_config(path)))


def executable(dag):
    ended, behind = set(), {}
    for node in dag:
        assert node.name not in ended and set(node.needs) <= ended, node
        # Kubeflow's metadata store has UNIQUE(artifact, execution, type): a second event kills the task's driver.
        assert len(set(node.inputs.values())) == len(node.inputs), node
        behind[node.name] = {
            *node.needs,
            *(name for needed in node.needs for name in behind[needed]),
        }
        ended.add(node.name)
    # The report comes after everything, and waits for nothing twice.
    assert behind["report"] == ended - {"report"}
    assert not {*dag[-1].after} & {source.step for source in dag[-1].inputs.values()}


def test_names_say_stage_arm_and_iteration():
    expected = {"doctor": ("doctor", "loop", 0), "import-model": ("import", "loop", 0)}
    expected |= {"report": ("report", "loop", 0), "evaluate-0": ("evaluate", "loop", 0)}
    expected["answers"] = ("answers", "loop", 0)
    for stage in ("prune", "recover", "evaluate"):
        expected |= {f"{stage}-{i}": (stage, "loop", i) for i in range(1, 13)}
        expected[f"control-{stage}"] = (stage, "control", 1)
    expected |= {
        f"export-{name}": ("export", "export", 0)
        for name in ("gguf-q4-k-m", "compressed-tensors-fp8")
    }
    dag = dag_of(12, control="beside", doctor=True, export=EXPORTS, answers="self")
    assert {
        node.name: (stage_of(node.name), arm_of(node.name), iteration_of(node.name)) for node in dag
    } == expected
    assert {kind_of(node.name) for node in dag} == set(get_args(StepName))
    assert [kind_of(name) for name in ("doctor", "answers", "control-recover")] == [
        "prune",
        "evaluate",
        "recover",
    ]
    for name in ("", "prune-", "prune-2-driver"):
        with pytest.raises(InputError, match="is no step; name it as ptl does"):
            stage_of(name)
