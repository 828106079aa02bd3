"""What a user names: a run, a step of a run, a registered version, a folder -> a checkpoint, an evaluation or a result.

A run is named by its id (of Kubeflow, or of a local run) or by its MLflow run id; `RUN:recover-2` is one of its steps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl import store, tracking
from ptl.errors import InputError
from ptl.manifest import FILES, digest_of, load_files
from ptl.run_status import by_step

if TYPE_CHECKING:
    import mlflow.entities
    from mlflow import MlflowClient

REGISTERED = re.compile(r"models:/(?P<name>[^/@:]+)(@(?P<alias>[^/@:]+)|/(?P<version>\d+))")
ARMS = ("loop", "control")
FORMS = "a run's directory, RUN_ID, RUN_ID:recover-2, models:/NAME@ALIAS, models:/NAME/VERSION, s3://... or file://..."


@dataclass(frozen=True)
class Run:
    """A run of the pipeline, as MLflow knows it."""

    id: str
    mlflow_id: str  # its parent run in MLflow
    experiment_id: str
    state: str  # of the MLflow run: RUNNING, FINISHED, FAILED, ...
    root: str  # where the records of its steps are
    artifacts: str  # where its report is


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found, and the model card of its run where the card is about this checkpoint."""

    pointer: store.Pointer
    name: str
    card: bytes | None = None


def needs_mlflow(what: str) -> bool:
    """Whether MLflow must be asked for it."""
    return not Path(what).exists() and (what.startswith("models:") or "://" not in what)


def checkpoint(what: str, arm: str = "loop") -> Checkpoint:
    """The checkpoint that `what` names. `arm` chooses the model of a run: `loop` its final one, or `control`.

    Raises InputError naming what there is where `what` or what it needs is not there.
    """
    if arm not in ARMS:
        raise InputError(f"--arm: {arm!r} must be one of {', '.join(ARMS)}")
    if Path(what).exists():
        return _of_directory(Path(what), arm)
    if arm != "loop" and ":" in what:
        raise InputError(f"--arm: {what} names one checkpoint; --arm chooses among those of a run: give its id")
    if what.startswith("models:"):
        return _registered(what)
    if "://" in what:
        return _published(what)
    run, step = find_run(what)
    if step:
        return _of_step(run, step)
    return _final(result_of(run), arm, run.id, _file(run, "README.md"))


def evaluation(what: str, cache: Path) -> Path:
    """The items.jsonl of a file or folder, or the fetched folder of a run's evaluation (of its final one for a run)."""
    path = Path(what)
    if path.exists() and not (path / "result.json").is_file():
        return path
    if path.exists():
        what = str(result(what)["run_id"])  # the directory of a run
    elif what.startswith("models:") or "://" in what:
        raise InputError(f"compare: {what!r} is a checkpoint; give RUN_ID:evaluate-4, RUN_ID, or a folder of items")
    run, step = find_run(what)
    step = step or _final_evaluation(result_of(run), run.id)
    record = store.committed(run.root, run.id, step)
    if record is None or "evaluate" not in step:
        done = ", ".join(f"{run.id}:{name}" for name in _finished(run) if "evaluate" in name) or "none yet"
        raise InputError(f"compare: {step} is no finished evaluate step of run {run.id}; it has {done}")
    return store.fetch(store.Pointer(**record["pointer"]), cache)


def result(what: str) -> dict[str, Any]:
    """The result of a run from its result.json, its directory, or its id."""
    path = Path(what)
    if not path.exists():
        return result_of(find_run(what)[0])
    path = path / "result.json" if path.is_dir() else path
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"result: {path} is no result.json of a run ({error!r}); give that file, or RUN_ID") from error


def result_of(run: Run) -> dict[str, Any]:
    """The result.json of a run in MLflow. Raises InputError with the run's state and steps where there is none yet."""
    data = _file(run, "result.json")
    if data is None:
        steps = _steps(run)
        by_state = {state: [name for name in steps if steps[name] == state] for state in dict.fromkeys(steps.values())}
        listed = "; ".join(f"{state}: {', '.join(names)}" for state, names in by_state.items()) or "no step has begun"
        fetchable = [f"{run.id}:{name}" for name in _finished(run) if "evaluate" not in name and name != "report"]
        raise InputError(
            f"run: {run.id} has no result yet, its state is {run.state} ({listed}); wait for its report, or name one "
            f"step ({', '.join(fetchable) or 'none is finished'}) or a registered version (models:/NAME@ALIAS)"
        )
    return dict(json.loads(data))


