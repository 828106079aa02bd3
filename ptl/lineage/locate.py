"""What a user names: a run, a step of a run, a registered version, a folder -> a checkpoint, an evaluation or a result.

How runs and their steps are named: `pipeline_runs`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl.errors import InputError
from ptl.lineage.mlflow_client import if_there
from ptl.lineage.pipeline_runs import (
    FORMS,
    PipelineRun,
    find_run,
    finished_steps,
    makes_model,
    reading,
    report_file,
    result_of,
    run_by_id,
)
from ptl.storage import store
from ptl.storage.manifest import FILES, digest_of, load_files

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

REGISTERED = re.compile(r"models:/(?P<name>[^/@:]+)(@(?P<alias>[^/@:]+)|/(?P<version>\d+))")
ARMS = ("loop", "control")

Result = dict[str, Any]  # what result.json holds


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that a user named, and the model card of its run where the card is about this checkpoint."""

    pointer: store.Pointer
    name: str  # for messages, such as `recover-2 of run 5f0c`
    card: bytes | None = None  # README.md


def needs_mlflow(reference: str, *, items: bool = False) -> bool:
    """Whether MLflow must be asked for it; with `items`, for the items of an evaluation, which are in the store."""
    if Path(reference).exists():
        return items and run_directory(reference) is not None
    # Addresses of the store are read without it.
    return reference.startswith("models:") or "://" not in reference


def run_directory(reference: str) -> Path | None:
    """The directory that is named by `DIR` or `DIR:recover-2`, if it is that of a run, finished or not."""
    name = reference if Path(reference).exists() else reference.rpartition(":")[0]
    if not name:  # no directory, of which "" would be the current one
        return None
    folder = Path(name)
    return folder if any((folder / file).is_file() for file in ("result.json", "config.yaml")) else None


def _by_id(reference: str) -> str:
    """`DIR` and `DIR:recover-2` by the run's id, `RUN_ID` and `RUN_ID:recover-2`; any other name as it is."""
    folder = run_directory(reference)
    if folder is None:
        return reference
    # A directory may have been copied; without a result it still has the run's name.
    finished = (folder / "result.json").is_file()
    run_id = str(result(str(folder))["run_id"]) if finished else folder.resolve().name
    return run_id if Path(reference).exists() else f"{run_id}:{reference.rpartition(':')[2]}"


def checkpoint(reference: str, arm: str = "loop") -> Checkpoint:
    """The checkpoint of that name. `arm` chooses the model of a run: `loop` its final one, or `control`.

    Raises InputError naming what there is where the checkpoint or what it needs is not there.
    """
    if arm not in ARMS:
        raise InputError(f"{arm!r} must be one of {', '.join(ARMS)}", field="--arm")
    # What is on this machine comes first: a run's directory may be named like a run.
    if Path(reference).exists():
        return _of_directory(Path(reference), arm)
    if arm != "loop" and ":" in reference:
        raise InputError(
            f"{reference} names one checkpoint",
            field="--arm",
            remedy="--arm chooses among those of a run: give its id",
        )
    if reference.startswith("models:"):
        return _registered(reference)
    if "://" in reference:
        return _published(reference)
    run, step = find_run(_by_id(reference))
    if step:
        return _of_step(run, step)
    # The card is read after the result, which says whether there is one.
    result = result_of(run)
    card = report_file(run, "README.md")
    return _final(result, arm, run.id, card)


def evaluation(reference: str, cache: Path) -> Path:
    """The items.jsonl of a file or folder, or the fetched folder of a run's evaluation (of its final one for a run)."""
    path = Path(reference)
    names_directory = run_directory(reference) is not None
    # Items that are here already.
    if path.exists() and not names_directory:
        return path
    # The directory of a run names the run: its items are in the store.
    if names_directory:
        reference = _by_id(reference)
    elif reference.startswith("models:") or "://" in reference:
        raise InputError(
            f"{reference!r} is a checkpoint",
            field="compare",
            remedy="give RUN_ID:evaluate-4, RUN_ID, a run's directory, or a folder of items",
        )
    run, step = find_run(reference)
    # Of a run without a step, the evaluation of what it ended with.
    step = step or _final_evaluation(result_of(run), run.id)
    record = store.committed(run.root, run.id, step)
    if record is None or "evaluate" not in step:
        evaluations = [name for name in finished_steps(run) if "evaluate" in name]
        existing = ", ".join(f"{run.id}:{name}" for name in evaluations) or "none yet"
        raise InputError(
            f"{step} is no finished evaluate step of run {run.id}",
            field="compare",
            remedy=f"it has {existing}",
        )
    return store.fetch(record.pointer, cache)


def result(reference: str) -> Result:
    """The result of a run from its result.json, its directory, or its id."""
    path = Path(reference)
    if not path.exists():
        run, _ = find_run(reference)
        return result_of(run)
    if path.is_dir():
        path = path / "result.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} is no result.json of a run ({error!r})",
            field="result",
            remedy="give that file, or RUN_ID",
        ) from error


def _of_directory(folder: Path, arm: str) -> Checkpoint:
    """The final checkpoint of a local run's directory."""
    if not (folder / "result.json").is_file():
        raise InputError(
            f"{folder} holds no result.json, so no finished run",
            field="run",
            remedy=f"give {FORMS}",
        )
    path = folder / "README.md"
    card = path.read_bytes() if path.is_file() else None
    return _final(result(str(folder)), arm, str(folder), card)


