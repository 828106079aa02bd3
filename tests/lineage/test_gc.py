"""`ptl gc` on what real steps leave: in a folder with MLflow's database, and on real S3 and MLflow servers.

The steps' work is a mock that writes a few bytes; publishing, records and tracking are the real ones.
"""

import json
import os
import shutil
import sqlite3
import uuid
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
from mlflow import MlflowClient
from run_records import export, scores
from typer.testing import CliRunner
from working import execute

from ptl import processes
from ptl.cli import results
from ptl.cli.app import app
from ptl.errors import InputError, WorkError
from ptl.lineage import gc, mlflow_objects, run_page, tracking
from ptl.steps.call import Call
from ptl.storage import store, training_checkpoints
from ptl.storage.local_files import COMPLETE
from ptl.storage.manifest import digest_of
from ptl.storage.store import Pointer, Record
from ptl.units import size

pytestmark = pytest.mark.xdist_group("gc")
SIZES = {"model.safetensors": 50_000, "config.json": 10}
TRAINED = {"tokens": 1, "steps": 1}
INTERMEDIATE = ["control-prune", "import-model", "prune-1", "prune-2", "recover-2"]
CONTROL = ("control-{}", "import-model", False)
UNFINISHED = "its run is not finished and can be resumed; --run lets it go"


class Loop:
    """One run of the pipeline, step by step."""

    def __init__(self, experiment, monkeypatch):
        self.experiment, self.run = experiment, f"run-{uuid.uuid4().hex[:8]}"
        self.use = lambda: monkeypatch.setenv("PTL_RUN_ID", self.run)

    def work(self, name, parent=None, metadata=None):
        """Publish and commit the checkpoint of a step."""

        def work(src, dst, run):
            for path, count in SIZES.items():
                (dst / path).write_bytes(os.urandom(count))
            return (
                metadata(run)
                if metadata
                else {"params": 100 if name == "import-model" else 90, **TRAINED}
            )

        self.use()
        return execute(Call(name, self.experiment), parent and parent.pointer, {}, work)

    def evaluate(self, name, candidate, fallback, accepted):
        """Scores are made up; a checkpoint that is accepted gets a version in the registry."""
        mine, other = candidate.pointer, fallback.pointer

        def metadata(run):
            if accepted and mine.params < 100:
                mlflow_objects.register(run, self.experiment, mine, {})
            return {
                "scores": scores(1, 0.5, 1),
                "verdict": {"decision": "accepted" if accepted else "rejected"},
                "checkpoint": asdict(mine),
                "accepted": asdict(mine if accepted or "control" in name else other),
            }

        return self.work(name, candidate, metadata)

    def imported(self):
        """The dense model, with its scores."""
        dense = self.work("import-model")
        self.evaluate("evaluate-0", dense, dense, True)
        return dense

    def whole(self):
        """Iteration 1 is accepted, iteration 2 rejected, with a control."""
        self.steps = steps = {"import-model": self.imported()}
        for name, start, accepted in (
            ("{}-1", "import-model", True),
            ("{}-2", "recover-1", False),
            CONTROL,
        ):
            prune, recover, evaluate = map(name.format, ("prune", "recover", "evaluate"))
            steps[prune] = self.work(prune, steps[start])
            steps[recover] = self.work(recover, steps[prune])
            self.evaluate(evaluate, steps[recover], steps[start], accepted)
        self.end(steps["recover-1"])
        return self

    def end(self, final=None):
        """As the report step does; without `final` only MLflow says that the run has ended."""
        report = self.step_run("report")
        if final:
            store.commit(
                report.root,
                self.run,
                "report",
                Record("report", final.pointer, {"stage": "report"}),
            )
        tracking.finish(report, params={}, metrics={}, inputs=[], output=None, step=0)

    def step_run(self, name):
        self.use()
        where = os.environ.get("PTL_ARTIFACT_ROOT")
        return tracking.start(
            self.experiment, name, arm="loop", iteration=1, artifact_location=where
        )


@pytest.fixture
def experiment(request, mlflow_folder, monkeypatch, tmp_path):
    """A fresh experiment, with the environment of its steps: in a folder, or on servers."""
    environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{mlflow_folder}/mlflow.db"}
    environment["PTL_ARTIFACT_ROOT"] = f"file://{tmp_path}/store"
    if getattr(request, "param", "local") == "served":
        environment = request.getfixturevalue("stack")
    for key, value in {**environment, "PTL_SCRATCH": str(tmp_path / "scratch")}.items():
        monkeypatch.setenv(key, value)
    return f"gc-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def loop(experiment, monkeypatch):
    return lambda: Loop(experiment, monkeypatch)


