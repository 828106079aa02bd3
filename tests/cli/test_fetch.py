"""`ptl fetch` and `ptl compare` by what a user names, on the runs of a real MLflow and a real store."""

import json
import os
import shutil
import uuid
from pathlib import Path
from types import SimpleNamespace

import boto3
import golden_messages
import pytest
import run_records
from mlflow import MlflowClient
from mlflow.store.artifact import s3_artifact_repo
from typer.testing import CliRunner

from ptl import __version__
from ptl.cli.app import app
from ptl.errors import InputError, WorkError
from ptl.lineage import locate, mlflow_objects, tracking
from ptl.model.checkpoint import STATE
from ptl.report.build import build
from ptl.storage import store
from ptl.storage.local_files import path_of
from ptl.storage.manifest import digest_of
from ptl.storage.s3 import SETTINGS
from ptl.storage.store import Pointer

pytestmark = pytest.mark.xdist_group("fetch")  # the runs are made once
STEPS = ("import-model", "recover-1", "recover-2", "control-recover")
# Of these scores, as `ptl compare` prints them.
SCORES = {"evaluate-0": 10, "evaluate-2": 9}
COMPARED = "│ 100.0% │ 1 │ -10.0 │ 0.5 │ unclear │ │ 10 │ 90.0% │ 0 │ (-30.0 to"
LENGTHS = "│ t │ 7.0 │ 7 │ 0.0% │ 1 │ │ │ │ 7.0 │ 7 │ 0.0% │"


def ptl(*arguments):
    """The output of a command that succeeds, as one line; its errors are raised."""
    done = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return " ".join(done.stdout.split())


