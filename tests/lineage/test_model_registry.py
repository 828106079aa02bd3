"""Registration in Kubeflow's Model Registry, against a mock of its REST API: once, complete, and never an error."""

import importlib.util
import time

import mock_model_registry
import pytest
from conftest import free_port

from ptl import extras
from ptl.config.cluster import Storage
from ptl.lineage import model_registry
from ptl.storage.store import Pointer

needs_client = pytest.mark.skipif(
    importlib.util.find_spec("model_registry") is None,
    reason="NOT CHECKED: the package model-registry is not installed here; `pip install '.[model-registry]'`",
)
POINTER = Pointer("s3://models/runs/ab12/artifacts", "sha256:" + "0" * 64, params=1_234_567, step="recover-3")
NAME = "run-1-recover-3"
TAGS = {"accuracy": 0.71, "items": 200, "task": "word_problems", "gate": None, "bits": [4, 8]}


@pytest.fixture
def server():
    with mock_model_registry.running() as (registry, address):
        yield registry, address


def register(address, format="transformers", pointer=POINTER, tags=TAGS):
    return model_registry.register(address, "small-qwen", "run-1", pointer, format, tags)


@needs_client
def test_a_checkpoint_becomes_a_version_with_its_location_and_what_is_known_of_it(server):
    registry, address = server
    assert register(address) == f"version {NAME} of small-qwen in the Model Registry {address}"
    assert registry.only("registered_models")["name"] == "small-qwen"
    version = registry.only("model_versions")
    assert (version["name"], version["author"]) == (NAME, "ptl")
    properties = {key: {**value} for key, value in version["customProperties"].items()}
    assert {key: value.pop("metadataType") for key, value in properties.items()} == {
        "accuracy": "MetadataDoubleValue",
        "items": "MetadataIntValue",
        "task": "MetadataStringValue",
        "bits": "MetadataStringValue",
        "run": "MetadataStringValue",
        "step": "MetadataStringValue",
        "format": "MetadataStringValue",
        "params": "MetadataIntValue",
        "digest": "MetadataStringValue",
    }
    assert {key: next(iter(value.values())) for key, value in properties.items()} == {
        "accuracy": 0.71,
        "items": "200",
        "task": "word_problems",
        "bits": "[4, 8]",
        "run": "run-1",
        "step": "recover-3",
        "format": "transformers",
        "params": "1234567",
        "digest": POINTER.digest,
    }
    artifact = registry.only("artifacts")
    assert (artifact["artifactType"], artifact["uri"]) == ("model-artifact", POINTER.uri)
    assert (artifact["modelFormatName"], artifact["modelFormatVersion"]) == ("huggingface", "1")


@needs_client
def test_a_repeated_registration_changes_nothing(server):
    registry, address = server
    first = register(address)
    assert register(address, tags={"accuracy": 0.5}) == first
    assert registry.created == ["registered_models", "model_versions", "artifacts"]
    assert registry.only("model_versions")["customProperties"]["accuracy"]["double_value"] == 0.71


@needs_client
def test_an_export_is_a_version_of_the_same_model(server):
    registry, address = server
    register(address)
    export = Pointer("s3://models/gguf/ab12", "sha256:" + "1" * 64, step="export-gguf-q4_k_m")
    register(address, "gguf", export)
    names = [name for _, name in registry.entities["model_versions"]]
    assert names == [NAME, "run-1-export-gguf-q4_k_m"] and len(registry.entities["registered_models"]) == 1
    formats = [artifact["modelFormatName"] for artifact in registry.entities["artifacts"].values()]
    assert formats == ["huggingface", "gguf"]


@needs_client
@pytest.mark.parametrize("kind", ["model_versions", "artifacts"])
def test_what_an_interrupted_registration_left_out_is_added_by_the_next_one(server, kind):
    registry, address = server
    registry.failures[kind] = (500, {"code": "500", "message": "database is locked"})
    assert register(address).endswith('500 Internal Server Error: {"code": "500", "message": "database is locked"}')
    assert register(address).startswith("version ")
    assert registry.created == ["registered_models", "model_versions", "artifacts"]


@needs_client
def test_two_steps_that_register_at_the_same_moment_both_succeed(server):
    registry, address = server
    registry.beside = lambda: registry.create("registered_models", "", {"name": "small-qwen", "state": "LIVE"})
    assert register(address).startswith("version ")
    assert registry.created == ["registered_models", "model_versions", "artifacts"]


@needs_client
def test_a_registry_that_is_not_there_is_a_warning():
    address = f"http://127.0.0.1:{free_port()}"
    warning = register(address)
    assert warning.startswith(f"warning: not in the Model Registry {address}: small-qwen {NAME}: ")
    assert "Cannot connect to host" in warning and "\n" not in warning


@needs_client
def test_a_registry_that_does_not_answer_is_a_warning_within_the_time_limit(server, monkeypatch):
    registry, address = server
    registry.delay = 1.0
    monkeypatch.setattr(model_registry, "PATIENCE", 0.2)
    before = time.monotonic()
    assert register(address).endswith("it did not answer within 0.2 seconds")
    assert time.monotonic() - before < 0.9


@needs_client
def test_a_registry_of_another_release_is_a_warning(server, monkeypatch):
    _, address = server
    monkeypatch.setattr(mock_model_registry, "API", "/api/model_registry/v9")
    assert "404 Not Found" in register(address)


@needs_client
def test_a_token_is_not_sent_in_the_clear(server, tmp_path, monkeypatch):
    registry, address = server
    (tmp_path / "token").write_text("secret")
    monkeypatch.setenv(model_registry.TOKEN_PATH, str(tmp_path / "token"))
    register(address)
    assert set(registry.authorizations) == {None}


@needs_client
def test_over_https_the_token_is_sent(tmp_path, monkeypatch):
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setenv(model_registry.TOKEN_PATH, str(tmp_path / "token"))
    settings = model_registry._client("https://registry.example.com").config
    assert (settings.host, settings.access_token) == ("https://registry.example.com:443", "secret")
    assert settings.verify_ssl


@needs_client
def test_https_without_a_token_is_a_warning_that_says_where_to_name_one(tmp_path, monkeypatch):
    monkeypatch.setenv(model_registry.TOKEN_PATH, str(tmp_path / "none"))
    warning = register("https://registry.example.com")
    assert warning.endswith(
        f"no token in {tmp_path}/none, which https needs; name its file in {model_registry.TOKEN_PATH}"
    )


def test_without_the_client_it_is_a_warning_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(extras.MODULES, "model-registry", ("no_such_module",))
    assert register("http://registry").endswith(
        "no_such_module is not installed; pip install 'prune-tune-loop[model-registry]'"
    )


@pytest.mark.parametrize(
    "address",
    ["http://model-registry-service.kubeflow.svc.cluster.local:8080", "https://registry.example.com"],
    ids=["http", "https"],
)
def test_a_config_takes_an_address(address):
    assert Storage(model_registry=address).model_registry == address


@pytest.mark.parametrize(
    "address",
    ["registry:8080", "http://registry/api", "ftp://registry", "http://"],
    ids=["no-scheme", "path", "ftp", "no-host"],
)
def test_a_config_refuses_what_is_no_address(address):
    with pytest.raises(ValueError, match="must be http"):
        Storage(model_registry=address)