def find_run(what: str) -> tuple[Run, str]:
    """The run, and the step that `what` names ("" where it names the run). Raises InputError where MLflow has none."""
    name, _, step = what.partition(":")
    if not store.is_name(name) or (step and not store.is_name(step)):
        raise InputError(f"run: {what!r} is neither a folder nor the name of a run; give {FORMS}")
    with _client() as client:
        named = _by_mlflow_id(client, name) if re.fullmatch("[0-9a-f]{32}", name) else None
        if named is not None and "ptl.run" in named.data.tags:
            step = step or named.data.tags.get("ptl.step", "")
            name = named.data.tags["ptl.run"]
        run = _run(client, name)
    if run is None:
        raise InputError(
            f"run: {what!r} is neither a folder nor a run that this MLflow has; give {FORMS}, and look at "
            "MLFLOW_TRACKING_URI (or --home and --s3)"
        )
    return run, step


def _run(client: MlflowClient, run_id: str) -> Run | None:
    """The pipeline run with this id, in whichever experiment it is."""
    parents = _search_everywhere(client, f"tags.`ptl.run` = '{run_id}' and tags.`ptl.role` = 'parent'")
    if not parents:
        return None
    # A run that was begun without Kubeflow's MLflow plugin and retried with it has two; one of them ended it.
    info = min(parents, key=lambda run: (run.info.status != "FINISHED", run.info.start_time)).info
    place = client.get_experiment(info.experiment_id).artifact_location.rstrip("/")
    return Run(run_id, info.run_id, info.experiment_id, info.status, f"{place}/ptl", info.artifact_uri)


def _of_directory(folder: Path, arm: str) -> Checkpoint:
    """The final checkpoint of a local run's directory."""
    if not (folder / "result.json").is_file():
        raise InputError(f"run: {folder} holds no result.json, so no finished run; give {FORMS}")
    card = folder / "README.md"
    return _final(result(str(folder)), arm, str(folder), card.read_bytes() if card.is_file() else None)


def _final(result: dict[str, Any], arm: str, run: str, card: bytes | None) -> Checkpoint:
    """The final checkpoint of an arm; the card is about the loop's."""
    if arm == "loop":
        entry, name = result["final"], f"final checkpoint of run {run}"
    else:
        rows = [row for row in result["rows"] if row["arm"] == arm]
        if not rows:
            raise InputError(f"--arm: run {run} has no scored {arm}: it was made without one, or it did not finish")
        entry, name, card = rows[-1], f"{arm} of run {run}", None
    return Checkpoint(store.Pointer(entry["uri"], entry["digest"], entry["params"]), name, card)


def _of_step(run: Run, step: str) -> Checkpoint:
    record = store.committed(run.root, run.id, step)
    if record is None:
        done = ", ".join(name for name in _finished(run) if "evaluate" not in name and name != "report")
        raise InputError(f"step: run {run.id} has no finished step {step!r}; it has {done or 'none yet'}")
    if record["metadata"].get("stage", step).startswith("evaluate"):
        raise InputError(f"step: {step} is an evaluation, which `ptl compare` reads; name a step that makes a model")
    pointer = store.Pointer(**record["pointer"])
    return Checkpoint(pointer, f"{step} of run {run.id}", _card(run, pointer.digest))


