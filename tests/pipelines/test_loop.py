"""The whole loop through the compiled pipeline, as a user runs it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import NO_LLAMA_CPP, needs_llama_cpp
from whole_run import CHAIN, records

ROOT = Path(__file__).parents[2]
EXPORT = "export-gguf-q8-0"
EXPORTS = [] if NO_LLAMA_CPP else [EXPORT]  # of the run `finished`
CONTROL = [f"control-{stage}" for stage in ("prune", "recover", "evaluate")]

pytestmark = pytest.mark.xdist_group("loop")


def test_the_run_leaves_what_is_promised(finished):
    home, output = finished
    run = (home / "latest").resolve()
    result = json.loads((run / "result.json").read_text())
    for name in ("pipeline.yaml", "config.yaml", "report.html", "report.md", "README.md"):
        assert (run / name).stat().st_size > 100, name
    rows = result["rows"]
    assert [(row["arm"], row["iteration"]) for row in rows] == [
        ("loop", 0),
        ("loop", 1),
        ("loop", 2),
        ("control", 1),
    ]
    assert {
        "params",
        "accuracy",
        "low",
        "high",
        "items",
        "task",
        "recovery_tokens",
        "verdict",
        "uri",
        "digest",
    } <= rows[0].keys()
    assert rows[0]["accuracy"] >= 0.95 and rows[0]["verdict"] == "baseline"
    assert sum(row["recovery_tokens"] for row in rows[:3]) == rows[3]["recovery_tokens"] == 24_000
    assert rows[3]["params"] == rows[2]["params"] and rows[3]["digest"] != rows[2]["digest"]
    assert rows[2]["params"] < rows[1]["params"] < rows[0]["params"]
    assert rows[2]["params"] <= 0.8 * rows[0]["params"]
    assert result["final"]["digest"] == rows[2]["digest"] and result["final"]["share_removed"] >= 0.2
    assert "report.html" in output and "ptl up --ui" in output
    dense, final = (result["speed"]["models"][name] for name in ("dense", "final"))
    assert (dense["params"], final["params"]) == (rows[0]["params"], rows[2]["params"])
    assert result["speed"]["items"] == 64 and dense["solved"] > 60 and final["seconds_per_solved"] > 0
    assert "times as fast" in (run / "report.md").read_text()
    assert result["not_needed"] == []


def test_training_rows_are_compared_with_the_benchmark(finished):
    for name in ("recover-1", "recover-2"):
        metadata = records(finished[0])[name]["metadata"]
        told = metadata["details"]["decontaminated"]
        assert told["benchmarks"] == {"tiny_reasoner": {"items": 64, "short": 0, "dropped": told["dropped"]}}
        assert told["rows"] > metadata["rows_dropped"] == told["dropped"] and told["not_compared"] == []
    result = json.loads((finished[0] / "latest" / "result.json").read_text())
    metadata = [records(finished[0])[name]["metadata"] for name in ("recover-1", "recover-2")]
    assert metadata[1]["rows_compared"] > metadata[0]["rows_compared"]
    assert result["decontaminated"] == {
        "rows": metadata[1]["rows_compared"],  # the second reads the data from its start: it counts those of the first
        "dropped": metadata[1]["rows_dropped"],
        "items": 64,
        "short": 0,
        "not_compared": [],
    }
    told = result["decontaminated"]
    assert f"{told['rows']:,} training rows" in " ".join(finished[1].split())


def test_the_steps_ran_in_the_order_of_the_plan(finished):
    found = records(finished[0])
    assert found.pop("report")["metadata"] == {"stage": "report"}  # the run is finished
    assert found.pop("items")["metadata"] == {"stage": "items"}  # by import-model, for all recoveries
    order = sorted(found, key=lambda name: found[name]["metadata"]["started"])
    assert order == [*CHAIN, *CONTROL, *EXPORTS]
    for child, parent in zip(CHAIN[2:], CHAIN[1:-1], strict=True):
        if not child.startswith("evaluate"):
            mother = parent.replace("evaluate", "recover") if parent != "evaluate-0" else "import-model"
            assert found[child]["pointer"]["parent_digest"] == found[mother]["pointer"]["digest"]
    for child, mother in (("control-prune", "import-model"), ("control-recover", "control-prune")):
        assert found[child]["pointer"]["parent_digest"] == found[mother]["pointer"]["digest"]
    assert found["control-prune"]["metadata"]["params_before"] == found["import-model"]["pointer"]["params"]


@needs_llama_cpp
def test_an_export_is_published_scored_and_registered(finished):
    home, output = finished
    record = records(home)[EXPORT]
    folder = Path(record["pointer"]["uri"].removeprefix("file://"))
    assert (folder / "model-q8_0.gguf").read_bytes()[:4] == b"GGUF"
    result = json.loads((home / "latest" / "result.json").read_text())
    (export,) = result["exports"]
    dense, final = (export["models"][name] for name in ("dense", "final"))
    assert final["bytes"] < dense["bytes"] < result["rows"][0]["scores"]["bytes"] / 3
    # 8 bits change next to nothing.
    assert export["pairs"]["tiny_reasoner"]["final"]["items"] == 64
    assert abs(export["pairs"]["tiny_reasoner"]["final"]["difference"]) <= 2 / 64
    assert set(export["speed"]["models"]) == {"dense", "dense_export", "final", "final_export"}
    assert "gguf-q8_0" in output
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    (version,) = client.search_model_versions("tags.`ptl.export` = 'gguf-q8_0'")
    assert version.tags["ptl.model_id"] == record["pointer"]["model_id"] and version.source == record["pointer"]["uri"]


@pytest.mark.slow
def test_the_final_checkpoint_is_ordinary_and_generates(finished, tmp_path):
    """In a new process, with plain transformers: loads, has no leftovers of training; the KV cache changes nothing."""
    home, folder = finished[0], tmp_path / "final"
    fetched = subprocess.run(
        [sys.executable, "-m", "ptl", "fetch", str(home / "latest"), str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert fetched.returncode == 0, fetched.stderr
    assert "library_name: transformers" in (folder / "README.md").read_text()
    assert {path.name for path in folder.glob("*.safetensors")} == {"model.safetensors"}
    params = records(home)["recover-2"]["pointer"]["params"]
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("Tom has 77 cups. Then Eva gets 73 cups from Tom. How many cups are left?\\n", return_tensors="pt")
with_cache, without = (model.generate(**inputs, max_new_tokens=24, do_sample=False, use_cache=c) for c in (True, False))
assert torch.equal(with_cache, without)
print(tokenizer.decode(with_cache[0]), sum(p.numel() for p in model.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "####" in done.stdout and str(params) in done.stdout


@pytest.mark.slow
def test_mlflow_loads_a_version_and_the_store_stays_sound(finished, tmp_path):
    """MLflow writes a file of its own into the folder of a registered version."""
    home, reference = finished[0], "models:/tiny/2"
    code = f"""
