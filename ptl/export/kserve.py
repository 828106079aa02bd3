"""A manifest that serves a checkpoint or an export on Kubernetes: KServe's InferenceService."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

import yaml

from ptl.config.export import ServedFormat
from ptl.errors import InputError

# KServe itself wants a letter first; it adds `-predictor`, and a Service's name has at most 63 characters.
NAME = re.compile(r"[a-z]([a-z0-9-]{0,51}[a-z0-9])?")
LOCATION = re.compile(r"s3://[^/\s]+/\S*[^/\s]/?")
SERVICE_ACCOUNT = "ptl-serving"  # an example, as the image and the resources are
LLAMA_SERVER = {"cuda": "ghcr.io/ggml-org/llama.cpp:server-cuda", "cpu": "ghcr.io/ggml-org/llama.cpp:server"}
MOUNTED = PurePosixPath("/mnt/models")  # where KServe's storage initializer puts what it downloads
PORT = 8080

HEADER = """\
# KServe InferenceService: {what}.
# Written by ptl for KServe 0.21; not tried on a cluster. Apply it with kubectl in the namespace that serves the model,
# which then answers at {path} under the name {name}. Adapt before that:
# - serviceAccountName: an account that lists a Secret with the S3 keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Its
#   annotations say where S3 is: serving.kserve.io/s3-endpoint (HOST:PORT), serving.kserve.io/s3-region and, for http,
#   serving.kserve.io/s3-usehttps: "0". The keys need s3:ListBucket on the whole bucket. With a cloud identity the
#   account needs no Secret.
# - resources: memory for the weights and more; a GPU's own memory must also hold the cache of keys and values.
"""
IMAGE_HINT = (
    "# - image: an example; take a release of llama.cpp's server that your cluster can pull, pinned by digest.\n"
)


def inference_service(name: str, uri: str, format: ServedFormat, gpus: int = 1) -> str:
    """The YAML of an InferenceService for a checkpoint on S3; a comment on top says what to adapt.

    `uri` is the folder, for gguf the file. KServe's Hugging Face runtime (vLLM) serves folders, llama-server a GGUF
    file. Raises InputError for a name that KServe refuses, and for a location from which it cannot download.
    """
    _check_name(name)
    _check_location(uri, format)
    predictor: dict[str, Any] = {"serviceAccountName": SERVICE_ACCOUNT}
    if format == "gguf":
        comment = HEADER.format(what="a GGUF file by llama-server", path="/v1/chat/completions", name=name) + IMAGE_HINT
        predictor["containers"] = [_llama_server(name, uri, gpus)]
    else:
        what = f"a checkpoint ({format}) by vLLM in KServe's Hugging Face runtime"
        comment = HEADER.format(what=what, path="/openai/v1/chat/completions", name=name)
        predictor["model"] = _hugging_face(uri, gpus)
    manifest = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {"predictor": predictor},
    }
    return comment + yaml.safe_dump(manifest, sort_keys=False, width=1000)


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot be the name of an InferenceService",
            field="name",
            remedy="give up to 53 lower-case letters, digits and dashes, a letter first and no dash last",
        )


def _check_location(uri: str, format: ServedFormat) -> None:
    if not LOCATION.fullmatch(uri):
        raise InputError(
            f"{uri!r} is not a location s3://BUCKET/PATH, from which a cluster can download",
            field="uri",
            remedy="copy the files to S3 first (aws s3 cp --recursive) and give their location there",
        )
    if format == "gguf" and not uri.endswith(".gguf"):
        raise InputError(
            f"{uri!r} is not a GGUF file",
            field="uri",
            remedy="give the location of the file itself, which ends in .gguf",
        )


def _hugging_face(uri: str, gpus: int) -> dict[str, Any]:
    """The model of a predictor whose runtime KServe finds by the format; the name is the runtime's own argument."""
    args = ["--backend=vllm"]
    if gpus > 1:
        args.append(f"--tensor-parallel-size={gpus}")
    return {
        "modelFormat": {"name": "huggingface"},
        # The storage initializer downloads all keys with this prefix: without the slash also those of a neighbour.
        "storageUri": uri.rstrip("/") + "/",
        "args": args,
        "resources": _resources(gpus),
    }


def _llama_server(name: str, uri: str, gpus: int) -> dict[str, Any]:
    """The container of a predictor; KServe downloads what STORAGE_URI names, for a container of this name only."""
    file = MOUNTED / PurePosixPath(uri).name
    return {
        "name": "kserve-container",
        "image": LLAMA_SERVER["cuda" if gpus else "cpu"],
        "args": ["--model", str(file), "--alias", name, "--host", "0.0.0.0", "--port", str(PORT)],
        "env": [{"name": "STORAGE_URI", "value": uri}],
        "ports": [{"containerPort": PORT, "protocol": "TCP"}],
        # 503 until the model is loaded.
        "readinessProbe": {"httpGet": {"path": "/health", "port": PORT}},
        "resources": _resources(gpus),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def _resources(gpus: int) -> dict[str, dict[str, str]]:
    """Requests and limits, which are equal: KServe's own default is 2 GiB, too little for most models."""
    amounts = {"cpu": "4", "memory": "16Gi"}
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    return {"requests": amounts, "limits": dict(amounts)}
