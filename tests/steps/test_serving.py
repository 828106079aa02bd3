"""Manifests of what a run has made, and the alias of its final version."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from run_records import export, scores

from ptl.config.run import load_config
from ptl.steps import report
from ptl.steps.call import Call
from ptl.storage.store import Pointer, Record

TINY = Path(__file__).parents[2] / "pipelines/prune_tune_loop/configs/tiny.yaml"
FINAL = Pointer("s3://bucket/final", "sha256:" + "f" * 64, params=5, original_params=9, step="recover-4")


def records(uri):
    scored = {"stage": "evaluate", "checkpoint": dataclasses.asdict(FINAL), "scores": scores(5, 0.9, 1)}
    form = dataclasses.replace(FINAL, uri=uri, step="export-gguf-q8-0")
    return {
        "evaluate-4": Record("k", FINAL, scored),
        "export-gguf-q8-0": Record("k", form, export(5, 3, 0.9)),
    }


def test_each_model_on_s3_gets_a_manifest(tmp_path):
    config = load_config(TINY, {"name": "3b-reasoner"})
    report.write_manifests(FINAL, records("s3://bucket/form"), config, tmp_path)
    final, form = (
        yaml.safe_load((tmp_path / f"inference-service{suffix}.yaml").read_text()) for suffix in ("", "-gguf-q8_0")
    )
    assert final["metadata"]["name"] == "model-3b-reasoner"
    assert final["spec"]["predictor"]["model"]["storageUri"] == "s3://bucket/final/"
    (container,) = form["spec"]["predictor"]["containers"]
    assert container["env"] == [{"name": "STORAGE_URI", "value": "s3://bucket/form/model-q8_0.gguf"}]


def test_services_of_a_config_with_a_long_name_have_different_names(tmp_path):
    report.write_manifests(FINAL, records("s3://bucket/form"), load_config(TINY, {"name": "a" * 63}), tmp_path)
    names = {yaml.safe_load(file.read_text())["metadata"]["name"] for file in tmp_path.iterdir()}
    assert names == {"a" * 53, "a" * 43 + "-gguf-q8-0"}


def test_what_is_on_a_disk_gets_none(tmp_path):
    final = dataclasses.replace(FINAL, uri="file:///final")
    report.write_manifests(final, records("file:///form"), load_config(TINY), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("version", "verdict", "alias"),
    [("3", "not inferior", "not-inferior"), ("3", "inferior", "inferior"), ("3", None, None), ("", "unclear", None)],
)
def test_the_final_version_has_the_alias_of_its_verdict(version, verdict, alias, monkeypatch, capsys):
    """None of another name: those are the user's."""
    given = []
    monkeypatch.setattr(report.mlflow_objects, "register", lambda *_: version)
    monkeypatch.setattr(report.mlflow_objects, "set_alias", lambda *arguments: given.append(arguments))
    step = SimpleNamespace(run=SimpleNamespace(step="report"), call=Call("report", "e", {"registered_model": "m"}))
    final = dataclasses.replace(FINAL, model_version=version)
    result = SimpleNamespace(pair=lambda _: SimpleNamespace(verdict=verdict) if verdict else None)
    report._set_alias(step, records("s3://bucket/form"), final, result)
    assert given == ([("m", alias, "3")] if alias else [])
    assert (f"version 3 of m has the alias {alias}" in capsys.readouterr().out) == bool(alias)