@pytest.fixture
def finished_run(loop):
    return loop().whole()


def inventory(experiment, days=8.0, runs=(), older_than=7.0):
    """As it is after so many days."""
    (files,) = gc.inventory([experiment], list(runs), older_than - days)
    return files


def going(experiment, days=8.0, **rules):
    """Steps whose files can go after so many days."""
    return sorted(
        files.step for files in inventory(experiment, days, **rules).stored if not files.needed
    )


def kept(experiment, **rules):
    return {
        files.step: files.needed for files in inventory(experiment, **rules).stored if files.needed
    }


def collect(experiment, **rules):
    files = inventory(experiment, **rules)
    unneeded = [stored for stored in files.stored if not stored.needed]
    for stored in unneeded:
        gc.delete_files(files, stored)
    return len(unneeded)


def fetchable(record, tmp_path):
    try:
        return store.fetch(record.pointer, tmp_path / uuid.uuid4().hex).is_dir()
    except WorkError as error:
        assert "is gone" in str(error) and "it was deleted" in str(error)
        return False


def listing(uri):
    return sorted((path, size) for path, size, _ in store.walk(uri))


@pytest.mark.parametrize("experiment", ["local", "served"], indirect=True)
def test_of_a_finished_run_the_final_checkpoints_stay(experiment, finished_run, tmp_path):
    run = finished_run
    files = inventory(experiment)
    root = f"{files.location}/ptl"
    assert going(experiment) == INTERMEDIATE and going(experiment, days=6.9) == []
    before = listing(root)
    for stored in files.stored:
        assert (
            stored.bytes == sum(size for _, size in listing(stored.uris[0])) > sum(SIZES.values())
        )
    reasons = {
        "recover-1": f"registered: {experiment} 1",
        "control-recover": "the control of its run",
    }
    assert kept(experiment) == reasons
    names = [
        f"{run.run}/{step}" for step in ("evaluate-0", "evaluate-1", "control-evaluate", "report")
    ]
    finals = {run.steps[step].pointer.model_id for step in reasons}
    for order in (names, names[::-1]):  # as a listing has them
        assert gc._needed(root, run.run, order, given_up=False, rehearsed=False).keys() == finals
    assert collect(experiment) == 5
    assert {
        step for step, record in run.steps.items() if fetchable(record, tmp_path)
    } == reasons.keys()
    # scores and items stay
    assert fetchable(store.committed(root, run.run, "evaluate-2"), tmp_path)
    # records are all there
    assert collect(experiment) == 0 and going(experiment) == [] and listing(root) == before
    client = MlflowClient()
    tags = {
        step: client.get_logged_model(record.pointer.model_id).tags
        for step, record in run.steps.items()
    }
    assert sorted(step for step in tags if gc.DELETED in tags[step]) == INTERMEDIATE
    client.delete_model_version(experiment, "1")
    assert kept(experiment)["recover-1"] == "final checkpoint of its run"


def test_of_a_finished_rehearsal_nothing_stays(experiment, monkeypatch):
    run = Loop(f"{experiment}-rehearsal", monkeypatch)
    dense = run.imported()
    run_page.describe(run.step_run("import-model"), {"name": "tiny-rehearsal"})
    pruned = run.work("prune-1", dense)
    assert going(run.experiment) == [] and set(kept(run.experiment).values()) == {UNFINISHED}
    run.end(pruned)
    assert going(run.experiment) == ["import-model", "prune-1"]
    # An experiment with such a name may have other runs.
    other = Loop(run.experiment, monkeypatch)
    other.end(other.imported())
    assert kept(run.experiment) == {"import-model": "final checkpoint of its run"}


def test_exports_stay_unless_a_run_is_given_up_and_only_a_report_finishes_it(experiment, loop):
    run = loop()
    dense = run.imported()
    run.work("export-gguf-q8-0", dense, lambda _: export(100, 9, 0.5))
    run.work("prune-1", dense)
    run.end()  # somebody set the run to FINISHED in MLflow, which keeps no report of it
    assert going(experiment) == [] and set(kept(experiment).values()) == {UNFINISHED}
    assert going(experiment, runs=[run.run]) == ["export-gguf-q8-0", "import-model", "prune-1"]
    assert going(experiment, days=2, runs=[run.run]) == []
    run.end(dense)
    assert going(experiment) == ["prune-1"]
    assert kept(experiment, runs=[run.run])["export-gguf-q8-0"] == "an export of its run"


