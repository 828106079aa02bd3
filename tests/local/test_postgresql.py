"""MLflow over PostgreSQL, as on a cluster."""

import os
import pwd
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from conftest import free_port

from ptl.lineage import tracking
from ptl.local import servers

pytestmark = pytest.mark.nightly


@pytest.fixture
def database():
    """A PostgreSQL server of its own; initdb refuses root, so root becomes `nobody`."""
    found = [*sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres")), shutil.which("postgres")]
    if found == [None]:
        pytest.skip("skipped: no PostgreSQL here; apt-get install postgresql")
    bins = Path(found[0]).parent
    # pytest's own folders are closed to other users
    folder = Path("/tmp") / f"ptl-pg-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    user = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    init = [bins / "initdb", "-D", folder / "data", "-U", "ptl", "--auth=trust", "--no-sync"]
    subprocess.run(init, check=True, capture_output=True, cwd=folder, **user)
    address = ["-h", "127.0.0.1", "-p", str(port := free_port())]
    command = [bins / "postgres", "-D", folder / "data", *address, "-k", folder, "-c", "fsync=off"]
    process = subprocess.Popen(command, cwd=folder, **user)
    try:
        while subprocess.run([bins / "pg_isready", *address], capture_output=True).returncode:
            assert process.poll() is None
            time.sleep(0.1)
        yield f"postgresql+psycopg://ptl@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(folder)


def test_a_step_is_tracked_on_postgresql(database, server, tmp_path, monkeypatch):
    port = free_port()
    environment = server | {"MLFLOW_TRACKING_URI": servers.address(port), "PTL_RUN_ID": "run"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    servers.mlflow_up(tmp_path, port, database, f"s3://{servers.BUCKET}/postgres", server)
    try:
        step = tracking.start("on-postgres", "import-model", arm="loop", iteration=0)
        tracking.finish(
            step, params={"seed": 1}, metrics={"loss": 0.5}, inputs=[], output=None, step=0
        )
        assert tracking.start("on-postgres", "import-model", arm="loop", iteration=0) == step
    finally:
        servers.down(tmp_path)
