"""The compiled pipeline: same bytes, no GPU stack, small, in order, and equal to the golden files."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import compiled
import pytest
import yaml
from checkout import CONFIGS, ROOT, SHIPPED, TINY
from compiled import documents
from golden_messages import FOLDER, expect

from pipelines.prune_tune_loop import descriptions
from pipelines.prune_tune_loop.compact import local_copy
from pipelines.prune_tune_loop.pipeline import parameters
from ptl.config import dag
from ptl.config.cluster import Storage
from ptl.config.run import Config, check, essentials, load_config

HEAVY = {"torch", "transformers", "trl", "mlflow", "lm_eval", "peft", "datasets", "numpy"}
HOW_TO_SEE_IT = """to see how, compile one here and at the commit before, and compare the two files:
    git worktree add ../before main; cd ../before
    python -m ptl compile pipelines/prune_tune_loop/configs/NAME.yaml -o NAME.yaml
PTL_UPDATE_GOLDEN=1 renews the digests
"""


@pytest.mark.parametrize(
    ("path", "sets"),
    [(path, {}) for path in SHIPPED] + [(TINY, {"gate.enabled": True, "resources.doctor": True})],
    ids=[*(path.stem for path in SHIPPED), "gate-and-doctor"],
)
def test_every_shipped_config_becomes_the_tasks_of_its_plan(path, sets):
    config, (spec, _) = load_config(path, sets), documents(sets, path)
    found = spec["root"]["dag"]["tasks"]
    nodes = {node.name: node for node in dag.nodes(config)}
    optional = config.resources.doctor + (config.training.answers == "self")
    assert len(found) == 3 + 3 * config.schedule.iterations + 3 * config.control + optional
    # A server lists tasks by their keys, never by display names.
    assert {key: task["taskInfo"]["name"] for key, task in found.items()} == {
        name: name for name in nodes
    }
    for name, task in found.items():
        taken = [
            source["taskOutputArtifact"] for source in task["inputs"].get("artifacts", {}).values()
        ]
        sources = [(source["producerTask"], source["outputArtifactKey"]) for source in taken]
        assert sorted(sources) == sorted(
            (source.step, source.output) for source in nodes[name].inputs.values()
        )
        assert set(task.get("dependentTasks", [])) == set(nodes[name].needs), name
        assert not task["cachingOptions"], "a result from KFP's cache has no record in this run"
    used = {task["componentRef"]["name"] for task in found.values()}
    assert used == set(spec["components"]) and len(spec["deploymentSpec"]["executors"]) == len(used)


def without_sdk_version(path):
    return re.sub(
        r"^sdkVersion: .*$", "sdkVersion: any", compiled.text(load_config(path)), flags=re.M
    )


def test_golden():
    """PTL_UPDATE_GOLDEN=1 writes the file again; read the difference before committing it."""
    expect("tiny.yaml", without_sdk_version(TINY))


def test_golden_digests():
    """Each shipped config has a digest, as `sha256sum` writes it: examples/ci/compiled.sh checks them too."""
    lines = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        digest = hashlib.sha256(without_sdk_version(path).encode()).hexdigest()
        lines.append(f"{digest}  {path.name}\n")
    if not os.environ.get("PTL_UPDATE_GOLDEN"):
        golden = (FOLDER / "compiled.sha256").read_text()
        changed = [line.split()[1] for line in lines if line not in golden]
        assert not changed, f"the pipelines of {changed} have changed; {HOW_TO_SEE_IT}"
    expect("compiled.sha256", "".join(lines))


def test_another_process_compiles_the_same_bytes_and_imports_nothing_heavy(tmp_path):
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "ptl",
        "compile",
        TINY,
        "-o",
        tmp_path / "pipeline.yaml",
    ]
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "18 steps" in done.stdout
    assert (tmp_path / "pipeline.yaml").read_text() == compiled.text(load_config(TINY))
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "kfp" in imported and not HEAVY & {name.partition(".")[0] for name in imported}
    assert (
        "pipelines.prune_tune_loop.pipeline" in imported
        and "pipelines.prune_tune_loop.submit" not in imported
    )


def test_many_tasks_stay_small():
    config = load_config(CONFIGS / "onprem.yaml", {"schedule.iterations": 12})
    assert len(compiled.text(config).encode()) < 400 * 1024 and len(dag.nodes(config)) == 42


def test_one_machine_runs_the_steps_one_after_another_each_once_and_without_a_clusters_mounts():
    sets = {"resources.retries": 3, "resources.timeout": 60, "storage.cache_claim": "claim"}
    config = load_config(TINY, sets)
    nodes = dag.nodes(config)
    spec, _ = yaml.safe_load_all(local_copy(compiled.text(config), [node.name for node in nodes]))
    found = spec["root"]["dag"]["tasks"]
    for before, node in itertools.pairwise(nodes):
        # That of the one before, and what it waits for in any case
        assert found[node.name]["dependentTasks"] == sorted({*node.needs, before.name})
    assert found[nodes[0].name]["dependentTasks"] == []
    assert not any("retryPolicy" in task for task in found.values()), "a step tries again by itself"
    assert len(spec["components"]) == len(found), (
        "outputs of tasks that share a component overwrite each other"
    )
    for executor in spec["deploymentSpec"]["executors"].values():
        variables = {entry["name"]: entry["value"] for entry in executor["container"]["env"]}
        assert variables == {"PTL_RETRIES": "3", "PTL_TIMEOUT": "45"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_nothing_is_lost_with_the_defaults(path):
    """Every step carries what the config says beyond the defaults; a stage's method is one, and is kept."""
    config = load_config(path)
    bare = essentials(config)
    # Kubeflow has no null: of the volumes, a null that is no default is lost, and no step needs to know it.
    same = {"storage": Storage()}
    whole = check(Config, bare, "bare", folder=Path.cwd())
    assert whole.model_copy(update=same) == config.model_copy(update=same)
    assert [stage["method"] for stage in bare["recover"]] == [
        stage.method for stage in config.recover
    ]
    assert "null" not in json.dumps(bare)


