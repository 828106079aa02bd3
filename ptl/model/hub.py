"""Where a checkpoint is: a local folder, or a hub id, which is downloaded once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ptl.errors import InputError

SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")  # beside the weights; no pickles, no code


def locate(
    path: str,
    revision: str | None,
    patterns: Sequence[str] = (*SMALL_FILES, "*.safetensors"),
    field: str = "model.path",
) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded once, into the hub's own cache."""
    folder = Path(path)
    # A missing folder that is written as one must not be looked for on the hub.
    if folder.exists() or path.startswith((".", "/", "~")):
        return folder.expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(patterns)))
    except (HFValidationError, OSError) as error:  # the hub's own errors are OSErrors
        raise InputError(
            f"{path!r} is no local folder, and the hub does not give it (revision {revision}): {type(error).__name__}",
            field=field,
            remedy="check the path or id, HF_TOKEN for a gated model, and that the hub can be reached "
            "(HF_HUB_OFFLINE=1: only what its cache holds)",
        ) from error
