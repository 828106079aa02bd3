"""What a user names: a run, a step of a run, a registered version, a folder -> a checkpoint, an evaluation or a result.

A run is named by its id (of Kubeflow, or of a local run), its name in MLflow, an MLflow run id or its directory;
`RUN:recover-2` is one of its steps.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl.errors import InputError
from ptl.lineage.mlflow_client import connected, experiment_ids, if_there
from ptl.lineage.run_status import PARENT, by_step, parent_among, records_root, search
from ptl.storage import store
from ptl.storage.manifest import FILES, digest_of, load_files

if TYPE_CHECKING:
    from mlflow import MlflowClient

FORMS = "a run's directory, RUN_ID, RUN_ID:recover-2, models:/NAME@ALIAS, models:/NAME/VERSION, s3://... or file://..."
REGISTERED = re.compile(r"models:/(?P<name>[^/@:]+)(@(?P<alias>[^/@:]+)|/(?P<version>\d+))")

Result = dict[str, Any]  # what result.json holds


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that a user named, and the model card of its run where the card is about this checkpoint."""

    pointer: store.Pointer
    name: str  # for messages, such as `recover-2 of run 5f0c`
    card: bytes | None = None  # README.md


@dataclass(frozen=True)
class PipelineRun:
    """A run of the pipeline, as MLflow knows it."""

    id: str  # of Kubeflow, or of a local run
    state: str  # of the MLflow run: RUNNING, FINISHED, FAILED, ...
    root: str  # where the records of its steps are
    artifacts: str  # where its report is
    finished: str  # the finished steps that can be named, for messages

    def report_file(self, name: str) -> bytes | None:
        """A file of the run's report; None before there is one."""
        return store.read(f"{self.artifacts.rstrip('/')}/report/{name}")


def needs_mlflow(reference: str, *, items: bool = False) -> bool:
    """Whether MLflow must be asked for it; with `items`, for the items of an evaluation, which are in the store."""
    if Path(reference).exists():
        return not _is_here(reference) or (items and run_directory(reference) is not None)
    # Addresses of the store are read without it.
    return reference.startswith("models:") or "://" not in reference


def _is_here(reference: str) -> bool:
    """Whether it is a file or a folder; the directory of a run that has not finished only names the run."""
    path = Path(reference)
    return path.exists() and (run_directory(reference) is None or (path / "result.json").is_file())


def run_directory(reference: str) -> Path | None:
    """The directory that is named by `DIR` or `DIR:recover-2`, if it is that of a run, finished or not."""
    name, _ = _split(reference)
    is_run = name and any(Path(name, file).is_file() for file in ("result.json", "config.yaml"))
    return Path(name) if is_run else None


def _split(reference: str) -> tuple[str, str]:
    """The run and the step of `RUN:recover-2`; the step is empty where only a run is named."""
    name, colon, step = reference.rpartition(":")
    return (name, step) if colon and not Path(reference).exists() else (reference, "")


def find_run(reference: str) -> tuple[PipelineRun, str]:
    """The run and the step that a user names ("" for the run itself). Raises InputError where MLflow has none."""
    name, step = _split(reference)
    folder = run_directory(reference)
    if folder is not None:
        # A directory may have been copied; without a result it still has the run's name.
        finished = (folder / "result.json").is_file()
        name = str(result(str(folder))["run_id"]) if finished else folder.resolve().name
    # Both become parts of addresses.
    if not (store.is_name(name) and store.is_name(step or name)):
        raise InputError(
            f"{reference!r} is neither a folder nor the name of a run",
            field="run",
            remedy=f"give {FORMS}",
        )
    with connected() as client:
        # It may be the id of an MLflow run, of the parent or of a step.
        if re.fullmatch("[0-9a-f]{32}", name):
            mlflow_run = if_there(client.get_run, name)
            tags = mlflow_run.data.tags if mlflow_run else {}
            name = tags.get("ptl.run", name)
            step = step or tags.get("ptl.step", "")
        run = _run_by_id(client, name) or _run_by_name(client, name)
    # Often the wrong MLflow was asked.
    if run is None:
        raise InputError(
            f"{reference!r} is neither a folder nor a run that this MLflow has",
            field="run",
            remedy=f"give {FORMS}, and look at MLFLOW_TRACKING_URI (or --home and --s3)",
        )
    return run, step


def _run_by_id(client: MlflowClient, run_id: str) -> PipelineRun | None:
    """The pipeline run with this id, in whichever experiment it is: Kubeflow's MLflow plugin has one of its own."""
    runs = search(client, experiment_ids(client), run_id)
    parent = parent_among(runs)
    if parent is None:
        return None
    experiment = client.get_experiment(parent.info.experiment_id)
    ended = [
        step
        for step, run in by_step(runs).items()
        if run.info.status == "FINISHED" and step != "report"
    ]
    return PipelineRun(
        id=run_id,
        state=parent.info.status,
        root=records_root(experiment.artifact_location),
        artifacts=parent.info.artifact_uri,
        finished=", ".join(f"{run_id}:{step}" for step in ended) or "none yet",
    )


def _run_by_name(client: MlflowClient, name: str) -> PipelineRun | None:
    """The newest pipeline run of this name: MLflow lists the newest first."""
    query = f"{PARENT} and attributes.run_name = '{name}'"
    parents = client.search_runs(experiment_ids(client), query, max_results=1)
    return _run_by_id(client, parents[0].data.tags["ptl.run"]) if parents else None