@pytest.mark.parametrize(
    "experiment", ["local", pytest.param("served", marks=pytest.mark.nightly)], indirect=True
)
def test_attempts_that_died_and_a_run_that_goes_on(experiment, loop, tmp_path, monkeypatch):
    kill = mock.Mock(side_effect=KeyboardInterrupt)  # nothing that would handle an error runs
    run = loop()
    dense = run.imported()
    cut = run.work("prune-1", dense)
    with monkeypatch.context() as killing, pytest.raises(KeyboardInterrupt):
        killing.setattr(store, "dump_files", kill)
        run.work("recover-1", cut)
    step, folder = run.step_run("recover-1"), tmp_path / "checkpoint-4"
    checkpoints = training_checkpoints.TrainingCheckpoints(
        step.root, run.run, "recover-1.0", "key", 0
    )
    folder.mkdir()
    (folder / COMPLETE).write_text("4")
    checkpoints.save(folder)
    # killed before its record
    store.publish(folder, f"{step.root}/{run.run}/recover-1.0.training-2-{'a' * 12}")

    assert going(experiment) == []  # all of this may be resumed, or be at work
    checkpoints.restore(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere/checkpoint-4" / COMPLETE).read_text() == "4"
    resumed = run.work("recover-1", cut)  # killed before it could clear its training checkpoints
    run.evaluate("evaluate-1", resumed, dense, True)
    run.end(resumed)
    assert going(experiment) == ["import-model", "prune-1", "recover-1", "recover-1"]
    assert collect(experiment) == 4 and fetchable(resumed, tmp_path)
    assert checkpoints.records() == [] and not [
        path for path, _ in listing(step.root) if "training" in path
    ]


def test_what_keeps_the_files_of_a_finished_run(experiment, finished_run):
    # Files of others, and drafts of a killed writer, change nothing.
    root, run, client = f"{inventory(experiment).location}/ptl", finished_run.run, MlflowClient()
    for name in (".DS_Store", f"{run}/.parent-1.claim.{'a' * 32}", f"{run}/.hidden/file"):
        store._backend(root).put_once(f"{root}/{name}", b"x")
    assert going(experiment) == INTERMEDIATE
    # A version that somebody registered by its folder.
    (pruned,) = [stored for stored in inventory(experiment).stored if stored.step == "prune-1"]
    client.create_model_version(experiment, pruned.uris[0].removeprefix("file://"))
    assert going(experiment) == [step for step in INTERMEDIATE if step != "prune-1"]
    # What the report names, though an evaluation was lost.
    client.delete_model_version(experiment, "1")
    for step in ("evaluate-1", "evaluate-2"):
        store.delete(f"{root}/{run}/{step}", below=root)
    assert kept(experiment)["recover-1"] == "final checkpoint of its run"
    # A record that cannot be read: all but the one that is registered.
    store.delete(f"{root}/{run}/prune-2", below=root)
    store._backend(root).put_once(f"{root}/{run}/prune-2/manifest.json", b'{"format": 1}')
    reasons = kept(experiment).values()
    assert going(experiment) == []
    assert sum("a record of the run cannot be read" in reason for reason in reasons) == 6


def test_runs_that_are_named_and_experiments_that_share_their_place(
    finished_run, monkeypatch, tmp_path
):
    """All of `ptl run` without a server share one; a run is judged where MLflow knows it, also when it is named."""
    experiment, run = finished_run.experiment, Loop(finished_run.experiment, monkeypatch)
    pruned = run.work("prune-1", run.imported())
    other = Loop(f"{experiment}-other", monkeypatch)
    other.end(other.imported())
    assert {files.run for files in inventory(other.experiment).stored} == {other.run}
    assert gc.inventory([experiment], [other.run], 0) == []
    assert going(experiment) == going(experiment, runs=[finished_run.run]) == INTERMEDIATE
    assert going(experiment, runs=[run.run]) == ["import-model", "prune-1"]
    assert collect(experiment, runs=[run.run]) == 2 and not fetchable(pruned, tmp_path)


def test_a_forged_record_deletes_nothing_of_others(experiment, loop, tmp_path):
    """Records of a finished run that name files outside of the experiment, of other runs, and of none."""
    victim, forger = loop(), loop()
    final = victim.work("import-model")  # of a run that is under way
    location = inventory(experiment).location
    secrets = tmp_path / "secrets"
    (secrets / "artifacts").mkdir(parents=True)
    (secrets / "artifacts/key").write_text("x")
    (Path(location.removeprefix("file://")) / "models/linked").symlink_to(secrets)
    linked = f"{location}/models/linked/artifacts"
    attacks = [
        f"file://{secrets}",
        f"{location}/../{os.path.relpath(secrets, location.removeprefix('file://'))}",
        f"{location}/models/%2e%2e/artifacts",
        linked,
        location,
        f"{location}/ptl",
        final.pointer.uri,
    ]
    # Whoever writes to MLflow may name such folders as models too.
    step, client = forger.step_run("evaluate-1"), MlflowClient()
    for number, uri in enumerate(attacks):
        record = Record(
            "k", Pointer(uri, "sha256:" + "0" * 64), {"stage": "prune", "iteration": number}
        )
        store.commit(step.root, forger.run, f"prune-{number}", record)
        model = client.create_logged_model(
            step.experiment_id, tags={"ptl.run": forger.run, "ptl.step": "forged"}
        )
        with sqlite3.connect(client.tracking_uri.removeprefix("sqlite:///")) as database:
            statement = "update logged_models set artifact_location = ? where model_id = ?"
            database.execute(statement, (uri, model.model_id))
    forger.evaluate("evaluate-1", forger.work("import-model"), final, True)
    forger.end(final)
    before = set(tmp_path.rglob("*"))
    forged = [files for files in inventory(experiment).stored if files.step == "forged"]
    # a symlink is seen only when it is to be deleted
    assert {files.uris[0] for files in forged} <= {linked}
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
    detours = ("/models/../models/", "//models/", "/models/%61/../", "/m%6fdels/", "/models/./")
    for uri in (
        *(location.replace("/models/", detour) for detour in detours),
        *(f"{location}/", place.root, f"{place.root}-other/a", f"{location}?versionId=1"),
        *(f"file://{folder}", str(folder), "s3://other/models/a/artifacts"),
    ):
        with pytest.raises(WorkError, match="is not a plain folder below"):
            store.delete(uri, below=place.root)
    assert fetchable(Record("k", pointer), tmp_path) and (folder / "config.json").is_file()
    store.delete(location, below=place.root)
    assert listing(place.root) == []


def test_a_run_that_is_at_work_is_not_collected(tmp_path):
    lock = tmp_path / "runs" / "tiny-1" / "lock"
    refused = pytest.raises(InputError, match=r"run tiny-1.*end it first")
    with processes.exclusive(lock, "run tiny-1"), ExitStack() as stack, refused:
        results._hold(stack, tmp_path, {"tiny-1", "another-run"})


def test_command(finished_run):
    def gc(*arguments):
        return CliRunner().invoke(app, ["gc", *arguments], catch_exceptions=False).output

    experiment, held = ["--experiment", finished_run.experiment], inventory(finished_run.experiment)
    before, goes = (
        listing(held.location),
        sum(stored.bytes for stored in held.stored if not stored.needed),
    )
    assert "can go: 0 items, 0 B (0 bytes)" in gc(*experiment)
    dry = gc(*experiment, "--older-than", "0")
    assert f"can go: 5 items, {size(goes)} ({goes:,} bytes); nothing was deleted" in dry
    assert f"registered: {finished_run.experiment} 1" in dry and listing(held.location) == before
    result = CliRunner().invoke(
        app, ["gc", *experiment, "--older-than", "0", "--json"], catch_exceptions=False
    )
    document = json.loads(result.stdout)
    going_files = [files for files in document["experiments"][0]["stored"] if not files["needed"]]
    assert (document["deleted"], document["bytes"], len(going_files)) == (False, goes, 5)
    assert f"deleted: 5 items, {size(goes)} ({goes:,} bytes)" in gc(
        *experiment, "--older-than", "0", "--delete"
    )
    after = listing(held.location)
    assert (
        set(after) < set(before)
        and sum(size for _, size in before) - sum(size for _, size in after) == goes
    )


def test_in_a_copy_of_a_folder_of_runs_nothing_is_deleted(new_database, monkeypatch, tmp_path):
    def use(home):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
        monkeypatch.setenv("PTL_ARTIFACT_ROOT", f"file://{home}/artifacts")
        monkeypatch.setenv("PTL_SCRATCH", f"{home}/scratch")

    original, copy = tmp_path / "original", tmp_path / "copy"
    original.mkdir()
    new_database(original)
    use(original)
    Loop("copied", monkeypatch).whole()
    shutil.copytree(original, copy)
    before = listing(f"file://{original}/artifacts")
    use(copy)
    for options in ([], ["--delete"]):
        result = CliRunner().invoke(app, ["gc", "--home", str(copy), "--older-than", "0", *options])
        assert f"--home: {copy} was moved or copied" in str(result.exception) and result.exit_code
        assert listing(f"file://{original}/artifacts") == before
    use(original)
    assert going("copied") == INTERMEDIATE