def test_each_parameter_and_step_has_its_description():
    spec, _ = documents({"gate.enabled": True, "resources.doctor": True})
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    assert set(inputs) == set(descriptions.PARAMETERS)
    for name, field in inputs.items():
        assert (
            field["description"] == descriptions.PARAMETERS[name].plain
            and "](" not in field["description"]
        ), name
    for name, task in spec["root"]["dag"]["tasks"].items():
        step = spec["components"][task["componentRef"]["name"]]["inputDefinitions"]["parameters"][
            "step"
        ]
        assert step["description"] == descriptions.STEPS[dag.stage_of(name)], name
    assert spec["pipelineInfo"]["description"] == (
        f"Prune-Tune Loop: prune, recover and evaluate {inputs['model']['defaultValue']} in 4 iterations, each "
        "compared with the dense model by the gate, until 40 % of its parameters are removed"
    )
    sets = {"schedule.target": 100_000, "schedule.iterations": 1, "gate.enabled": False}
    summary = descriptions.summary(load_config(TINY, sets))
    assert summary.endswith(", until 100,000 parameters are left")


def test_what_no_cluster_has_is_warned_of(ptl, tmp_path):
    code, said = ptl(
        "compile", TINY, "-o", "p.yaml", "--set", "images.registry=registry.example.com/team"
    )
    assert code == 0 and "warning" not in said, said  # the images contain the examples
    (tmp_path / "rows.jsonl").write_text("{}\n")
    code, said = ptl(
        "compile", TINY, "-o", "p.yaml", "--set", f"training.source={tmp_path / 'rows.jsonl'}"
    )
    assert f"warning: {tmp_path / 'rows.jsonl'} is on this machine" in said, said
    assert (
        code == 0 and "warning: images.registry is not set: a cluster pulls no ptl-prune:" in said
    )


def test_what_is_not_structural_is_a_parameter_with_a_default():
    inputs = documents({})[0]["root"]["inputDefinitions"]["parameters"]
    assert set(inputs) == set(parameters(load_config(TINY)))
    assert all("defaultValue" in field for field in inputs.values())
    structure = {"name", "control", "export", "resources", "images", "storage"}
    covered = {name.removesuffix("_settings") for name in inputs} | structure | {"schedule"}
    assert set(Config.model_fields) <= covered, "a section of the config reaches no step"
    described = {"description": descriptions.PARAMETERS["target"].plain}
    assert inputs["target"] == described | {
        "defaultValue": 0.4,
        "isOptional": True,
        "parameterType": "NUMBER_DOUBLE",
    }
