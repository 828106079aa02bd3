"""Manifests of what a run has made."""

import dataclasses
from pathlib import Path

import yaml
from run_records import export, record_of, scores

from ptl.config.run import load_config
from ptl.steps import serving
from ptl.storage.store import Pointer

TINY = Path(__file__).parents[2] / "pipelines/prune_tune_loop/configs/tiny.yaml"
FINAL = Pointer("s3://bucket/final", "sha256:" + "f" * 64, params=5, original_params=9, step="recover-4")


def records(uri):
    scored = {"stage": "evaluate", "checkpoint": dataclasses.asdict(FINAL), "scores": scores(5, 0.9, 1)}
    form = record_of("export-gguf-q8-0", export(5, 3, 0.9))
    form["pointer"] |= {"uri": uri, "step": "export-gguf-q8-0"}
    return {"evaluate-4": {"metadata": scored, "pointer": {}}, "export-gguf-q8-0": form}


def test_each_model_on_s3_gets_a_manifest(tmp_path):
    config = load_config(TINY, {"name": "3b-reasoner"})
    serving.write_manifests(FINAL, records("s3://bucket/form"), config, tmp_path)
    final, form = (
        yaml.safe_load((tmp_path / f"inference-service{suffix}.yaml").read_text()) for suffix in ("", "-gguf-q8_0")
    )
    assert final["metadata"]["name"] == "model-3b-reasoner"
    assert final["spec"]["predictor"]["model"]["storageUri"] == "s3://bucket/final/"
    (container,) = form["spec"]["predictor"]["containers"]
    assert container["env"] == [{"name": "STORAGE_URI", "value": "s3://bucket/form/model-q8_0.gguf"}]


def test_services_of_a_config_with_a_long_name_have_different_names(tmp_path):
    serving.write_manifests(FINAL, records("s3://bucket/form"), load_config(TINY, {"name": "a" * 63}), tmp_path)
    names = {yaml.safe_load(file.read_text())["metadata"]["name"] for file in tmp_path.iterdir()}
    assert names == {"a" * 53, "a" * 43 + "-gguf-q8-0"}


def test_what_is_on_a_disk_gets_none(tmp_path):
    final = dataclasses.replace(FINAL, uri="file:///final")
    serving.write_manifests(final, records("file:///form"), load_config(TINY), tmp_path)
    assert list(tmp_path.iterdir()) == []
