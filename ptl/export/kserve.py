"""A manifest that serves a checkpoint or an export on Kubernetes: KServe's InferenceService."""

from __future__ import annotations

from pathlib import Path

from ptl.config.export import ServedFormat

TEMPLATE = Path(__file__).with_name("templates") / "inference_service.yaml"


def inference_service(name: str, uri: str, format: ServedFormat, gpus: int = 1) -> str:
    """The YAML of an InferenceService for a checkpoint on S3; a comment on top says what to adapt.

    `uri` is the folder, for gguf the file. KServe's Hugging Face runtime (vLLM) serves folders, llama-server a GGUF
    file. KServe wants a letter first in the name, and adds `-predictor`: it may have 53 characters.
    """
    from jinja2 import Environment

    what, path = f"a checkpoint ({format}) by vLLM in KServe's Hugging Face runtime", "/openai/v1/chat/completions"
    if format == "gguf":
        what, path = "a GGUF file by llama-server", "/v1/chat/completions"
    template = Environment(trim_blocks=True, keep_trailing_newline=True).from_string(TEMPLATE.read_text())
    file = uri.rpartition("/")[2]
    return template.render(name=name, uri=uri, format=format, gpus=gpus, what=what, path=path, file=file)