def made(folder, *, root=None, experiment="e", done=True):
    """A run as the pipeline leaves it: checkpoints of some bytes, two evaluations, versions with aliases, a report.

    Without the latter two where it is not `done`.
    """
    run, name = f"run-{uuid.uuid4().hex[:8]}", f"tiny-{uuid.uuid4().hex[:6]}"
    directory, pointers, ids = folder / run, {}, {}

    def start(step):
        started = tracking.start(experiment, step, arm="loop", iteration=0, artifact_location=root)
        ids[step] = started.run_id
        return started

    def finish(started, output=None):
        tracking.finish(started, params={}, metrics={}, inputs=[], output=output, step=0)

    def publish(step, files, params=0):
        started = start(step)
        (directory / step).mkdir(parents=True)
        for path, data in files.items():
            (directory / step / path).write_bytes(data)
        model, location = "", f"{started.artifact_uri}/{step}"
        if params:
            model, location = tracking.new_model(started, step, {"params": params}, {})
        digest = digest_of(store.publish(directory / step, location))
        pointers[step] = Pointer(location, digest, params, run_id=started.run_id, model_id=model)
        stage = "recover" if params else "answers" if step == "answers" else "evaluate"
        store.commit(started.root, run, step, store.Record("k", pointers[step], {"stage": stage}))
        finish(started, model or None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTL_RUN_ID", run)
        for i, step in enumerate(STEPS):
            files = {
                "config.json": b"{}",
                "model.safetensors": os.urandom(5000 + i),
                STATE: b"state",
            }
            files["README.md"] = b"of the model that the run began with"
            publish(step, files, params=100 - i)
        publish("answers", {"answers.jsonl": b""})
        for step, right in SCORES.items():
            publish(step, {"items.jsonl": items(right)})
        if done:
            scored = start("evaluate-1")
            for step, alias in (("recover-1", "best"), ("recover-2", "smallest")):
                version = mlflow_objects.register(scored, name, pointers[step], {})
                mlflow_objects.set_alias(name, alias, version)
            report = start("report")
            (directory / "result.json").write_text(json.dumps(result_of(run, pointers)))
            (directory / "README.md").write_text("the card")
            tracking.log_report(report, [directory / "result.json", directory / "README.md"])
            finish(report)
        else:
            tracking.fail(start("recover-3"), "out of memory")
    parent = report.parent_run_id if done else ""
    return SimpleNamespace(
        id=run, name=name, pointers=pointers, ids=ids, parent=parent, directory=directory
    )


def result_of(run, pointers):
    result = build(run_records.records(), run_records.settings(), run_id=run).model_dump(
        mode="json"
    )
    row = result["rows"][0] | {"accuracy": 0.9, "params": 98, "iteration": 0}
    scored = {
        "evaluate-0": "import-model",
        "evaluate-2": "recover-2",
        "control-evaluate": "control-recover",
    }
    rows = []
    for step, model in scored.items():
        arm = "control" if "control" in step else "loop"
        rows.append(
            row
            | {
                "arm": arm,
                "step": step,
                "digest": pointers[model].digest,
                "uri": pointers[model].uri,
            }
        )
    last = pointers["recover-2"]
    final = result["final"] | {"uri": last.uri, "digest": last.digest, "params": last.params}
    return result | {"rows": rows, "final": final}


def items(right):
    answer = {"task": "t", "tokens": 7, "truncated": False}
    lines = [
        answer | {"id": str(i), "prompt_digest": str(i), "correct": int(i < right)}
        for i in range(10)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.fixture(scope="module")
def home(new_database, tmp_path_factory):
    """A --home with a finished run, `run`, and one that failed, `failed`, in another experiment."""
    folder = new_database(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        failed = made(folder, root=f"file://{folder}/another", experiment="another", done=False)
        run = made(folder, root=f"file://{folder}/artifacts")
        MlflowClient().update_run(run.parent, name=f"named-{run.id}")
    return SimpleNamespace(folder=folder, run=run, failed=failed)


@pytest.fixture
def here(home, monkeypatch, tmp_path):
    """The finished run, with the address of its MLflow, in an empty working directory."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home.folder}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    return home.run


def holds(folder, source):
    """Whether the folder holds the files of that checkpoint; what else is in it."""
    names = {path.name for path in Path(folder).iterdir()}
    same = (Path(folder) / "model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()
    return same, sorted(names - {"config.json", "model.safetensors"})


def test_fetch_by_name(here, monkeypatch):
    for name, step in {
        "{id}": "recover-2",
        "{parent}:recover-1": "recover-1",
        "named-{id}": "recover-2",
        "models:/{name}@best": "recover-1",
        "models:/{name}@smallest": "recover-2",
        "models:/{name}/1": "recover-1",
        "{directory}": "recover-2",
    }.items():
        card = step == "recover-2"  # which is about the final checkpoint
        said = ptl("fetch", name.format(**vars(here)), "out")
        assert holds("out", here.directory / step) == (True, ["README.md"] * card), name
        assert not card or Path("out/README.md").read_text() == "the card"
        assert (
            f"{here.pointers[step].params} parameters" in said
            and ("without a model card" in said) != card
        )
        assert not Path("out.partial").exists()
        shutil.rmtree("out")
    ptl("fetch", here.id, "control", "--arm", "control")
    assert holds("control", here.directory / "control-recover") == (True, [])
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # a folder of the store needs none
    Path("empty").mkdir()
    ptl("fetch", here.pointers["recover-1"].uri + "/", "empty")
    assert holds("empty", here.directory / "recover-1") == (True, [])


def test_messages(here, home):
    """Of what is not there they name what is; nothing is written."""
    Path("full").mkdir()
    Path("full/mine").touch()
    Path("list.json").write_text("[1]")
    result = json.loads((here.directory / "result.json").read_text())
    Path("without-control").mkdir()
    Path("without-control/result.json").write_text(
        json.dumps(result | {"rows": result["rows"][:2]})
    )
    del result["rows"][0]["scores"]
    Path("older.json").write_text(json.dumps(result))
    # A registered model whose version ptl did not make.
    others = f"others-{uuid.uuid4().hex[:6]}"
    MlflowClient().create_registered_model(others)
    MlflowClient().create_model_version(others, here.pointers["recover-1"].uri)
    names = {name: vars(here)[name] for name in ("directory", "id", "name")}
    names |= {
        "failed": home.failed.id,
        "others": others,
        "folder": Path.cwd(),
        "version": __version__,
    }

    def message(*words):
        with pytest.raises((InputError, WorkError)) as error:
            ptl(*words)
        return str(error.value)

    before = sorted(Path().iterdir())
    golden_messages.check("fetch.txt", message, **names)
    assert sorted(Path().iterdir()) == before


def test_a_run_without_a_result_has_steps_all_the_same(here, home, monkeypatch):
    """In whichever experiment it is, of the runs in --home."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    ptl("fetch", f"{home.failed.id}:recover-2", "out", "--home", home.folder)
    assert holds("out", home.failed.directory / "recover-2") == (True, [])


def test_a_failure_leaves_nothing(here, monkeypatch):
    def full(source, target, **_):
        Path(target).mkdir(exist_ok=True)
        Path(target, "config.json").touch()
        raise OSError(28, "No space left on device")

    shutil.copytree(path_of(here.pointers["recover-2"].uri), "damaged")
    Path("damaged/model.safetensors").write_bytes(b"other")
    with pytest.raises(WorkError, match=r"model.safetensors has 5 bytes"):
        ptl("fetch", Path("damaged").absolute().as_uri(), "out")
    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(WorkError, match="no space left"):
        ptl("fetch", here.id, "out")
    assert not Path("out").exists() and not Path("out.partial").exists()


def test_report_from_a_run_and_a_directory(here, monkeypatch):
    pages = []
    monkeypatch.setattr(
        "ptl.report.render.render", lambda result, out: pages.append((result.run_id, out))
    )
    for source in (here.id, here.directory, here.directory / "result.json"):
        assert "wrote pages/report.html" in ptl("fetch", source, "pages", "--report")
    assert pages == [(here.id, Path("pages"))] * 3


def test_compare_by_name_and_of_a_checkpoint_that_was_scored_twice_by_the_last_time(here):
    first = [here.directory / "evaluate-0", f"{here.id}:evaluate-0", here.ids["evaluate-0"]]
    last = [here.directory / "evaluate-2/items.jsonl", here.parent, here.directory]
    for reference, candidate in zip(first, last, strict=True):
        printed = ptl("compare", reference, candidate)
        assert COMPARED in printed and LENGTHS in printed
    document = json.loads(ptl("compare", here.directory / "evaluate-0", here.directory, "--json"))
    assert document["tasks"]["t"]["verdict"] == "unclear" and document["tasks"]["t"]["items"] == 10
    rows = [
        {"arm": arm, "step": step, "digest": "d"}
        for arm, step in (("loop", "evaluate-1"), ("loop", "evaluate-2"))
    ]
    rows.append({"arm": "control", "step": "control-evaluate", "digest": "d"})
    assert locate._final_evaluation({"rows": rows, "final": {"digest": "d"}}, "run") == "evaluate-2"


def test_the_directory_of_a_run_leads_to_the_mlflow_of_its_home(here, monkeypatch, tmp_path):
    """As .ptl/latest does, from any working directory."""
    home = tmp_path / ".ptl"
    shutil.copytree(here.directory, home / "runs" / here.id)
    (home / "latest").symlink_to(f"runs/{here.id}")
    shutil.copyfile(
        os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///"), home / "mlflow.db"
    )
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "unclear" in ptl(
        "compare", f"{home}/latest:evaluate-0", home / "latest", "--home", tmp_path / "none"
    )
    (home / "latest" / "result.json").unlink()
    (home / "latest" / "config.yaml").touch()  # all that a run without a result has
    ptl("fetch", f"{home}/latest:recover-1", "out", "--home", tmp_path / "none")
    ptl("fetch", home / "latest", "final", "--home", tmp_path / "none")
    assert (
        holds("out", here.directory / "recover-1")[0]
        and holds("final", here.directory / "recover-2")[0]
    )


def reach(env, patch):
    """The environment of the servers and nothing of another one."""
    for name in (*SETTINGS, "MLFLOW_TRACKING_URI"):
        patch.delenv(name, raising=False)
    for name, value in env.items():
        patch.setenv(name, value)
    # MLflow keeps its S3 client and boto3 its session, whatever the keys in the environment become.
    patch.setattr(boto3, "DEFAULT_SESSION", None)
    s3_artifact_repo._cached_get_s3_client.cache_clear()


def test_fetch_and_compare_from_a_laptop(request, shared, stack, monkeypatch, tmp_path):
    """With both addresses and the keys in the environment, or with the folder of `ptl up`; the servers are real."""
    request.addfinalizer(lambda: reach({}, monkeypatch))
    monkeypatch.chdir(tmp_path)
    reach(stack, monkeypatch)
    run = made(tmp_path, experiment="cluster")
    assert run.pointers["recover-2"].uri.startswith("s3://")
    names = {
        run.id: "recover-2",
        f"models:/{run.name}@best": "recover-1",
        run.pointers["recover-1"].uri: "recover-1",
    }
    for i, (what, step) in enumerate(names.items()):
        ptl("fetch", what, f"out-{i}")
        assert holds(f"out-{i}", run.directory / step) == (
            True,
            ["README.md"] * (step == "recover-2"),
        ), what
    assert COMPARED in ptl("compare", f"{run.id}:evaluate-0", run.id)
    reach({}, monkeypatch)
    ptl("fetch", run.id, "out", "--s3", "--home", shared)
    assert holds("out", run.directory / "recover-2")[0]
    reach(stack | {"AWS_SECRET_ACCESS_KEY": "wrong"}, monkeypatch)
    for what in names:
        with pytest.raises(InputError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            ptl("fetch", what, "none")