def checkpoint(reference: str, arm: str = "loop") -> Checkpoint:
    """The checkpoint of that name. `arm` chooses the model of a run: `loop` its final one, or `control`.

    Raises InputError naming what there is where the checkpoint or what it needs is not there.
    """
    # What is on this machine comes first: a run's directory may be named like a run.
    if _is_here(reference):
        card = store.read(str(Path(reference).resolve() / "README.md"))
        return _final(result(reference), arm, reference, card)
    if arm != "loop" and ":" in reference:
        raise InputError(
            f"{reference} names one checkpoint; for an arm give the id of a run", field="--arm"
        )
    if reference.startswith("models:"):
        return _registered(reference)
    if "://" in reference:
        return _published(reference)
    run, step = find_run(reference)
    if step:
        pointer = _pointer(run, step, evaluation=False)
        return Checkpoint(pointer, f"{step} of run {run.id}", _card(run, pointer.digest))
    return _final(_result_of(run), arm, run.id, run.report_file("README.md"))


def evaluation(reference: str, cache: Path) -> Path:
    """The items of an evaluation: a file or folder, or of a run (its final one) the folder that is fetched."""
    path = Path(reference)
    # Items that are here already; the directory of a run names the run, whose items are in the store.
    if path.exists() and run_directory(reference) is None:
        return path
    if reference.startswith("models:") or "://" in reference:
        raise InputError(
            f"{reference!r} is a checkpoint",
            field="compare",
            remedy="give RUN_ID:evaluate-4, RUN_ID, a run's directory, or a folder of items",
        )
    run, step = find_run(reference)
    # Of a run without a step, the evaluation of what it ended with.
    step = step or _final_evaluation(_result_of(run), run.id)
    return store.fetch(_pointer(run, step, evaluation=True), cache)


def result(reference: str) -> Result:
    """The result of a run from its result.json, its directory, or its id."""
    if not _is_here(reference):
        return _result_of(find_run(reference)[0])
    path = Path(reference)
    if path.is_dir():
        path = path / "result.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} is no result.json of a run ({error!r})", field="run", remedy=f"give {FORMS}"
        ) from error


def _result_of(run: PipelineRun) -> Result:
    """The result.json of a run in MLflow. Raises InputError with its state and steps where there is none yet."""
    data = run.report_file("result.json")
    if data is not None:
        return dict(json.loads(data))
    # A checkpoint of the run can be fetched meanwhile.
    raise InputError(
        f"{run.id} has no result yet, its state is {run.state}",
        field="run",
        remedy=f"wait for its report, or name a finished step ({run.finished}) or a version (models:/NAME@ALIAS)",
    )


def _pointer(run: PipelineRun, step: str, *, evaluation: bool) -> store.Pointer:
    """What a finished step of a run has published: a checkpoint, or the items of an evaluation."""
    record = store.committed(run.root, run.id, step)
    stages = ("evaluate",) if evaluation else ("import", "prune", "recover", "export")
    if record is None or record.metadata["stage"] not in stages:
        kind = "evaluates" if evaluation else "makes a checkpoint"
        raise InputError(
            f"run {run.id} has no finished step {step!r} that {kind}",
            field="step",
            remedy=f"it has {run.finished}",
        )
    return record.pointer


def _final(result: Result, arm: str, run: str, card: bytes | None) -> Checkpoint:
    """The final checkpoint of an arm; the card is about the loop's."""
    if arm == "loop":
        row = result["final"]
        return Checkpoint(_pointer_of(row), f"final checkpoint of run {run}", card)
    for row in result["rows"]:
        if row["arm"] == arm:
            return Checkpoint(_pointer_of(row), f"{arm} of run {run}")
    raise InputError(
        f"run {run} has no scored {arm}: it was made without one, or it did not finish",
        field="--arm",
    )


def _pointer_of(row: Result) -> store.Pointer:
    return store.Pointer(row["uri"], row["digest"], row["params"])


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


def _card(run: PipelineRun, digest: str) -> bytes | None:
    """The run's model card, if it is about the checkpoint with this digest: the final one."""
    data = run.report_file("result.json")
    # A run that is not finished has no card yet.
    is_final = data and json.loads(data)["final"]["digest"] == digest
    return run.report_file("README.md") if is_final else None


def _registered(reference: str) -> Checkpoint:
    """The checkpoint of a version in MLflow's registry."""
    match = REGISTERED.fullmatch(reference)
    if match is None:
        raise InputError(
            f"{reference!r} must be models:/NAME@ALIAS or models:/NAME/VERSION", field="models"
        )
    name = match["name"]
    with connected() as client:
        model = if_there(client.get_registered_model, name)
        aliases = model.aliases if model else {}
        number = match["version"] or aliases.get(match["alias"])
        version = if_there(client.get_model_version, name, str(number)) if number else None
        if version is None:
            raise InputError(
                f"this MLflow has no {reference}",
                field="models",
                remedy=f"aliases of {name}: {', '.join(aliases) or 'none'}",
            )
        # The run that made it may be gone: then there is no card.
        run = _run_by_id(client, version.tags.get("ptl.run", ""))
    # Without its digest the files could not be verified.
    digest = version.tags.get("ptl.digest")
    if digest is None:
        raise InputError(
            f"{reference} has no tag ptl.digest, so ptl did not register it", field="models"
        )
    pointer = store.Pointer(str(version.source), digest, int(version.tags.get("ptl.params", 0)))
    card = _card(run, digest) if run else None
    return Checkpoint(pointer, f"version {version.version} of {version.name}", card)


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
    return Checkpoint(store.Pointer(uri, digest_of(load_files(listing, uri))), uri)
