"""A checkpoint's folder as an MLflow model; that MLflow loads one is in tests/pipelines/test_loop.py."""

import shutil
from pathlib import Path

import yaml

from ptl.model import checkpoint
from ptl.storage.manifest import digest_of, scan
from ptl.storage.store import publish

REASONER = Path(__file__).parents[2] / "examples/tiny_reasoner/checkpoint"


def test_the_weights_stay_where_they_are_and_equal_checkpoints_equal(tmp_path):
    digests = set()
    for name in ("one", "two"):
        folder = tmp_path / name
        shutil.copytree(REASONER, folder)
        checkpoint.write_mlflow_model(folder)
        # As a step does that takes over the files of an earlier run, and after MLflow has loaded a version.
        (folder / "registered_model_meta").write_text(f"model_name: {name}\n")
        checkpoint.write_mlflow_model(folder)
        digests.add(digest_of(publish(folder, f"{tmp_path}/published/{name}")))
    assert len(digests) == 1
    flavor = yaml.safe_load((folder / "MLmodel").read_text())["flavors"]["transformers"]
    assert flavor["model_binary"] == "." and flavor["components"] == ["tokenizer"]
    tokenizer = "components/tokenizer"
    added = {"MLmodel", *(f"{tokenizer}/{path.name}" for path in REASONER.iterdir() if path.suffix == ".json")}
    assert set(scan(folder)) == set(scan(REASONER)) | added


def test_the_next_checkpoint_does_not_inherit_them(tmp_path):
    folder = tmp_path / "parent"
    shutil.copytree(REASONER, folder)
    checkpoint.write_mlflow_model(folder)
    (folder / "registered_model_meta").write_text("model_name: tiny\n")
    (tmp_path / "child").mkdir()
    checkpoint.copy_companions(folder, tmp_path / "child")
    assert not {"MLmodel", "registered_model_meta", "components"} & {path.name for path in tmp_path.glob("child/*")}
