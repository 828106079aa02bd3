"""Where a checkpoint is: a local folder, or a hub id, which is downloaded once; and its import into a run."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Sequence
from pathlib import Path

from ptl import connections, log
from ptl.errors import InputError, PtlError, WorkError
from ptl.model import checkpoint, pretrained, text_tower
from ptl.model.dimensions import model_dimensions
from ptl.model.families import family_of

TIMEOUT = 5  # seconds for the hub to say that it has a data set
# Mistral's repositories hold the weights a second time, in its own format
OTHER_FORMATS = ("consolidated*",)
# no pickles, no code
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*")


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
        problem = f"{path!r} is no local folder, and the hub does not give it{at_revision} ({reason(error)})"
        raise error_for(error, problem, field=field, remedy=_remedy(error)) from error


def error_for(error: Exception, problem: str, *, field: str, remedy: str) -> PtlError:
    """The error of what cannot be had from the hub: of the input, unless the same request may succeed later."""
    from huggingface_hub import constants, errors

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WorkError(f"{problem}: {error.strerror}", field=field, remedy="free some")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        may_succeed = status in (408, 429) or status >= 500
    else:
        no_answer = isinstance(
            error, ConnectionError | TimeoutError | errors.LocalEntryNotFoundError
        )
        of_its_client = type(error).__module__.startswith("httpx")
        may_succeed = (no_answer or of_its_client) and not constants.HF_HUB_OFFLINE
    return (WorkError if may_succeed else InputError)(problem, field=field, remedy=remedy)


def has_dataset(name: str, revision: str | None, field: str) -> bool:
    """Whether the hub has a data set; False where it cannot be asked. Raises InputError for one that is not there."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.dataset_info(name, revision=revision, timeout=TIMEOUT)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputError(
            f"{name!r} is no file here, and the hub has no such data set ({reason(error)})",
            field=field,
            remedy=_remedy(error),
        ) from error
    # of its client's dozen kinds: no connection, no answer in time, an error of the server
    except Exception:
        return False
    return True


def is_local(path: str) -> bool:
    """Whether a checkpoint is given by its folder; one that is written as such is not looked for on the hub."""
    return Path(path).exists() or path.startswith((".", "/", "~"))


def import_checkpoint(path: str, revision: str | None, dst: Path) -> None:
    """Copy an ordinary checkpoint to `dst`, weights checked for NaN; raises InputError for what is wrong with it.

    Of a multimodal checkpoint the text model is saved, and a line of the log says so.
    """
    # Headers and small files first: what is wrong there is found in seconds.
    src = locate(path, revision)
    family = family_of(text_tower.read_config(src))
    checkpoint.check_links(src)
    model_dimensions(src, family)
    checkpoint.check_tokenizer(src)
    pretrained.load_tokenizer(src)

    # Then every value.
    weights = checkpoint.shards(src)
    checkpoint.check_finite(weights)

    # Weights and config, and what must travel with them.
    dst.mkdir(parents=True, exist_ok=True)
    config = checkpoint.read_config(src)
    if text_tower.has_tower(config):
        log.say(
            "import-model",
            f"{path} is a {config['model_type']}: its text model is saved, as {family.model_type}",
        )
        text_tower.write_text_model(src, dst)
        return
    for file in [*weights, src / "config.json", src / checkpoint.INDEX]:
        if file.is_file():  # one shard has no index
            shutil.copyfile(file, dst / file.name)
    checkpoint.copy_companions(src, dst)


def reason(error: Exception) -> str:
    """Why the hub does not give something, as one phrase."""
    from huggingface_hub.errors import HfHubHTTPError

    phrase = connections.failure(error) or _explained(error)[0]
    if not phrase and isinstance(error, HfHubHTTPError):
        phrase = connections.status_name(error.response.status_code)
    return phrase or connections.shortened(f"{type(error).__name__}: {error}")


def _remedy(error: Exception) -> str:
    """What to do about an error of the hub."""
    return _explained(error)[1]


def _explained(error: Exception) -> tuple[str, str]:
    """A phrase for an error of the hub, empty for one of no known kind, and what to do about it."""
    from huggingface_hub import errors

    kinds = {  # a gated model is not found either, so the order counts
        errors.GatedRepoError: (
            "its licence is not accepted",
            "accept its licence on its page of the hub, and set HF_TOKEN to a token of that account",
        ),
        errors.RepositoryNotFoundError: (
            "nothing of that name, or hidden from this account",
            "check the id; a private one needs HF_TOKEN",
        ),
        errors.RevisionNotFoundError: (
            "no such revision",
            "check the revision: a commit, branch or tag",
        ),
        errors.LocalEntryNotFoundError: (
            "no connection",
            "the hub cannot be reached from here, and its cache does not hold it: give the folder of a checkpoint, or "
            "connect (HF_HUB_OFFLINE=1 allows the cache alone)",
        ),
    }
    otherwise = (
        "",
        "check the path or id, HF_TOKEN for a gated model, and that the hub can be reached",
    )
    return next((texts for kind, texts in kinds.items() if isinstance(error, kind)), otherwise)
