"""The compiled pipeline: same bytes, no GPU stack, small, in order, and equal to the golden files."""

import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from pipelines.prune_tune_loop.compact import local_copy
from pipelines.prune_tune_loop.pipeline import compile_pipeline, parameters
from ptl.config import dag
from ptl.config.cluster import Storage
from ptl.config.run import Config, check, essentials, load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "pipelines/prune_tune_loop/configs").glob("*.yaml"))
TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"
GOLDEN = ROOT / "tests" / "golden"
HEAVY = ("torch", "transformers", "trl", "mlflow", "lm_eval", "peft", "datasets", "numpy")
# What is structure: it is in the DAG, in the tasks' Kubernetes settings or in the names of both.
STRUCTURE = {"name", "schedule.iterations", "control", "export", "resources", "images", "storage"}


@functools.cache
def text_of(path, sets):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pipeline.yaml"
        compile_pipeline(load_config(path, dict(sets)), out)
        return out.read_text()


def compiled(path, tmp_path, **sets):
    out = tmp_path / "pipeline.yaml"
    out.write_text(text_of(path, tuple((name.replace("__", "."), value) for name, value in sets.items())))
    return out


def spec_of(path):
    return next(iter(yaml.safe_load_all(path.read_text())))


def tasks_of(path):
    return spec_of(path)["root"]["dag"]["tasks"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_compiles(path, tmp_path):
    tasks = tasks_of(compiled(path, tmp_path))
    config = load_config(path)
    assert len(tasks) == 3 + 3 * config.schedule.iterations + 3 * config.control + config.resources.doctor


@pytest.mark.parametrize("name", ["tiny", "gpu-gate", "onprem"])
def test_golden(name, tmp_path):
    """PTL_UPDATE_GOLDEN=1 writes the files again; read the difference before committing it."""
    text = compiled(TINY.with_name(f"{name}.yaml"), tmp_path).read_text()
    text = re.sub(r"^sdkVersion: .*$", "sdkVersion: any", text, flags=re.MULTILINE)
    golden = GOLDEN / f"{name}.yaml"
    if os.environ.get("PTL_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.slow
def test_compiling_is_quick_and_imports_nothing_heavy(tmp_path):
    started = time.monotonic()
    command = [sys.executable, "-X", "importtime", "-m", "ptl", "compile", str(TINY), "-o", str(tmp_path / "p.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "18 steps" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "kfp" in imported and not imported & set(HEAVY)
    assert time.monotonic() - started < 30  # benchmarks/compile.py times it on an idle machine


@pytest.mark.slow
def test_the_same_config_gives_the_same_bytes_in_another_process(tmp_path):
    mine = compiled(TINY, tmp_path).read_bytes()
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "ptl", "compile", str(TINY), "-o", str(tmp_path / "p.yaml")]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed})
        assert (tmp_path / "p.yaml").read_bytes() == mine


@pytest.mark.parametrize(("config", "iterations", "tasks", "limit"), [("tiny", 12, 42, 150), ("onprem", 12, 42, 400)])
@pytest.mark.slow
def test_many_tasks_stay_small(config, iterations, tasks, limit, tmp_path):
    path = compiled(TINY.with_name(f"{config}.yaml"), tmp_path, schedule__iterations=iterations)
    assert len(tasks_of(path)) == tasks
    assert path.stat().st_size < limit * 1024


def test_names_and_order(tmp_path):
    tasks = tasks_of(compiled(TINY, tmp_path, schedule__iterations=2))
    names = {key: task["taskInfo"]["name"] for key, task in tasks.items()}
    iterations = [f"{stage}-{i}" for i in (1, 2) for stage in ("prune", "recover", "evaluate")]
    control = ["control-prune", "control-recover", "control-evaluate"]
    order = ["import-model", "evaluate-0", *iterations, *control, "report"]
    assert sorted(names.values()) == sorted(order)
    assert names == {name: name for name in order}, "a server lists tasks by their keys, never by display names"


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_only_data_makes_dependencies_and_no_task_takes_an_artifact_twice(path, gate, tmp_path):
    """The metadata store has UNIQUE(artifact, execution, type): a second event of a pair kills the task's driver."""
    config = load_config(path, {"gate.enabled": gate})
    tasks = tasks_of(compiled(path, tmp_path, gate__enabled=gate))
    for node in dag.nodes(config):
        task = tasks[node.name]
        taken = [source["taskOutputArtifact"] for source in task["inputs"].get("artifacts", {}).values()]
        sources = [(source["producerTask"], source["outputArtifactKey"]) for source in taken]
        assert len(sources) == len(set(sources)), node.name
        assert sorted(sources) == sorted((source.step, source.output) for source in node.inputs.values())
        assert set(task.get("dependentTasks", [])) == set(node.needs), node.name


def test_one_machine_runs_the_steps_one_after_another_and_each_once(tmp_path):
    order = [node.name for node in dag.nodes(load_config(TINY))]
    spec = next(iter(yaml.safe_load_all(local_copy(compiled(TINY, tmp_path, resources__retries=3).read_text(), order))))
    tasks = spec["root"]["dag"]["tasks"]
    for before, name in itertools.pairwise(order):
        assert before in tasks[name]["dependentTasks"], f"{name} may start before {before}"
    assert not any("retryPolicy" in task for task in tasks.values()), "a step tries again by itself"
    assert len(spec["components"]) == len(tasks), "outputs of tasks that share a component overwrite each other"


def test_what_a_cluster_mounts_is_not_looked_for_on_one_machine(tmp_path):
    path = compiled(TINY, tmp_path, storage__cache_claim="claim", resources__timeout=60)
    (spec, _) = yaml.safe_load_all(local_copy(path.read_text(), list(tasks_of(path))))
    names = [{each["name"] for each in e["container"]["env"]} for e in spec["deploymentSpec"]["executors"].values()]
    assert names and all(each == {"PTL_TIMEOUT"} for each in names)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_nothing_is_lost_with_the_defaults(path):
    """Every step carries what the config says beyond the defaults; a stage's method is one, and is kept."""
    config = load_config(path)
    bare = essentials(config)
    # Kubeflow has no null: of the volumes, a null that is no default is lost, and no step needs to know it.
    same = {"storage": Storage()}
    whole = check(Config, bare, "bare", folder=Path.cwd())
    assert whole.model_copy(update=same) == config.model_copy(update=same)
    assert [stage["method"] for stage in bare["recover"]] == [stage.method for stage in config.recover]
    assert "null" not in json.dumps(bare)


def test_an_export_is_compiled_without_null(tmp_path):
    """Kubeflow has none: a limit that is not set is left out."""
    forms = [{"format": "gguf", "type": "q8_0"}, {"format": "gguf", "type": "q4_0", "limit": 200}]
    compile_pipeline(load_config(TINY, {"export": forms}), tmp_path / "pipeline.yaml")
    tasks = tasks_of(tmp_path / "pipeline.yaml")
    settings = [tasks[name]["inputs"]["parameters"] for name in ("export-gguf-q8-0", "export-gguf-q4-0")]
    exports = [parameters["export"]["runtimeValue"]["constant"] for parameters in settings]
    assert exports == forms
    listed = tasks["import-model"]["inputs"]["parameters"]["exports"]["runtimeValue"]["constant"]
    assert listed == exports


def test_iterations_start_from_what_the_gate_accepted(tmp_path):
    tasks = tasks_of(compiled(TINY, tmp_path, schedule__iterations=2, gate__enabled=True))
    name = {key: task["taskInfo"]["name"] for key, task in tasks.items()}
    source = {}
    for key, task in tasks.items():
        for arg, value in task["inputs"].get("artifacts", {}).items():
            output = value["taskOutputArtifact"]
            source[name[key], arg] = (name[output["producerTask"]], output["outputArtifactKey"])
    assert source["prune-1", "model"] == source["evaluate-1", "fallback"] == ("import-model", "out")
    assert source["control-prune", "model"] == ("import-model", "out")
    assert source["prune-2", "model"] == source["evaluate-2", "fallback"] == ("evaluate-1", "accepted")
    assert source["evaluate-1", "model"] == ("recover-1", "out")
    assert source["report", "final"] == ("evaluate-2", "accepted")


def test_what_is_not_structural_is_a_parameter_with_a_default(tmp_path):
    config = load_config(TINY)
    form = spec_of(compiled(TINY, tmp_path))["root"]["inputDefinitions"]["parameters"]
    assert set(form) == set(parameters(config))
    assert all("defaultValue" in field for field in form.values())
    covers = {
        "model": {"model", "revision"},
        "schedule": {"target", "goal", "recovery_tokens", "cuts", "tokens"},
        "calibration": {"calibration"},
        "training": {"training"},
        "prune": {"prune_settings"},
        "recover": {"recover_settings"},
        "evaluate": {"evaluate_settings"},
        "gate": {"gate"},
        "seed": {"seed"},
    }
    assert set(covers) | {name.partition(".")[0] for name in STRUCTURE} == set(type(config).model_fields)
    assert set().union(*covers.values()) | {"experiment", "registered_model", "earlier_runs"} == set(form)
    assert set(type(config.schedule).model_fields) == covers["schedule"] - {"goal"} | {"iterations"}


def test_a_goal_is_a_parameter_of_its_own_and_the_target_stays_a_number(tmp_path):
    path = compiled(TINY, tmp_path, schedule__target__memory="300kB", schedule__target__tokens=10)
    inputs = spec_of(path)["root"]["inputDefinitions"]["parameters"]
    assert inputs["target"] == {"defaultValue": 0.0, "isOptional": True, "parameterType": "NUMBER_DOUBLE"}
    assert inputs["goal"]["defaultValue"] == {"memory": "300kB", "tokens": 10}
    taken = {name: task["inputs"]["parameters"] for name, task in tasks_of(path).items()}
    assert {name for name, parameters in taken.items() if "goal" in parameters} == {"import-model", "report"}


def test_the_graph_is_drawn_with_its_edges_and_its_longest_path(tmp_path):
    path = compiled(TINY, tmp_path, schedule__iterations=16)
    done = subprocess.run(
        [sys.executable, "docs/graph.py", str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "%% 54 steps, 70 edges; the longest path has 35 steps:"
    assert "evaluate-0" not in lines[1] and lines[2:].count("  evaluate-0 --> report") == 1
    assert sum(line.startswith("  evaluate-0 ") for line in lines) == 1


def test_no_task_takes_results_from_kfps_cache(tmp_path):
    assert not any(task["cachingOptions"] for task in tasks_of(compiled(TINY, tmp_path)).values())


def test_tasks_of_one_kind_share_one_definition(tmp_path):
    spec = spec_of(compiled(TINY, tmp_path))
    assert len(spec["components"]) == len(spec["deploymentSpec"]["executors"]) == 5
    used = {task["componentRef"]["name"] for task in spec["root"]["dag"]["tasks"].values()}
    assert used == set(spec["components"])


def test_different_executors_are_not_shared(tmp_path):
    from pipelines.prune_tune_loop.compact import compact

    path = compiled(TINY, tmp_path)
    spec, platform = yaml.safe_load_all(path.read_text())
    executors = spec["deploymentSpec"]["executors"]
    executors["exec-prune-2"] = {"container": {**executors["exec-prune"]["container"], "image": "other"}}
    spec["components"]["comp-prune-2"] = {**spec["components"]["comp-prune"], "executorLabel": "exec-prune-2"}
    spec["root"]["dag"]["tasks"]["prune-2"]["componentRef"]["name"] = "comp-prune-2"
    path.write_text(yaml.safe_dump_all([spec, platform]))
    compact(path)
    after = spec_of(path)
    assert after["root"]["dag"]["tasks"]["prune-2"]["componentRef"]["name"] == "comp-prune-2"
    assert after["deploymentSpec"]["executors"]["exec-prune-2"]["container"]["image"] == "other"


def test_the_doctor_comes_first_where_prune_will_run(tmp_path):
    wanted = {"resources__accelerator": "nvidia.com/gpu", "resources__accelerators": 1, "resources__doctor": True}
    spec = spec_of(compiled(TINY, tmp_path, **wanted))
    task = spec["root"]["dag"]["tasks"]["doctor"]
    assert "dependentTasks" not in task and spec["root"]["dag"]["tasks"]["import-model"]["dependentTasks"] == ["doctor"]
    containers = {name: entry["container"] for name, entry in spec["deploymentSpec"]["executors"].items()}
    assert containers["exec-doctor"]["image"] == containers["exec-prune"]["image"]
    assert containers["exec-doctor"]["resources"] == containers["exec-prune"]["resources"]
