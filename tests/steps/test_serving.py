"""Manifests of what a run has made, and the alias of its final version."""

import dataclasses
from types import SimpleNamespace

import yaml
from checkout import TINY
from run_records import export, scores

from ptl.config.run import load_config
from ptl.steps import report
from ptl.steps.call import Call
from ptl.storage.store import Pointer, Record

FINAL = Pointer(
    "s3://bucket/final", "sha256:" + "f" * 64, params=5, original_params=9, step="recover-4"
)


def records(uri):
    scored = {
        "stage": "evaluate",
        "checkpoint": dataclasses.asdict(FINAL),
        "scores": scores(5, 0.9, 1),
    }
    form = dataclasses.replace(FINAL, uri=uri, step="export-gguf-q8-0")
    return {
        "evaluate-4": Record("k", FINAL, scored),
        "export-gguf-q8-0": Record("k", form, export(5, 3, 0.9)),
    }


def written(final, form, folder, **overrides):
    report.write_manifests(final, records(form), load_config(TINY, overrides), folder)
    return {path.name: yaml.safe_load(path.read_text()) for path in folder.iterdir()}


def test_each_model_on_s3_gets_a_manifest(tmp_path):
    assert written(dataclasses.replace(FINAL, uri="file:///final"), "file:///form", tmp_path) == {}
    manifests = written(FINAL, "s3://bucket/form", tmp_path, name="3b-reasoner")
    final, form = (manifests[f"inference-service{suffix}.yaml"] for suffix in ("", "-gguf-q8_0"))
    assert final["metadata"]["name"] == "model-3b-reasoner"
    assert final["spec"]["predictor"]["model"]["storageUri"] == "s3://bucket/final/"
    (container,) = form["spec"]["predictor"]["containers"]
    assert container["env"] == [
        {"name": "STORAGE_URI", "value": "s3://bucket/form/model-q8_0.gguf"}
    ]
    # Services of a config with a long name have different ones.
    long = written(FINAL, "s3://bucket/form", tmp_path, name="a" * 63)
    assert {each["metadata"]["name"] for each in long.values()} == {
        "a" * 53,
        "a" * 43 + "-gguf-q8-0",
    }


def test_the_final_version_has_the_alias_of_its_verdict(monkeypatch):
    """None of another name: those are the user's."""
    given = []
    monkeypatch.setattr(
        report.mlflow_objects, "set_alias", lambda *arguments: given.append(arguments)
    )
    step = SimpleNamespace(
        run=SimpleNamespace(step="report"), call=Call("report", "e", {"registered_model": "m"})
    )
    for version, verdict in [
        ("3", "not inferior"),
        ("4", "inferior"),
        ("5", None),
        ("", "unclear"),
    ]:
        monkeypatch.setattr(report.mlflow_objects, "register", lambda *_, version=version: version)
        final = dataclasses.replace(FINAL, model_version=version)
        result = SimpleNamespace(
            pair=lambda _, verdict=verdict: verdict and SimpleNamespace(verdict=verdict)
        )
        report._set_alias(step, records("s3://bucket/form"), final, result)
    assert given == [("m", "not-inferior", "3"), ("m", "inferior", "4")]
