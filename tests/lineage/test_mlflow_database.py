"""The database is there complete or not at all. MLflow's seconds are mocked by a sleep between two tables."""

import os
import sqlite3
import subprocess
import sys
import time

import pytest
from checkout import ROOT

from ptl.errors import WorkError
from ptl.lineage import mlflow_client

HALF = "import sqlite3, sys, time; db = sqlite3.connect(sys.argv[1].removeprefix('sqlite:///')); "
HALF += "db.execute('create table one (x)'); db.commit(); time.sleep(%g); db.execute('create table two (x)')"
CREATES = (
    "import sys; from ptl.lineage import mlflow_client; mlflow_client.DATABASE_CODE = sys.argv[2]; "
)
CREATES += "mlflow_client.create_database(sys.argv[1], 'file:///nowhere')"


def tables(path):
    return {name for (name,) in sqlite3.connect(path).execute("select name from sqlite_master")}


def test_a_kill_while_it_is_made_leaves_none_and_the_next_command_makes_it(tmp_path, monkeypatch):
    path, draft = tmp_path / "mlflow.db", tmp_path / ".mlflow.db.new"
    command = [sys.executable, "-c", CREATES, f"sqlite:///{path}", HALF % 60]
    killed = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 30
    while not draft.is_file() or tables(draft) != {"one"}:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert not path.exists()
    monkeypatch.setattr(mlflow_client, "DATABASE_CODE", HALF % 0)
    mlflow_client.create_database(f"sqlite:///{path}", "file:///nowhere")
    assert tables(path) == {"one", "two"} and not draft.exists()


def test_what_is_there_and_other_databases_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_client, "DATABASE_CODE", "raise SystemExit('sqlite is too old')")
    (tmp_path / "mlflow.db").touch()
    for uri in (f"sqlite:///{tmp_path}/mlflow.db", "postgresql://host/name", "http://127.0.0.1:9"):
        mlflow_client.create_database(uri, "file:///nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    # MLflow's own error is shown, and every client makes it this way.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(WorkError, match=r"could not create its database .*:\nsqlite is too old"):
        mlflow_client.connect()
    assert not (tmp_path / "other.db").exists()


def test_a_database_that_is_damaged_or_none_of_mlflows(tmp_path, monkeypatch):
    path = tmp_path / "other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    sqlite3.connect(path).execute("create table runs (x)")
    for problem in ("no such column", "file is not a database"):
        said = pytest.raises(
            WorkError, match=rf"MLflow's database sqlite:///.*other\.db: .*{problem}"
        )
        with said, mlflow_client.connected() as client:
            mlflow_client.experiment_ids(client)
        path.write_text("no database " * 100)
