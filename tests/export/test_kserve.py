"""Manifests for KServe: what the cluster would accept, and what a person must be told before it does."""

import kubernetes_validate
import yaml

from ptl.export.formats import inference_service

FOLDER = "s3://models/runs/ab12/artifacts"
FILE = f"{FOLDER}/model.gguf"
# What a pod's container has, and KServe's `model` too: checked by the schema of Kubernetes itself.
OF_A_CONTAINER = ("image", "args", "env", "ports", "readinessProbe", "resources", "securityContext")
OF_A_MODEL = {"modelFormat", "storageUri", *OF_A_CONTAINER}  # of KServe's ModelSpec, what we use


def predictor(format, uri, gpus):
    """The predictor of a manifest that the cluster would accept."""
    manifest = yaml.safe_load(inference_service("small-qwen", uri, format, gpus))
    assert (manifest["apiVersion"], manifest["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert (manifest["metadata"], [*manifest["spec"]]) == ({"name": "small-qwen"}, ["predictor"])
    predictor = manifest["spec"]["predictor"]
    model = predictor.get("model", {})
    assert {*predictor} <= {"serviceAccountName", "containers", "model"} and {*model} <= OF_A_MODEL
    of_the_model = {field: model[field] for field in OF_A_CONTAINER if field in model}
    containers = predictor.get("containers") or [{"name": "kserve-container", "image": "the-runtimes", **of_the_model}]
    spec = {"serviceAccountName": predictor["serviceAccountName"], "containers": containers}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": spec}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    return predictor


def test_a_folder_is_served_by_the_hugging_face_runtime_with_vllm():
    for gpus, more in ((0, []), (1, []), (4, ["--tensor-parallel-size=4"])):
        for format, uri in (("transformers", FOLDER), ("compressed-tensors", FOLDER + "/")):
            model = predictor(format, uri, gpus)["model"]
            assert model["modelFormat"] == {"name": "huggingface"}
            assert model["args"] == ["--backend=vllm", *more]
            assert model["resources"]["limits"].get("nvidia.com/gpu") == (str(gpus) if gpus else None)
            assert model["storageUri"] == FOLDER + "/"  # no neighbour with its prefix is downloaded


def test_a_gguf_file_is_downloaded_and_opened_where_kserve_puts_it():
    for gpus, tag in ((0, "server"), (1, "server-cuda")):
        (container,) = predictor("gguf", FILE, gpus)["containers"]
        assert container["name"] == "kserve-container"  # the only one for which KServe reads STORAGE_URI
        assert container["env"] == [{"name": "STORAGE_URI", "value": FILE}]
        assert container["args"][:4] == ["--model", "/mnt/models/model.gguf", "--alias", "small-qwen"]
        assert container["image"].endswith(f":{tag}")  # CUDA only with a GPU
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == bool(gpus)
