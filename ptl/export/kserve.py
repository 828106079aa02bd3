"""A manifest that serves a checkpoint or an export on Kubernetes: KServe's InferenceService."""

from __future__ import annotations

import re
from pathlib import Path

from ptl.config.export import ServedFormat
from ptl.errors import InputError

# KServe itself wants a letter first; it adds `-predictor`, and a Service's name has at most 63 characters.
NAME = re.compile(r"[a-z]([a-z0-9-]{0,51}[a-z0-9])?")
LOCATION = re.compile(r"s3://[^/\s]+/\S*[^/\s]/?")
TEMPLATE = Path(__file__).with_name("templates") / "inference_service.yaml"


def inference_service(name: str, uri: str, format: ServedFormat, gpus: int = 1) -> str:
    """The YAML of an InferenceService for a checkpoint on S3; a comment on top says what to adapt.

    `uri` is the folder, for gguf the file. KServe's Hugging Face runtime (vLLM) serves folders, llama-server a GGUF
    file. Raises InputError for a name that KServe refuses, and for a location from which it cannot download.
    """
    from jinja2 import Environment

    _check(name, uri, format)
    what, path = f"a checkpoint ({format}) by vLLM in KServe's Hugging Face runtime", "/openai/v1/chat/completions"
    if format == "gguf":
        what, path = "a GGUF file by llama-server", "/v1/chat/completions"
    template = Environment(trim_blocks=True, keep_trailing_newline=True).from_string(TEMPLATE.read_text())
    file = uri.rpartition("/")[2]
    return template.render(name=name, uri=uri, format=format, gpus=gpus, what=what, path=path, file=file)


def _check(name: str, uri: str, format: ServedFormat) -> None:
    if not NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot be the name of an InferenceService",
            field="name",
            remedy="give up to 53 lower-case letters, digits and dashes, a letter first and no dash last",
        )
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
