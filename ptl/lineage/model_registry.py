"""Kubeflow's Model Registry: a version for a checkpoint or an export, where a config names the registry's address."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from ptl import extras
from ptl.config.export import ServedFormat
from ptl.errors import InputError
from ptl.storage.store import Pointer

if TYPE_CHECKING:
    from model_registry.core import ModelRegistryAPIClient

T = TypeVar("T")

AUTHOR = "ptl"
PATIENCE = 60  # seconds for all requests together; the client would wait five minutes for each
QUOTED = 300  # characters of an error
PORTS = {"http": 80, "https": 443}
# KServe's names of formats, by which it chooses what serves a version of the registry.
KSERVE_FORMAT = {"transformers": "huggingface", "compressed-tensors": "huggingface", "gguf": "gguf"}
TOKEN_PATH = "KF_PIPELINES_SA_TOKEN_PATH"  # Kubeflow's variable for a token that is elsewhere than a pod's own
TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount/token"


def register(
    address: str,
    registered_model: str,
    run: str,
    pointer: Pointer,
    format: ServedFormat,
    tags: dict[str, Any],
) -> str:
    """Make a checkpoint or an export a version in the registry, unless it is one; returns a sentence for the log.

    The version is named by the pipeline run and the step that made the files. It has `tags`, size and digest as
    properties, and one artifact with location and format. MLflow knows all of this already: whatever fails here is a
    sentence that begins with `warning`, never an error.
    """
    name = f"{run}-{pointer.step}"
    properties = {
        **tags,
        "run": run,
        "step": pointer.step,
        "format": format,
        "params": pointer.params,
        "digest": pointer.digest,
    }
    try:
        absent = extras.absent(["model-registry"])
        if absent:
            raise InputError(f"{absent[0]} is not installed", remedy=extras.install("model-registry"))
        requests = _register(_client(address), registered_model, name, pointer.uri, format, properties)
        asyncio.run(asyncio.wait_for(requests, PATIENCE))
    except Exception as error:  # of aiohttp, of pydantic and of the client itself
        return f"warning: not in the Model Registry {address}: {registered_model} {name}: {_reason(error)}"
    return f"version {name} of {registered_model} in the Model Registry {address}"


def _client(address: str) -> ModelRegistryAPIClient:
    """The client's lower half: its upper one cannot complete a version that was interrupted."""
    from model_registry.core import ModelRegistryAPIClient

    scheme = urlsplit(address).scheme
    port = PORTS[scheme]
    # A token is never sent in the clear: within a cluster's mesh the registry asks for none.
    if scheme == "http":
        return ModelRegistryAPIClient.insecure_connection(address, port)
    path = Path(os.environ.get(TOKEN_PATH, TOKEN))
    if not path.is_file():
        raise InputError(f"no token in {path}, which https needs", remedy=f"name its file in {TOKEN_PATH}")
    return ModelRegistryAPIClient.secure_connection(address, port, user_token=path.read_text().strip())


async def _register(
    client: ModelRegistryAPIClient,
    registered_model: str,
    name: str,
    uri: str,
    format: ServedFormat,
    properties: dict[str, Any],
) -> None:
    """Model, version and artifact, those that are not there yet: an interrupted attempt is completed."""
    from model_registry.types import ModelArtifact, ModelVersion, RegisteredModel

    model = await _existing_or_new(
        partial(client.get_registered_model_by_params, registered_model),
        partial(client.upsert_registered_model, RegisteredModel(name=registered_model, owner=AUTHOR)),
    )
    new_version = ModelVersion(name=name, author=AUTHOR, custom_properties=_plain(properties))
    version = await _existing_or_new(
        partial(client.get_model_version_by_params, model.id, name),
        partial(client.upsert_model_version, new_version, model.id),
    )
    # Named as the client names it, whose get_model_artifact then finds it.
    artifact = ModelArtifact(
        name=registered_model,
        uri=uri,
        model_format_name=KSERVE_FORMAT[format],
        model_format_version="1",
    )
    await _existing_or_new(
        partial(client.get_model_artifact_by_params, registered_model, version.id),
        partial(client.upsert_model_version_artifact, artifact, version.id),
    )


async def _existing_or_new(
    find: Callable[[], Awaitable[T | None]],
    create: Callable[[], Awaitable[T]],
) -> T:
    """What is in the registry already, else what is created there, by us or by another step at the same moment."""
    from mr_openapi.exceptions import ConflictException

    existing = await find()
    if existing is not None:
        return existing
    try:
        return await create()
    except ConflictException:
        existing = await find()
        if existing is None:
            raise
        return existing


def _plain(properties: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """The values that the registry can keep: others as texts, and none for what is not known."""
    plain = {}
    for key, value in properties.items():
        if value is not None:
            plain[key] = value if isinstance(value, bool | int | float | str) else str(value)
    return plain


def _reason(error: Exception) -> str:
    """One short line: the client's own errors quote all headers of an answer."""
    if isinstance(error, TimeoutError):
        return f"it did not answer within {PATIENCE} seconds"
    status = getattr(error, "status", None)
    text = f"{status} {getattr(error, 'reason', '')}: {getattr(error, 'body', '')}" if status else str(error)
    return " ".join(text.split())[:QUOTED]
