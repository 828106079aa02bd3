"""`ptl gc` on what real steps leave: in a folder with MLflow's database, and on real S3 and MLflow servers.

The steps' work is a stand-in that writes a few bytes; publishing, records and tracking are the real ones.
"""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import uuid
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import free_port
from mlflow import MlflowClient
from run_records import export
from typer.testing import CliRunner
from working import execute

from ptl.cli.app import app
from ptl.config import dag
from ptl.errors import InputError, WorkError
from ptl.lineage import mlflow_objects, retention, tracking
from ptl.local import servers
from ptl.steps.call import Call
from ptl.storage import s3, store, training_checkpoints
from ptl.storage.local_files import COMPLETE
from ptl.storage.manifest import digest_of
from ptl.storage.s3 import SETTINGS
from ptl.storage.store import Pointer, Record
from ptl.units import size

pytestmark = pytest.mark.xdist_group("gc")
SIZES = {"model.safetensors": 50_000, "config.json": 10}


@pytest.fixture(scope="module")
def local(new_database, tmp_path_factory):
    home = new_database(tmp_path_factory.mktemp("home"))
    return {
        "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db",
        "PTL_ARTIFACT_ROOT": f"file://{home}/artifacts",
    }


@pytest.fixture(scope="module")
def served(server, new_database, tmp_path_factory):
    root, port = new_database(tmp_path_factory.mktemp("mlflow")), free_port()
    servers.mlflow_up(root, port, f"sqlite:///{root}/mlflow.db", f"s3://{servers.BUCKET}/gc", server)
    yield {**server, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    servers.down(root)


@pytest.fixture(params=["local", "served"])
def experiment(request, monkeypatch, tmp_path):
    """A fresh experiment, with the environment of its steps."""
    for name in ("PTL_ARTIFACT_ROOT", "PTL_RUN_DIR", "KFP_RUN_ID", "PTL_LAUNCH", *SETTINGS):
        monkeypatch.delenv(name, raising=False)
    name = f"gc-{uuid.uuid4().hex[:8]}"
    settings = dict(request.getfixturevalue(request.param))
    if request.param == "local":
        settings["PTL_ARTIFACT_ROOT"] += f"/{name}"
    for key, value in {**settings, "PTL_SCRATCH": str(tmp_path / "scratch")}.items():
        monkeypatch.setenv(key, value)
    return name


class Loop:
    """One run of the pipeline, step by step."""

    def __init__(self, experiment, monkeypatch):
        self.experiment, self.run = experiment, f"run-{uuid.uuid4().hex[:8]}"
        self.use = lambda: monkeypatch.setenv("PTL_RUN_ID", self.run)
        self.use()

    def work(self, name, parent=None, metadata=None):
        """Publish and commit the checkpoint of a step."""
        self.use()
        number = 0 if "control" in name else dag.iteration_of(name)
        before = parent.pointer if parent else None

        def work(src, dst, run):
            if before and not metadata:
                assert (src / "config.json").is_file()
            for path, count in SIZES.items():
                (dst / path).write_bytes(os.urandom(count))
            return metadata(run) if metadata else {"params": 100 - number, "tokens": 1, "steps": 1}

        return execute(Call(name, self.experiment), before, {}, work)

    def evaluate(self, name, candidate, fallback, accepted):
        """Scores are made up; a checkpoint that is accepted gets a version in the registry."""
        mine, other = candidate.pointer, fallback.pointer

        def metadata(run):
            if accepted and mine.params < 100:
                mlflow_objects.register(run, self.experiment, mine, {})
            task = {"task": "t", "metric": "m", "accuracy": 0.5, "low": 0.4, "high": 0.6, "items": 9}
            sizes = dict.fromkeys(("params", "bytes", "flops_per_token", "kv_bytes_per_token"), 1) | {"experts": 0}
            return {
                "scores": {"tasks": [task], **sizes},
                "verdict": {"decision": "accepted" if accepted else "rejected"},
                "checkpoint": asdict(mine),
                "accepted": asdict(mine if accepted or "control" in name else other),
            }

        return self.work(name, candidate, metadata)

    def whole(self):
        """Round 1 is accepted, round 2 rejected, with a control."""
        dense = self.work("import-model")
        self.evaluate("evaluate-0", dense, dense, True)
        steps = {"import-model": dense}
        for name, accepted in (("1", True), ("2", False), ("control", False)):
            prune, recover, evaluate = (
                f"control-{stage}" if name == "control" else f"{stage}-{name}"
                for stage in ("prune", "recover", "evaluate")
            )
            start = steps["recover-1"] if name == "2" else dense
            steps[prune] = self.work(prune, start)
            steps[recover] = self.work(recover, steps[prune])
            self.evaluate(evaluate, steps[recover], start, accepted)
        self.end(steps["recover-1"])
        return steps

    def end(self, final=None):
        """As the report step does; without `final` only MLflow says that the run has ended."""
        self.use()
        report = tracking.start(self.experiment, "report", arm="loop", iteration=0)
        if final:
            store.commit(report.root, self.run, "report", Record("report", final.pointer, {"stage": "report"}))
        tracking.finish(report, params={}, metrics={}, inputs=[], output=None, step=0)

    def step_run(self, name):
        self.use()
        where = os.environ.get("PTL_ARTIFACT_ROOT")
        return tracking.start(self.experiment, name, arm="loop", iteration=1, artifact_location=where)


@pytest.fixture
def loop(experiment, monkeypatch):
    return lambda: Loop(experiment, monkeypatch)


def inventory(experiment, days=8.0, runs=(), older_than=7.0):
    """As it is after so many days."""
    (files,) = retention.inventory([experiment], list(runs), older_than - days)
    return files


def going(experiment, days=8.0, **rules):
    """Steps whose files can go after so many days."""
    return sorted(files.step for files in inventory(experiment, days, **rules).stored if not files.needed)


def kept(experiment, **rules):
    return {files.step: files.needed for files in inventory(experiment, **rules).stored if files.needed}


def collect(experiment, **rules):
    files = inventory(experiment, **rules)
    unneeded = [stored for stored in files.stored if not stored.needed]
    for stored in unneeded:
        retention.delete(files, stored)
    return len(unneeded)


def fetchable(record, tmp_path):
    try:
        return store.fetch(record.pointer, tmp_path / uuid.uuid4().hex).is_dir()
    except WorkError as error:
        assert "is gone" in str(error) and "it was deleted" in str(error)
        return False


def listing(uri):
    return sorted((path, size) for path, size, _ in store.walk(uri))


INTERMEDIATE = ["control-prune", "import-model", "prune-1", "prune-2", "recover-2"]


@pytest.mark.slow
def test_finished_run(experiment, loop, tmp_path):
    run = loop()
    steps = run.whole()
    files = inventory(experiment)
    root = f"{files.location}/ptl"
    assert going(experiment) == INTERMEDIATE
    before = listing(root)
    for stored in files.stored:
        assert stored.bytes == sum(size for _, size in listing(stored.uris[0])) > sum(SIZES.values())
    reasons = {"recover-1": f"registered: {experiment} 1", "control-recover": "the control of its run"}
    assert kept(experiment) == reasons
    assert collect(experiment) == 5
    assert {step: fetchable(record, tmp_path) for step, record in steps.items()} == {
        step: step in reasons for step in steps
    }
    assert collect(experiment) == 0 and going(experiment) == []
    assert listing(root) == before  # records are all there
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    tags = {step: client.get_logged_model(record.pointer.model_id).tags for step, record in steps.items()}
    assert sorted(step for step in tags if retention.DELETED in tags[step]) == INTERMEDIATE
    scored = store.committed(root, run.run, "evaluate-2")
    assert fetchable(scored, tmp_path)  # scores and items stay
    client.delete_model_version(experiment, "1")
    assert kept(experiment)["recover-1"] == "final checkpoint of its run"


@pytest.mark.slow
def test_exports_stay_unless_a_run_is_given_up(experiment, loop):
    run = loop()
    dense = run.work("import-model")
    run.evaluate("evaluate-0", dense, dense, True)
    run.work("export-gguf-q8-0", dense, lambda _: export(100, 9, 0.5))
    assert going(experiment) == []
    assert "export-gguf-q8-0" in going(experiment, runs=[run.run])
    run.end(dense)
    assert kept(experiment, runs=[run.run])["export-gguf-q8-0"] == "an export of its run"


@pytest.mark.slow
def test_young_files_are_kept(experiment, loop):
    loop().whole()
    assert going(experiment, days=6.9) == []
    assert going(experiment, days=0, older_than=0) == INTERMEDIATE


DIES = """
import os
from pathlib import Path
from working import execute

from ptl.steps.call import Call
from ptl.storage import store

def publish(folder, location, publish=store.publish):
    return publish(folder, location, on_progress=lambda count: os.kill(os.getpid(), 9))

def work(src, dst, run):
    (dst / "a.safetensors").write_bytes(bytes(90_000))
    (dst / "b.safetensors").write_bytes(bytes(90_000))
    return {"params": 99, "tokens": 1, "steps": 1}

store.publish = publish
execute(Call("recover-1", os.environ["EXPERIMENT"]), None, {}, work)
"""


@pytest.mark.slow
def test_attempts_that_died_and_a_run_that_goes_on(experiment, loop, tmp_path):
    run = loop()
    dense = run.work("import-model")
    run.evaluate("evaluate-0", dense, dense, True)
    cut = run.work("prune-1", dense)
    here = {"PYTHONPATH": str(Path(__file__).parents[1])}
    environment = {**os.environ, **here, "EXPERIMENT": experiment, "PTL_SCRATCH": str(tmp_path / "lost")}
    died = subprocess.run(
        [sys.executable, "-c", DIES], env=environment, capture_output=True, cwd=Path(__file__).parents[2]
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    step = run.step_run("recover-1")
    checkpoints = training_checkpoints.TrainingCheckpoints(step.root, run.run, "recover-1.0", "key", 0)
    for number in (2, 4):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / COMPLETE).write_text(str(number))
        checkpoints.save(folder)
    store.publish(folder, f"{step.root}/{run.run}/recover-1.0.training-2-{'a' * 12}")  # killed before its record

    assert going(experiment) == []  # all of this may be resumed, or be at work
    assert set(kept(experiment).values()) == {"its run is not finished and can be resumed; --run lets it go"}
    checkpoints.restore(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere/checkpoint-4" / COMPLETE).read_text() == "4"
    resumed = run.work("recover-1", cut)  # killed before it could clear its training checkpoints
    run.evaluate("evaluate-1", resumed, dense, True)
    run.end(resumed)
    assert going(experiment) == ["import-model", "prune-1", "recover-1", "recover-1"]
    assert collect(experiment) == 4 and fetchable(resumed, tmp_path)
    assert checkpoints.records() == [] and not [path for path, _ in listing(step.root) if "training" in path]


@pytest.mark.slow
def test_what_the_report_names_stays_though_an_evaluation_was_lost(experiment, loop):
    run = loop()
    run.whole()
    MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).delete_model_version(experiment, "1")
    root = f"{inventory(experiment).location}/ptl"
    for step in ("evaluate-1", "evaluate-2"):
        store.delete(f"{root}/{run.run}/{step}", below=root)
    assert kept(experiment)["recover-1"] == "final checkpoint of its run"


@pytest.mark.slow
def test_files_of_others_and_drafts_of_a_killed_writer(experiment, loop):
    run = loop()
    run.whole()
    root = f"{inventory(experiment).location}/ptl"
    for name in (".DS_Store", f"{run.run}/.parent-1.claim.{'a' * 32}", f"{run.run}/.hidden/file"):
        store._backend(root).put_once(f"{root}/{name}", b"x")
    assert going(experiment) == INTERMEDIATE


@pytest.mark.parametrize("experiment", ["local"], indirect=True)
@pytest.mark.slow
def test_experiments_that_share_their_place(experiment, loop, monkeypatch):
    """All of `ptl run` without a server do; a run is judged where MLflow knows it, also when it is named."""
    run, other = loop(), Loop(f"{experiment}-other", monkeypatch)
    run.whole()
    other.whole()
    assert {files.run for files in inventory(experiment).stored} == {run.run}
    assert {files.run for files in inventory(other.experiment).stored} == {other.run}
    assert retention.inventory([experiment], [other.run], 0) == []


@pytest.mark.parametrize("experiment", ["local"], indirect=True)
@pytest.mark.slow
def test_a_store_that_was_moved(experiment, loop):
    """MLflow was told of the new place, the records name the old one, where a copy may be in use."""
    loop().whole()
    MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).delete_model_version(experiment, "1")
    old = Path(os.environ["PTL_ARTIFACT_ROOT"].removeprefix("file://"))
    shutil.copytree(old, f"{old}-moved")
    columns = {"experiments": "artifact_location", "logged_models": "artifact_location", "model_versions": "source"}
    with sqlite3.connect(os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")) as database:
        for table, column in columns.items():
            database.execute(f"update {table} set {column} = replace({column}, ?, ?)", (str(old), f"{old}-moved"))
    before = listing(f"file://{old}")
    assert inventory(experiment).location.endswith("-moved") and collect(experiment) == 5
    assert listing(f"file://{old}") == before and set(kept(experiment)) == {"recover-1", "control-recover"}


def model_of(uri):
    return uri.split("/")[-2]


@pytest.mark.parametrize("experiment", ["local"], indirect=True)
def test_a_forged_record_deletes_nothing_of_others(experiment, loop, tmp_path):
    """Records of a finished run that name files outside of the experiment, of other runs, and of none."""
    victim, forger = loop(), loop()
    final = victim.work("import-model")  # of a run that is under way
    held = inventory(experiment)
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "key").write_text("x")
    (Path(held.location.removeprefix("file://")) / "models/linked").symlink_to(tmp_path)
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/mine").write_text("x")
    victims = final.pointer.uri
    attacks = [
        f"file://{secrets}",
        str(secrets),
        f"{held.location}/../{os.path.relpath(secrets, held.location.removeprefix('file://'))}",
        f"{held.location}/models/../ptl/artifacts",
        f"{held.location}/models/%2e%2e/artifacts",
        f"{held.location}/models//{model_of(victims)}/artifacts",
        f"{held.location}/models/{model_of(victims)}/artifacts/",
        f"{held.location}/models/{model_of(victims)}/./artifacts",
        f"{held.location}/models/linked/artifacts",
        held.location,
        f"{held.location}/ptl",
        victims,
    ]
    for number, uri in enumerate(attacks):
        pointer = Pointer(uri, "sha256:" + "0" * 64)
        metadata = {"stage": "prune", "iteration": number}
        step = forger.step_run("evaluate-1")
        store.commit(step.root, forger.run, f"prune-{number}", Record("k", pointer, metadata))
    forger.evaluate("evaluate-1", forger.work("import-model"), final, True)
    forger.end(final)
    # Whoever writes to MLflow may name such folders as models too.
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    with sqlite3.connect(client.tracking_uri.removeprefix("sqlite:///")) as database:
        for uri in attacks[:-1]:
            model = client.create_logged_model(step.experiment_id, tags={"ptl.run": forger.run, "ptl.step": "forged"})
            statement = "update logged_models set artifact_location = ? where model_id = ?"
            database.execute(statement, (uri, model.model_id))
            database.commit()
    before = set(tmp_path.rglob("*"))
    stored = inventory(experiment).stored
    forged = [files for files in stored if files.step == "forged"]
    assert {files.uris[0] for files in forged} <= {attacks[8]}  # a symlink is seen only when it is to be deleted
    try:
        collect(experiment)
    except WorkError as error:
        assert "linked" in str(error)
    assert fetchable(final, tmp_path / "cache") and set(tmp_path.rglob("*")) == before