def _registered(what: str) -> Checkpoint:
    """The checkpoint of a version in MLflow's registry."""
    match = REGISTERED.fullmatch(what)
    if match is None:
        raise InputError(f"models: {what!r} must be models:/NAME@ALIAS or models:/NAME/VERSION")
    with _client() as client:
        version = _version(client, match["name"], match["alias"], match["version"])
        if "ptl.digest" not in version.tags:
            raise InputError(f"models: {what} has no tag ptl.digest, so ptl did not register it; give {FORMS}")
        made_by = _by_mlflow_id(client, version.run_id) if version.run_id else None
        run = _run(client, made_by.data.tags.get("ptl.run", "")) if made_by else None
    digest, params = version.tags["ptl.digest"], int(version.tags.get("ptl.params", 0))
    pointer = store.Pointer(str(version.source), digest, params)
    card = _card(run, digest) if run else None
    return Checkpoint(pointer, f"version {version.version} of {match['name']}", card)


def _version(client: MlflowClient, name: str, alias: str | None, version: str | None) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = ", ".join(model.name for model in client.search_registered_models(max_results=20)) or "none"
        raise InputError(f"models: this MLflow has no registered model {name!r}; it has {names}") from error
    if alias is not None and alias not in aliases:
        held = ", ".join(f"{each} (version {of})" for each, of in aliases.items()) or "none"
        raise InputError(f"models: {name} has no alias {alias!r}; it has {held}, or name a version: models:/{name}/1")
    try:
        return client.get_model_version(name, str(version or aliases[alias]))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        numbers = sorted(int(one.version) for one in client.search_model_versions(f"name = '{name}'", max_results=100))
        raise InputError(f"models: {name} has no version {version}; it has {numbers or 'none'}") from error


def _published(uri: str) -> Checkpoint:
    """The checkpoint in a folder of the store: the list of its files, written last, says what must be there."""
    uri = uri.rstrip("/")
    listing = store.read(f"{uri}/{FILES}")
    if listing is None:
        raise InputError(f"uri: no checkpoint at {uri}: it holds no {FILES}; give the folder that a step published")
    return Checkpoint(store.Pointer(uri, digest_of(load_files(listing, uri))), uri)


def _final_evaluation(result: dict[str, Any], run: str) -> str:
    """The step that scored the final checkpoint."""
    rows = [row for row in result["rows"] if row["arm"] == "loop" and row["digest"] == result["final"]["digest"]]
    if not rows:
        raise InputError(f"compare: the final checkpoint of run {run} was not scored; name a step: {run}:evaluate-0")
    return str(rows[-1]["step"])


def _card(run: Run, digest: str) -> bytes | None:
    """The run's model card, if it is about the checkpoint with this digest: the final one."""
    data = _file(run, "result.json")
    return _file(run, "README.md") if data and json.loads(data)["final"]["digest"] == digest else None


def _file(run: Run, name: str) -> bytes | None:
    """A file of the run's report."""
    return store.read(f"{run.artifacts.rstrip('/')}/report/{name}")


def _finished(run: Run) -> list[str]:
    return [name for name, state in _steps(run).items() if state == "FINISHED"]


def _steps(run: Run) -> dict[str, str]:
    """The steps of a run that have begun, in order, with the states of their MLflow runs."""
    with _client() as client:
        where = f"tags.`ptl.run` = '{run.id}' and tags.`ptl.role` = 'step'"
        found = by_step(client.search_runs([run.experiment_id], where, max_results=1000))
        return {step: each.info.status for step, each in found.items()}


def _by_mlflow_id(client: MlflowClient, run_id: str) -> mlflow.entities.Run | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _search_everywhere(client: MlflowClient, where: str) -> list[mlflow.entities.Run]:
    """Runs of all experiments: Kubeflow's MLflow plugin puts runs into an experiment of its own."""
    found: list[mlflow.entities.Run] = []
    token = None
    while True:
        page = client.search_experiments(max_results=1000, page_token=token)
        if page:
            found += client.search_runs([each.experiment_id for each in page], where, max_results=100)
        token = page.token
        if not token:
            return found


@contextmanager
def _client() -> Iterator[MlflowClient]:
    """A client of the MLflow that the environment names; refused credentials are an InputError."""
    from mlflow.exceptions import MlflowException

    with tracking.explained():
        try:
            yield tracking.connect()
        except MlflowException as error:
            if error.error_code not in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
                raise
            raise InputError(
                f"MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD: MLflow does not accept these credentials "
                f"({error}); set them, or MLFLOW_TRACKING_TOKEN, to those of a user who may read the experiment"
            ) from error
