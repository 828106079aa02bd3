"""Manifests for KServe: what the cluster would accept, and what a person must be told before it does."""

import jsonschema
import kubernetes_validate
import pytest
import yaml

from ptl.export.formats import inference_service

FOLDER = "s3://models/runs/ab12/artifacts"
FILE = f"{FOLDER}/model.gguf"
LOCATIONS = {"transformers": FOLDER, "compressed-tensors": FOLDER, "gguf": FILE}
# What a pod's container has, and KServe's `model` too: checked by the schema of Kubernetes itself.
OF_A_CONTAINER = ("image", "args", "env", "ports", "readinessProbe", "resources", "securityContext")
# Written by hand from the types of the PyPI package kserve 0.21 (its models V1beta1InferenceService, -PredictorSpec,
# -ModelSpec and -ModelFormat), with the fields that we use: that package cannot be installed beside ours.
HAND_WRITTEN = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "serving.kserve.io/v1beta1"},
        "kind": {"const": "InferenceService"},
        "metadata": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}},
        },
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["predictor"],
            "properties": {
                "predictor": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "serviceAccountName": {"type": "string"},
                        "containers": {"type": "array", "minItems": 1, "items": {"type": "object"}},
                        "model": {
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["modelFormat"],
                            "properties": {
                                "modelFormat": {
                                    "type": "object",
                                    "additionalProperties": False,
                                    "properties": {"name": {"type": "string"}, "version": {"type": "string"}},
                                },
                                "storageUri": {"type": "string"},
                                **{field: {} for field in OF_A_CONTAINER},
                            },
                        },
                    },
                }
            },
        },
    },
}


def check(manifest):
    """Raise what the cluster would answer."""
    jsonschema.validate(manifest, HAND_WRITTEN)
    predictor = manifest["spec"]["predictor"]
    model = predictor.get("model", {})
    of_the_model = {field: model[field] for field in OF_A_CONTAINER if field in model}
    containers = predictor.get("containers") or [{"name": "kserve-container", "image": "the-runtimes", **of_the_model}]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "predictor"},
        "spec": {"serviceAccountName": predictor["serviceAccountName"], "containers": containers},
    }
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def predictor(*arguments):
    manifest = yaml.safe_load(inference_service(*arguments))
    check(manifest)
    return manifest["spec"]["predictor"]


@pytest.mark.parametrize("gpus", [0, 1, 4])
@pytest.mark.parametrize(("format", "uri"), LOCATIONS.items(), ids=LOCATIONS)
def test_a_manifest_has_only_fields_that_kserve_and_kubernetes_know(format, uri, gpus):
    manifest = yaml.safe_load(inference_service("small-qwen", uri, format, gpus))
    check(manifest)
    assert manifest["metadata"]["name"] == "small-qwen"


@pytest.mark.parametrize("path", ["spec", "spec.predictor", "spec.predictor.model"])
def test_an_unknown_field_is_found_by_these_checks(path):
    manifest = yaml.safe_load(inference_service("small-qwen", FOLDER, "transformers"))
    section = manifest
    for name in path.split("."):
        section = section[name]
    section["minReplica"] = 1
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


def test_a_wrong_field_of_the_container_is_found_by_these_checks():
    manifest = yaml.safe_load(inference_service("small-qwen", FILE, "gguf"))
    manifest["spec"]["predictor"]["containers"][0]["arg"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        check(manifest)


@pytest.mark.parametrize("format", ["transformers", "compressed-tensors"])
def test_a_folder_is_served_by_the_hugging_face_runtime_with_vllm(format):
    model = predictor("small-qwen", FOLDER, format)["model"]
    assert model["modelFormat"] == {"name": "huggingface"}
    assert model["args"] == ["--backend=vllm"]


def test_several_gpus_divide_the_model():
    model = predictor("small-qwen", FOLDER, "transformers", 4)["model"]
    assert "--tensor-parallel-size=4" in model["args"]
    assert model["resources"]["limits"]["nvidia.com/gpu"] == "4"


@pytest.mark.parametrize("uri", [FOLDER, FOLDER + "/"], ids=["without", "with"])
def test_a_folder_ends_with_a_slash_so_that_no_neighbour_with_its_prefix_is_downloaded(uri):
    assert predictor("small-qwen", uri, "transformers")["model"]["storageUri"] == FOLDER + "/"


def test_a_gguf_file_is_downloaded_and_opened_where_kserve_puts_it():
    (container,) = predictor("small-qwen", FILE, "gguf")["containers"]
    assert container["name"] == "kserve-container"  # the only one for which KServe reads STORAGE_URI
    assert container["env"] == [{"name": "STORAGE_URI", "value": FILE}]
    assert container["args"][:4] == ["--model", "/mnt/models/model.gguf", "--alias", "small-qwen"]


@pytest.mark.parametrize(("gpus", "tag"), [(0, "server"), (1, "server-cuda")])
def test_llama_server_has_cuda_only_with_a_gpu(gpus, tag):
    (container,) = predictor("small-qwen", FILE, "gguf", gpus)["containers"]
    assert container["image"].endswith(f":{tag}")
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == bool(gpus)


@pytest.mark.parametrize(("format", "uri"), LOCATIONS.items(), ids=LOCATIONS)
def test_the_comment_on_top_says_what_to_adapt(format, uri):
    comment, _, _ = inference_service("small-qwen", uri, format).partition("apiVersion")
    assert all(line.startswith("#") and len(line) <= 120 for line in comment.splitlines())
    adapted = ["serviceAccountName", "serving.kserve.io/s3-endpoint", "resources"]
    assert all(word in comment for word in adapted) and ("- image:" in comment) == (format == "gguf")


def test_the_longest_name_leaves_room_for_the_predictors_service():
    assert len("a" * 53 + "-predictor") == 63 and predictor("a" * 53, FOLDER, "transformers")
