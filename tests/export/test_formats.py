"""What is said of a checkpoint before it is pruned; manifests for KServe, and what the cluster would accept."""

import json
import re
import shutil
from dataclasses import replace

import kubernetes_validate
import pytest
import yaml
from checkout import DENSE
from gguf_files import needs_llama_cpp
from tiny_models import build, build_multimodal, save

from ptl.config.export import Export
from ptl.errors import InputError
from ptl.export import gguf
from ptl.export.compressed_tensors import write as write_compressed
from ptl.export.formats import (
    check_exports,
    check_vllm,
    context_notes,
    inference_service,
    layer_warnings,
    width_warnings,
)
from ptl.export.gguf import write_gguf
from ptl.model.dimensions import ModelDimensions

GGUF, FP8 = Export(format="gguf", type="q8_0"), Export(format="compressed-tensors", type="fp8")


def test_layers_that_a_runtime_would_mistake_for_others_are_warned_of(tmp_path):
    for variant, target, exports, warned in [
        ("cohere2", "layers", [FP8], ""),
        (
            "cohere2",
            "layers",
            [GGUF],
            "llama.cpp may know the attention of a layer of cohere2 by its number",
        ),
        ("llama", "layers", [GGUF], ""),
    ]:
        warnings = layer_warnings(
            save(build(variant), tmp_path / variant, tokenizer=False), exports, target
        )
        assert len(warnings) == bool(warned)
        assert all(
            f"prune.target={target} may remove layers, and {warned}" in warning
            for warning in warnings
        )


def test_what_vllm_would_fail_with_is_warned_of_and_an_error_where_it_evaluates(tmp_path):
    for variant, target, problem, other in [
        ("gpt_oss", "layers", "vLLM gives every other layer of gpt_oss a window", "experts"),
        ("gpt_oss", "experts", "", ""),
        ("qwen2", "width", "vLLM ignores head_dim in the config of qwen2", "neurons"),
        ("qwen2", "neurons", "", ""),
        ("llama", "width", "", ""),
    ]:
        folder = save(build(variant), tmp_path / variant, tokenizer=False)
        warnings = check_vllm(folder, target, "hf")
        if not problem:
            assert warnings == check_vllm(folder, target, "vllm") == []
            continue
        assert re.search(
            rf"{problem}.*: set prune\.target={other}, or serve with transformers$", *warnings
        )
        with pytest.raises(
            InputError, match=rf"evaluate\.backend: .*{problem}.* set prune\.target={other}, or "
        ):
            check_vllm(folder, target, "vllm")


def test_a_hidden_size_whose_rows_would_be_stored_in_a_larger_type_is_warned_of(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 1024}))
    for type, hidden, heads, warned in (
        (
            "q4_k_m",
            840,
            8,
            "a multiple of 256: with a hidden size of 840 .* Set prune.width_multiple: 256, ",
        ),
        # no smaller multiple of both 256 and 7
        ("q4_k_m", 840, 7, "Set prune.width.hidden: 1024, "),
        ("q8_0", 840, 7, "a multiple of 32: .* Set prune.width_multiple: 32, "),
        *(("q4_k_m", 768, 8, ""), ("q4_k_m", 1024, 8, ""), ("f16", 840, 8, "")),
    ):
        warnings = width_warnings(tmp_path, [Export(format="gguf", type=type)], 256, hidden, heads)
        assert len(warnings) == bool(warned) and all(
            re.search(warned, warning) for warning in warnings
        ), (type, hidden)


def test_a_small_model_is_checked_with_the_hidden_size_that_pruning_may_leave(
    tmp_path, monkeypatch
):
    """The heads of the tests' models have 8 numbers; two share a KV head."""
    asked = []
    monkeypatch.setattr(gguf, "check", lambda src, type, narrow: asked.append(narrow) or [])
    heads = ModelDimensions(
        16, 1, kv_heads=1, layers=1, layer={}, outside={}, heads_per_kv_head=2, head_size=8
    )
    ends = [heads, replace(heads, hidden=24)]
    for possible, narrow in (([], False), (ends[:1], False), (ends, True)):
        check_exports(tmp_path, [GGUF], possible)
        assert asked.pop() is narrow