import mlflow
mlflow.set_tracking_uri("sqlite:///{home}/mlflow.db")
pipeline = mlflow.transformers.load_model("{reference}")
print(pipeline("Tom has 77 cups. Then Eva gets 73 cups from Tom. How many cups are left?\\n", max_new_tokens=24))
print(sum(p.numel() for p in pipeline.model.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "####" in done.stdout and str(records(home)["recover-2"]["pointer"]["params"]) in done.stdout
    fetch = [sys.executable, "-m", "ptl", "fetch", reference, str(tmp_path / "model"), "--home", str(home)]
    fetched = subprocess.run(fetch, cwd=ROOT, capture_output=True, text=True)
    assert fetched.returncode == 0, fetched.stderr
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert "MLmodel" in names and "registered_model_meta" not in names


@pytest.mark.slow
def test_a_version_says_where_it_comes_from(finished):
    from mlflow import MlflowClient

    home = finished[0]
    client = MlflowClient(f"sqlite:///{home}/mlflow.db", registry_uri=f"sqlite:///{home}/mlflow.db")
    versions = {version.tags["ptl.step"]: version for version in client.search_model_versions("name = 'tiny'")}
    assert set(versions) == {"evaluate-1", "evaluate-2", "control-evaluate", *EXPORTS}
    scores = records(home)["evaluate-2"]["metadata"]["scores"]
    last = versions["evaluate-2"].tags
    assert (last["ptl.accuracy"], last["ptl.arm"]) == (f"{scores['tasks'][0]['accuracy']:.4g}", "loop")
    assert last["ptl.criterion"] and versions["control-evaluate"].tags["ptl.arm"] == "control"
    assert [versions[step].tags["ptl.parent_version"] for step in EXPORTS] == ["2"] * len(EXPORTS)
    verdict = json.loads((home / "latest" / "result.json").read_text())["paired"]["dense"]["verdict"]
    assert (
        client.get_model_version_by_alias("tiny", verdict.replace(" ", "-")).version == versions["evaluate-2"].version
    )


@pytest.mark.slow
def test_mlflow_shows_the_lineage(finished):
    from mlflow import MlflowClient

    home = finished[0]
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "ptl")
    found = [client.get_run(run.info.run_id) for run in client.search_runs([experiment.experiment_id])]
    runs = {run.data.tags.get("ptl.step", "parent"): run for run in found}
    assert set(runs) == {"parent", "report", *CHAIN, *CONTROL, *EXPORTS}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs["parent"].info.run_id
    assert all(run.data.tags["mlflow.parentRunId"] == parent for name, run in runs.items() if name != "parent")
    made = {
        name: run.outputs.model_outputs[0].model_id
        for name, run in runs.items()
        if run.outputs and run.outputs.model_outputs
    }
    assert set(made) == {name for name in (*CHAIN, *CONTROL, *EXPORTS) if "evaluate" not in name}
    assert runs["recover-1"].inputs.model_inputs[0].model_id == made["prune-1"]
    assert runs["evaluate-1"].inputs.model_inputs[0].model_id == made["recover-1"]
    points = client.get_metric_history(parent, "by_removed/accuracy")
    assert len(points) == 3 and len({point.step for point in points}) == 3
    assert client.get_metric_history(runs["recover-1"].info.run_id, "train/loss")
    metrics = {name: run.data.metrics for name, run in runs.items()}
    speed = {"speed/dense/decode_tokens_per_s/batch_1", "speed/final/seconds_per_solved"}
    assert speed <= set(metrics["evaluate-2"]) and not speed & set(metrics["evaluate-1"])
    versions = client.search_model_versions("name = 'tiny'")
    steps = {version.tags["ptl.step"] for version in versions}
    assert steps == {"evaluate-1", "evaluate-2", "control-evaluate", *EXPORTS}
    # Without the gate an alias needs proof, which 64 items do not give: none moves, and the report step says so.
    assert client.get_registered_model("tiny").aliases == {} and "no alias for version" in finished[1]
    assert made["recover-2"] in {model.model_id for model in _registered(client, experiment, "tiny")}


def _registered(client, experiment, name):
    """The LoggedModels that say themselves that they are a version of a registered model."""
    models = client.search_logged_models([experiment.experiment_id])
    return [model for model in models if name in model.tags.get("mlflow.modelVersions", "")]


def test_the_page_of_the_run_in_mlflow_says_what_came_out_of_what(finished):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished[0]}/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "ptl")
    (found,) = client.search_runs([experiment.experiment_id], "tags.`ptl.role` = 'parent'")
    parent, result = client.get_run(found.info.run_id), json.loads((finished[0] / "latest/result.json").read_text())
    rows = result["rows"]
    assert parent.data.metrics["dense/accuracy"] == rows[0]["accuracy"]
    assert parent.data.metrics["final/accuracy"] == rows[2]["accuracy"]
    assert parent.data.metrics["final/removed"] == result["final"]["share_removed"]
    assert parent.data.metrics["final/p"] == result["paired"]["tiny_reasoner"]["dense"]["p_different"]
    beginning = (finished[0] / "latest/report.md").read_text().split("\n")[2]
    assert parent.data.tags["mlflow.note.content"] == "**Result**: " + re.sub(r"[*\\]", "", beginning)
    assert parent.data.params["ptl.prune.criterion"] == "taylor" and parent.data.params["ptl.seed"] == "0"
    assert parent.data.params["ptl.schedule.recovery_tokens"] == "24000"
    assert parent.data.params["ptl.recover.0.method"] == "cpt"
    names = {each.dataset.name: each.tags[0].value for each in parent.inputs.dataset_inputs}
    assert names["train.jsonl.gz"] == "calibration, training" and "evaluation" in names.values()
    models = client.search_logged_models([experiment.experiment_id])
    assert f"{parent.info.run_name}-recover-2" in {model.name for model in models}
