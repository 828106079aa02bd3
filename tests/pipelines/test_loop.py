"""The whole loop through the compiled pipeline, as a user runs it."""

import json
import re
from pathlib import Path

import mlflow
import pytest
import torch
from gguf_files import NO_LLAMA_CPP, needs_llama_cpp
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole_run import CHAIN, records

EXPORT = "export-gguf-q8-0"
EXPORTS = [] if NO_LLAMA_CPP else [EXPORT]  # of the run `finished`
CONTROL = [f"control-{stage}" for stage in ("prune", "recover", "evaluate")]
QUESTION = "Tom has 77 cups. Then Eva gets 73 cups from Tom. How many cups are left?\n"

pytestmark = pytest.mark.xdist_group("loop")


@pytest.fixture
def result(finished):
    return json.loads((finished[0] / "latest/result.json").read_text())


@pytest.fixture
def client(finished, monkeypatch):
    """A client of the run's database."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{finished[0]}/mlflow.db")
    return mlflow.MlflowClient()


def test_the_run_leaves_what_is_promised(finished, result):
    home, output = finished
    run = (home / "latest").resolve()
    for name in ("pipeline.yaml", "config.yaml", "report.html", "report.md", "README.md"):
        assert (run / name).stat().st_size > 100, name
    assert "report.html" in output and f"`ptl up --ui --home {home}`" in output
    rows = result["rows"]
    assert [(row["arm"], row["iteration"]) for row in rows] == [
        ("loop", 0),
        ("loop", 1),
        ("loop", 2),
        ("control", 1),
    ]
    assert rows[0]["accuracy"] >= 0.95 and rows[0]["verdict"] == "baseline"
    assert sum(row["recovery_tokens"] for row in rows[:3]) == rows[3]["recovery_tokens"] == 24_000
    assert rows[3]["params"] == rows[2]["params"] and rows[3]["digest"] != rows[2]["digest"]
    assert rows[2]["params"] < rows[1]["params"] < rows[0]["params"]
    assert rows[2]["params"] <= 0.8 * rows[0]["params"]
    assert (
        result["final"]["digest"] == rows[2]["digest"] and result["final"]["share_removed"] >= 0.2
    )
    dense, final = (result["speed"]["models"][name] for name in ("dense", "final"))
    assert (dense["params"], final["params"]) == (rows[0]["params"], rows[2]["params"])
    assert (
        result["speed"]["items"] == 64 and dense["solved"] > 60 and final["seconds_per_solved"] > 0
    )
    assert result["not_needed"] == []


def test_training_rows_are_compared_with_the_benchmark(finished, result):
    first, second = (records(finished[0])[name]["metadata"] for name in ("recover-1", "recover-2"))
    compared = first["details"]["decontaminated"]
    assert compared["rows_compared"] > compared["rows_dropped"] == first["rows_dropped"]
    assert second["rows_compared"] > first["rows_compared"]
    # The second reads the data from its start: it counts those of the first.
    expected = {"benchmark_items": 64, "benchmark_items_short": 0, "not_compared": []}
    assert result["decontaminated"] == expected | {
        name: second[name] for name in ("rows_compared", "rows_dropped")
    }


def test_the_steps_ran_in_the_order_of_the_plan(finished):
    found = records(finished[0])
    assert found.pop("report")["metadata"] == {"stage": "report"}  # the run is finished
    # by import-model, for all recoveries
    assert found.pop("items")["metadata"] == {"stage": "items"}
    assert sorted(found, key=lambda name: found[name]["metadata"]["started"]) == [
        *CHAIN,
        *CONTROL,
        *EXPORTS,
    ]
    mothers = {
        "prune-1": "import-model",
        "recover-1": "prune-1",
        "prune-2": "recover-1",
        "recover-2": "prune-2",
    }
    mothers |= {"control-prune": "import-model", "control-recover": "control-prune"}
    for child, mother in mothers.items():
        assert found[child]["pointer"]["parent_digest"] == found[mother]["pointer"]["digest"]
    assert (
        found["control-prune"]["metadata"]["params_before"]
        == found["import-model"]["pointer"]["params"]
    )


@needs_llama_cpp
def test_an_export_is_published_scored_and_registered(finished, result, client):
    record = records(finished[0])[EXPORT]
    folder = Path(record["pointer"]["uri"].removeprefix("file://"))
    assert (folder / "model-q8_0.gguf").read_bytes()[:4] == b"GGUF"
    (export,) = result["exports"]
    dense, final = (export["models"][name] for name in ("dense", "final"))
    assert final["bytes"] < dense["bytes"] < result["rows"][0]["scores"]["bytes"] / 3
    # 8 bits change next to nothing.
    pair = export["pairs"]["tiny_reasoner"]["final"]
    assert pair["items"] == 64 and abs(pair["difference"]) <= 2 / 64
    assert set(export["speed"]["models"]) == {"dense", "dense_export", "final", "final_export"}
    (version,) = client.search_model_versions("tags.`ptl.export` = 'gguf-q8_0'")
    assert (
        version.tags["ptl.model_id"] == record["pointer"]["model_id"]
        and version.source == record["pointer"]["uri"]
    )
    assert version.description.startswith("Export gguf-q8_0 of version 2 in run ")


def test_the_final_checkpoint_is_ordinary_and_generates(finished, client, ptl, tmp_path):
    """With plain transformers and with MLflow: it loads, and the KV cache changes nothing.

    The store stays sound, although MLflow writes a file of its own into the folder of a registered version.
    """
    pipeline = mlflow.transformers.load_model("models:/tiny/2")
    assert "####" in pipeline(QUESTION, max_new_tokens=24)[0]["generated_text"]
    folder = tmp_path / "final"
    code, said = ptl("fetch", "models:/tiny/2", folder, "--home", finished[0])
    assert code == 0, said
    names = {path.name for path in folder.iterdir()}
    assert "MLmodel" in names and "registered_model_meta" not in names
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    params = records(finished[0])["recover-2"]["pointer"]["params"]
    assert (
        params
        == sum(p.numel() for p in model.parameters())
        == sum(p.numel() for p in pipeline.model.parameters())
    )
    inputs = tokenizer(QUESTION, return_tensors="pt") | {"max_new_tokens": 24, "do_sample": False}
    with_cache, without = (model.generate(**inputs, use_cache=is_used) for is_used in (True, False))
    assert torch.equal(with_cache, without) and "####" in tokenizer.decode(with_cache[0])


def test_a_version_says_where_it_comes_from(finished, result, client):
    versions = {
        version.tags["ptl.step"]: version
        for version in client.search_model_versions("name = 'tiny'")
    }
    assert set(versions) == {"evaluate-1", "evaluate-2", "control-evaluate", *EXPORTS}
    scores = records(finished[0])["evaluate-2"]["metadata"]["scores"]
    last = versions["evaluate-2"].tags
    assert (last["ptl.accuracy"], last["ptl.arm"]) == (
        f"{scores['tasks'][0]['accuracy']:.4g}",
        "loop",
    )
    assert last["ptl.criterion"] and versions["control-evaluate"].tags["ptl.arm"] == "control"
    assert [versions[step].tags["ptl.parent_version"] for step in EXPORTS] == ["2"] * len(EXPORTS)
    alias = result["paired"]["tiny_reasoner"]["dense"]["verdict"].replace(" ", "-")
    best = client.get_model_version_by_alias("tiny", alias)
    assert best.version == versions["evaluate-2"].version
    assert best.description.startswith("Checkpoint that evaluate-2 has registered in run ")
    assert (
        f"{result['final']['params']:,} parameters" in best.description
        and "tiny_reasoner: " in best.description
    )
    assert "Prune-Tune Loop" in client.get_registered_model("tiny").description


def test_mlflow_shows_the_lineage_and_the_result(finished, result, client):
    (experiment,) = (
        each.experiment_id for each in client.search_experiments() if each.name == "ptl"
    )
    found = [client.get_run(run.info.run_id) for run in client.search_runs([experiment])]
    runs = {run.data.tags.get("ptl.step", "parent"): run for run in found}
    assert set(runs) == {"parent", "report", *CHAIN, *CONTROL, *EXPORTS}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs["parent"]
    parents = {
        run.data.tags["mlflow.parentRunId"] for name, run in runs.items() if name != "parent"
    }
    assert parents == {parent.info.run_id}
    made = {
        name: run.outputs.model_outputs
        for name, run in runs.items()
        if run.outputs and run.outputs.model_outputs
    }
    made = {name: outputs[0].model_id for name, outputs in made.items()}
    assert made.pop("parent") == made["recover-2"]
    assert set(made) == {name for name in (*CHAIN, *CONTROL, *EXPORTS) if "evaluate" not in name}
    assert runs["recover-1"].inputs.model_inputs[0].model_id == made["prune-1"]
    assert runs["evaluate-1"].inputs.model_inputs[0].model_id == made["recover-1"]
    assert (
        len(
            {
                point.step
                for point in client.get_metric_history(parent.info.run_id, "by_removed/accuracy")
            }
        )
        == 3
    )
    assert client.get_metric_history(runs["recover-1"].info.run_id, "train/loss")
    speed = {"speed/dense/decode_tokens_per_s/batch_1", "speed/final/seconds_per_solved"}
    assert speed <= set(runs["evaluate-2"].data.metrics) and not speed & set(
        runs["evaluate-1"].data.metrics
    )
    models = {model.model_id: model for model in client.search_logged_models([experiment])}
    recovered = models[made["recover-2"]]
    assert recovered.name == f"{parent.info.run_name}-recover-2"
    assert "tiny" in recovered.tags["mlflow.modelVersions"], (
        "it says itself that it is a registered model's version"
    )
    numbers = {
        "dense/accuracy": result["rows"][0]["accuracy"],
        "final/accuracy": result["rows"][2]["accuracy"],
        "final/removed": result["final"]["share_removed"],
        "final/p": result["paired"]["tiny_reasoner"]["dense"]["p_different"],
    }
    assert numbers.items() <= parent.data.metrics.items()
    beginning = (finished[0] / "latest/report.md").read_text().split("\n")[2]
    assert parent.data.tags["mlflow.note.content"] == "**Result**: " + re.sub(
        r"[*\\]", "", beginning
    )
    params = {
        "ptl.prune.criterion": "taylor",
        "ptl.schedule.recovery_tokens": "24000",
        "ptl.recover.0.method": "cpt",
    }
    assert params.items() <= parent.data.params.items()
    names = {each.dataset.name: each.tags[0].value for each in parent.inputs.dataset_inputs}
    assert names["train.jsonl.gz"] == "calibration, training"
