"""Where a checkpoint is: a local folder, or a hub id, which is downloaded once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ptl.errors import InputError

TIMEOUT = 5  # seconds for the hub to say that it has a data set
OTHER_FORMATS = ("consolidated*",)  # Mistral's repositories hold the weights a second time, in its own format
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")  # beside the weights; no pickles, no code


def locate(
    path: str,
    revision: str | None,
    patterns: Sequence[str] = (*SMALL_FILES, "*.safetensors"),
    field: str = "model.path",
) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded once, into the hub's own cache."""
    if is_local(path):
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        snapshot = snapshot_download(
            path,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(OTHER_FORMATS),
        )
        return Path(snapshot)
    except (HFValidationError, OSError) as error:  # the hub's own errors are OSErrors
        at_revision = f" at revision {revision}" if revision else ""
        kind = type(error).__name__
        raise InputError(
            f"{path!r} is no local folder, and the hub does not give it{at_revision} ({kind})",
            field=field,
            remedy=_remedy(error),
        ) from error


def has_dataset(name: str, revision: str | None, field: str) -> bool:
    """Whether the hub has a data set; False where it cannot be asked. Raises InputError for one that is not there."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.dataset_info(name, revision=revision, timeout=TIMEOUT)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputError(
            f"{name!r} is no file here, and the hub has no such data set ({type(error).__name__})",
            field=field,
            remedy=_remedy(error),
        ) from error
    except Exception:  # of its client's dozen kinds: no connection, no answer in time, an error of the server
        return False
    return True


def is_local(path: str) -> bool:
    """Whether a checkpoint is given by its folder; one that is written as such is not looked for on the hub."""
    return Path(path).exists() or path.startswith((".", "/", "~"))


def _remedy(error: Exception) -> str:
    """What to do about an error of the hub."""
    from huggingface_hub import errors

    remedies = {  # a gated model is not found either, so the order counts
        errors.GatedRepoError: "accept its licence on its page of the hub, and set HF_TOKEN to a token of that account",
        errors.RepositoryNotFoundError: "check the id; a private one needs HF_TOKEN",
        errors.RevisionNotFoundError: "check the revision: a commit, branch or tag",
        errors.LocalEntryNotFoundError: "the hub cannot be reached from here, and its cache does not hold it: give the "
        "folder of a checkpoint, or connect (HF_HUB_OFFLINE=1 allows the cache alone)",
    }
    otherwise = "check the path or id, HF_TOKEN for a gated model, and that the hub can be reached"
    return next((remedy for kind, remedy in remedies.items() if isinstance(error, kind)), otherwise)