@needs_llama_cpp
def test_of_a_multimodal_model_the_text_model_counts(tmp_path, monkeypatch, converter_in_process):
    """Its import takes that out; the files as they are cannot be written."""
    folder = save(build_multimodal("gemma3", "gemma3_text"), tmp_path / "model", tokenizer=False)
    for file in DENSE.glob("tokenizer*"):
        shutil.copy(file, folder)
    check_exports(folder, [FP8])
    config = json.loads((folder / "config.json").read_text())
    # the random model has fewer tokens than any tokenizer
    config["text_config"]["vocab_size"] = 256
    (folder / "config.json").write_text(json.dumps(config))
    # by other layer_types
    with pytest.raises(InputError, match=r"model_type gemma3_text\): the logits differ"):
        check_exports(folder, [GGUF])
    monkeypatch.setattr(gguf, "check_config", lambda _: None)
    check_exports(folder, [GGUF])
    for write in (write_gguf, write_compressed):
        with pytest.raises(InputError, match="run `ptl import-model`, which saves its text model"):
            write(folder, tmp_path / "out", "fp8" if write is write_compressed else "q8_0")


def test_longrope_names_the_context_to_serve_with(tmp_path):
    longrope = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    config = {
        "model_type": "phi3",
        "rope_scaling": longrope,
        "original_max_position_embeddings": 4096,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (note,) = context_notes(tmp_path)
    assert "--ctx-size 4096" in note and "--max-model-len 4096" in note


# ---- KServe


FOLDER = "s3://models/runs/ab12/artifacts"
FILE = f"{FOLDER}/model.gguf"
# What a pod's container has, and KServe's `model` too: checked by the schema of Kubernetes itself.
OF_A_CONTAINER = ("image", "args", "env", "ports", "readinessProbe", "resources", "securityContext")
OF_A_MODEL = {"modelFormat", "storageUri", *OF_A_CONTAINER}  # of KServe's ModelSpec, what we use


def predictor(format, uri, gpus):
    """The predictor of a manifest that the cluster would accept."""
    manifest = yaml.safe_load(inference_service("small-qwen", uri, format, gpus))
    assert (manifest["apiVersion"], manifest["kind"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
    )
    assert (manifest["metadata"], [*manifest["spec"]]) == ({"name": "small-qwen"}, ["predictor"])
    predictor = manifest["spec"]["predictor"]
    model = predictor.get("model", {})
    assert {*predictor} <= {"serviceAccountName", "containers", "model"} and {*model} <= OF_A_MODEL
    of_the_model = {field: model[field] for field in OF_A_CONTAINER if field in model}
    containers = predictor.get("containers") or [
        {"name": "kserve-container", "image": "the-runtimes", **of_the_model}
    ]
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
            assert model["resources"]["limits"].get("nvidia.com/gpu") == (
                str(gpus) if gpus else None
            )
            assert model["storageUri"] == FOLDER + "/"  # no neighbour with its prefix is downloaded


def test_a_gguf_file_is_downloaded_and_opened_where_kserve_puts_it():
    for gpus, tag in ((0, "server"), (1, "server-cuda")):
        (container,) = predictor("gguf", FILE, gpus)["containers"]
        # the only one for which KServe reads STORAGE_URI
        assert container["name"] == "kserve-container"
        assert container["env"] == [{"name": "STORAGE_URI", "value": FILE}]
        assert container["args"][:4] == [
            "--model",
            "/mnt/models/model.gguf",
            "--alias",
            "small-qwen",
        ]
        assert container["image"].endswith(f":{tag}")  # CUDA only with a GPU
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == bool(gpus)