def _final(
    result: Result,
    arm: str,
    run: str,
    card: bytes | None,
) -> Checkpoint:
    """The final checkpoint of an arm; the card is about the loop's."""
    if arm == "loop":
        row = result["final"]
        name = f"final checkpoint of run {run}"
    else:
        row = next((row for row in result["rows"] if row["arm"] == arm), None)
        if row is None:
            problem = f"run {run} has no scored {arm}: it was made without one, or it did not finish"
            raise InputError(problem, field="--arm")
        name = f"{arm} of run {run}"
        card = None  # it is about the loop's model
    pointer = store.Pointer(row["uri"], row["digest"], row["params"])
    return Checkpoint(pointer, name, card)


def _of_step(run: PipelineRun, step: str) -> Checkpoint:
    record = store.committed(run.root, run.id, step)
    # A step has a record once it has finished.
    if record is None:
        existing = ", ".join(filter(makes_model, finished_steps(run))) or "none yet"
        raise InputError(
            f"run {run.id} has no finished step {step!r}",
            field="step",
            remedy=f"it has {existing}",
        )
    # Its pointer names scores and items.
    if record.metadata["stage"] == "evaluate":
        raise InputError(
            f"{step} is an evaluation, which `ptl compare` reads",
            field="step",
            remedy="name a step that makes a model",
        )
    pointer = record.pointer
    card = _card(run, pointer.digest)
    return Checkpoint(pointer, f"{step} of run {run.id}", card)


def _card(run: PipelineRun, digest: str) -> bytes | None:
    """The run's model card, if it is about the checkpoint with this digest: the final one."""
    data = report_file(run, "result.json")
    # A run that is not finished has no card yet.
    if not data:
        return None
    is_final = json.loads(data)["final"]["digest"] == digest
    return report_file(run, "README.md") if is_final else None


def _registered(reference: str) -> Checkpoint:
    """The checkpoint of a version in MLflow's registry."""
    match = REGISTERED.fullmatch(reference)
    if match is None:
        raise InputError(f"{reference!r} must be models:/NAME@ALIAS or models:/NAME/VERSION", field="models")
    name = match["name"]
    with reading() as client:
        version = _version(client, name, match["alias"], match["version"])
        tags = version.tags
        # Without its digest the files could not be verified.
        if "ptl.digest" not in tags:
            raise InputError(
                f"{reference} has no tag ptl.digest, so ptl did not register it",
                field="models",
                remedy=f"give {FORMS}",
            )
        # The run that made it may be gone: then there is no card.
        step_run = if_there(client.get_run, version.run_id) if version.run_id else None
        run = run_by_id(client, step_run.data.tags.get("ptl.run", "")) if step_run else None
    pointer = store.Pointer(str(version.source), tags["ptl.digest"], int(tags.get("ptl.params", 0)))
    card = _card(run, pointer.digest) if run else None
    return Checkpoint(pointer, f"version {version.version} of {name}", card)


def _version(
    client: MlflowClient,
    name: str,
    alias: str | None,
    number: str | None,
) -> ModelVersion:
    """The version of a registered model that has the alias, or the number."""
    # Each of the three may be missing: the model, the alias, the version.
    model = if_there(client.get_registered_model, name)
    if model is None:
        models = client.search_registered_models(max_results=20)
        known = ", ".join(model.name for model in models) or "none"
        raise InputError(
            f"this MLflow has no registered model {name!r}",
            field="models",
            remedy=f"it has {known}",
        )
    if alias is not None:
        if alias not in model.aliases:
            existing = [f"{other} (version {number})" for other, number in model.aliases.items()]
            aliases = ", ".join(existing) or "none"
            raise InputError(
                f"{name} has no alias {alias!r}",
                field="models",
                remedy=f"it has {aliases}, or name a version: models:/{name}/1",
            )
        number = model.aliases[alias]
    version: ModelVersion | None = if_there(client.get_model_version, name, str(number))
    if version is None:
        versions = client.search_model_versions(f"name = '{name}'", max_results=100)
        numbers = sorted(int(other.version) for other in versions)
        raise InputError(
            f"{name} has no version {number}",
            field="models",
            remedy=f"it has {numbers or 'none'}",
        )
    return version


def _published(uri: str) -> Checkpoint:
    """The checkpoint in a folder of the store: the list of its files, written last, names all that must be there."""
    # As steps write addresses.
    uri = uri.rstrip("/")
    listing = store.read(f"{uri}/{FILES}")
    if listing is None:
        raise InputError(
            f"no checkpoint at {uri}: it holds no {FILES}",
            field="uri",
            remedy="give the folder that a step published",
        )
    digest = digest_of(load_files(listing, uri))
    return Checkpoint(store.Pointer(uri, digest), uri)


def _final_evaluation(result: Result, run: str) -> str:
    """The step that scored the final checkpoint."""
    # The last of them: a checkpoint may be scored again after a rejection.
    for row in reversed(result["rows"]):
        if row["arm"] == "loop" and row["digest"] == result["final"]["digest"]:
            return str(row["step"])
    raise InputError(
        f"the final checkpoint of run {run} was not scored",
        field="compare",
        remedy=f"name a step: {run}:evaluate-0",
    )
