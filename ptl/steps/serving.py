"""How the final checkpoint and its exports are served: manifests for KServe, versions in Kubeflow's Model Registry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ptl.config.export import ServedFormat
from ptl.config.run import Config
from ptl.export import kserve
from ptl.export.formats import gguf_name
from ptl.steps.versions import Records, score_tags
from ptl.storage.store import Pointer

SERVICE_NAME = 53  # characters that KServe leaves


class Served(NamedTuple):
    """A checkpoint that can be served."""

    name: str  # of the export; empty: the final checkpoint itself
    format: ServedFormat
    pointer: Pointer
    uri: str  # of what the server loads
    tags: dict[str, Any]  # its score


def served(final: Pointer, records: Records) -> Iterator[Served]:
    """The final checkpoint, if the loop has scored it, and its exports."""
    for record in records.values():
        metadata = record["metadata"]
        if metadata["stage"] == "evaluate" and metadata["checkpoint"]["digest"] == final.digest:
            yield Served("", "transformers", final, final.uri, score_tags(metadata["scores"], final))
            break
    for record in records.values():
        metadata = record["metadata"]
        if metadata["stage"] == "export":
            form = metadata["export"]
            pointer = Pointer(**record["pointer"])
            uri = f"{pointer.uri}/{gguf_name(form['type'])}" if form["format"] == "gguf" else pointer.uri
            tags = {"export": form["name"], **score_tags(metadata["models"]["final"], pointer)}
            yield Served(form["name"], form["format"], pointer, uri, tags)


def write_manifests(final: Pointer, records: Records, config: Config, folder: Path) -> None:
    """An InferenceService for each, where its files are on S3: a cluster cannot download from a disk."""
    for model in served(final, records):
        if not model.uri.startswith("s3://"):
            continue
        name = _service_name(config.name, model.name)
        gpus = 1 if model.format != "gguf" else int(bool(config.resources.accelerator))
        suffix = f"-{model.name}" if model.name else ""
        manifest = kserve.inference_service(name, model.uri, model.format, gpus)
        (folder / f"inference-service{suffix}.yaml").write_text(manifest)


def _service_name(config: str, export: str) -> str:
    """A name that KServe takes: letters, digits and dashes, a letter first; one of its own for each export."""
    suffix = f"-{export}".replace("_", "-") if export else ""
    if not config[0].isalpha():
        config = f"model-{config}"
    # What is too long is cut off before the export's name, by which services of one run differ.
    return config[: SERVICE_NAME - len(suffix)].rstrip("-") + suffix