def test_only_plain_folders_below_the_root_are_deleted(place, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    location = f"{place.root}/models/a/artifacts"
    pointer = Pointer(location, digest_of(store.publish(folder, location)))
    for uri in (
        location.replace("/models/", "/models/../models/"),
        location.replace("/models/", "//models/"),
        location.replace("/models/", "/models/%61/../"),
        location.replace("/models/", "/m%6fdels/"),
        location.replace("/a/", "/a/./"),
        f"{location}/",
        place.root,
        f"{place.root}/",
        f"file://{folder}",
        str(folder),
        "s3://other/models/a/artifacts",
        f"{place.root}-other/a",
        f"{location}?versionId=1",
    ):
        with pytest.raises(WorkError, match="is not a plain folder below"):
            store.delete(uri, below=place.root)
    assert fetchable(Record("k", pointer), tmp_path) and (folder / "config.json").is_file()
    store.delete(location, below=place.root)
    assert listing(place.root) == []


def test_a_symlink_does_not_lead_out_of_the_root(tmp_path):
    kept = tmp_path / "kept/artifacts"
    kept.mkdir(parents=True)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a").symlink_to(kept.parent)
    (tmp_path / "root/b").symlink_to(tmp_path / "root")
    for name in ("a", "a/artifacts", "b"):
        with pytest.raises(WorkError, match=r"nothing was deleted: remove the symlink"):
            store.delete(f"file://{tmp_path}/root/{name}", below=f"file://{tmp_path}/root")
    assert kept.is_dir()


@pytest.mark.parametrize("experiment", ["local"], indirect=True)
def test_only_a_report_finishes_a_run(experiment, loop):
    """Somebody set the run to FINISHED in MLflow, which keeps no report of it."""
    run = loop()
    dense = run.work("import-model")
    run.evaluate("evaluate-0", dense, dense, True)
    run.work("prune-1", dense)
    run.end()
    assert set(kept(experiment).values()) == {"its run is not finished and can be resumed; --run lets it go"}
    run.end(dense)
    assert going(experiment) == ["prune-1"]


@pytest.mark.slow
def test_runs_that_are_named(experiment, loop, tmp_path):
    ended, open_ = loop(), loop()
    ended.whole()
    dense = open_.work("import-model")
    open_.evaluate("evaluate-0", dense, dense, True)
    pruned = open_.work("prune-1", dense)
    assert going(experiment) == INTERMEDIATE  # of the other run
    assert going(experiment, runs=[open_.run]) == ["import-model", "prune-1"]
    assert going(experiment, days=2, runs=[open_.run]) == []
    assert going(experiment, runs=[ended.run]) == INTERMEDIATE
    collect(experiment, runs=[open_.run])
    with pytest.raises(WorkError, match=r"is gone.*it was deleted"):
        open_.work("recover-1", pruned)


@pytest.mark.slow
def test_a_version_that_was_registered_by_its_folder_stays(experiment, loop):
    loop().whole()
    held = inventory(experiment)
    if not held.location.startswith("file://"):
        pytest.skip("a plain path names files of this machine only")
    (pruned,) = [stored for stored in held.stored if stored.step == "prune-1"]
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    client.create_model_version(experiment, pruned.uris[0].removeprefix("file://"))
    assert "prune-1" in INTERMEDIATE and "prune-1" not in going(experiment)


def test_a_run_that_is_at_work_is_not_collected(tmp_path):
    from ptl import processes
    from ptl.cli import results

    lock = tmp_path / "runs" / "tiny-1" / "lock"
    refused = pytest.raises(InputError, match=r"run tiny-1.*end it first")
    with processes.exclusive(lock, "run tiny-1"), ExitStack() as stack, refused:
        results._hold(stack, tmp_path, {"tiny-1", "another-run"})


@pytest.mark.slow
def test_a_damaged_record_keeps_its_run(experiment, loop):
    run = loop()
    run.whole()
    root = f"{inventory(experiment).location}/ptl"
    uri = f"{root}/{run.run}/prune-2/manifest.json"
    store.delete(f"{root}/{run.run}/prune-2", below=root)
    garbled = b'{"format": 1}'
    store._backend(uri).put_once(uri, garbled)
    reasons = kept(experiment).values()
    assert going(experiment) == []
    assert sum("a record of the run cannot be read" in reason for reason in reasons) == 6  # all but the registered one


@pytest.mark.slow
def test_command(experiment, loop, monkeypatch):
    run = loop()
    run.whole()
    held = inventory(experiment)
    before = listing(held.location)
    goes = sum(stored.bytes for stored in held.stored if not stored.needed)

    def ptl(*arguments):
        answer = CliRunner().invoke(app, ["gc", "--experiment", experiment, *arguments])
        if answer.exception and not isinstance(answer.exception, SystemExit):
            raise answer.exception
        return answer.output

    assert "can go: 0 items, 0 B (0 bytes)" in ptl()
    dry = ptl("--older-than", "0")
    assert f"can go: 5 items, {size(goes)} ({goes:,} bytes); nothing was deleted" in dry
    assert f"registered: {experiment} 1" in dry
    assert listing(held.location) == before
    assert f"deleted: 5 items, {size(goes)} ({goes:,} bytes)" in ptl("--older-than", "0", "--delete")
    after = listing(held.location)
    assert set(after) < set(before) and sum(size for _, size in before) - sum(size for _, size in after) == goes
    assert "deleted: 0 items" in ptl("--older-than", "0", "--delete")
    with pytest.raises(InputError, match="'nowhere' is neither a folder nor a run"):
        ptl("--run", "nowhere")
    with pytest.raises(InputError, match="--experiment: MLflow has no 'nowhere'"):
        ptl("--experiment", "nowhere")


def test_where_runs_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runner = CliRunner()
    said = runner.invoke(app, ["gc", "--home", str(tmp_path)]).exception
    assert isinstance(said, InputError) and "--home: no local runs in" in str(said) and "--s3" not in str(said)
    said = runner.invoke(app, ["gc", "--s3", "--home", str(tmp_path)]).exception
    assert isinstance(said, InputError) and "`ptl up` has never run" in str(said)
    (tmp_path / "stack").mkdir()
    said = runner.invoke(app, ["gc", "--home", str(tmp_path)]).exception
    assert "--s3 is for the runs of its servers" in str(said)


def test_credentials_that_may_not_delete(monkeypatch):
    """A stand-in for S3's client; those of the steps are like this."""
    from botocore.exceptions import ClientError

    class Refuses:
        def delete_object(self, **_):
            raise ClientError({"Error": {"Code": "AccessDenied"}}, "DeleteObject")

    monkeypatch.setattr(s3, "client", Refuses)
    monkeypatch.setattr(s3, "walk", lambda uri: [("model.safetensors", 1, 0.0)])
    with pytest.raises(InputError, match=r"s3://b/x.*access denied.*s3:DeleteObject"):
        store.delete("s3://b/x", below="s3://b")
