"""`ptl run` after a kill, with a data file that has changed meanwhile, and with a corrected config."""

import gzip
import json
import os
import shutil
import time

import pytest
import whole_run
import yaml

EXAMPLE = whole_run.ROOT / "examples/tiny_reasoner"


@pytest.fixture
def problem(config, tmp_path):
    """A short config with data files of its own: its path."""
    rows = gzip.decompress((EXAMPLE / "train.jsonl.gz").read_bytes()).decode().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[:2000]))
    (tmp_path / "other.jsonl").write_text("".join(rows[2000:4000]))
    shutil.copy(EXAMPLE / "test.jsonl", tmp_path)
    task = (EXAMPLE / "tiny_reasoner.yaml").read_text()
    (tmp_path / "task.yaml").write_text(task.replace("examples/tiny_reasoner/test.jsonl", f"{tmp_path}/test.jsonl"))
    raw = yaml.safe_load(config.read_text())
    raw["schedule"] |= {"recovery_tokens": 12_000}
    raw["training"]["sources"][0]["source"] = "train.jsonl"
    raw["evaluate"]["tasks"][0] |= {"name": "task.yaml", "limit": 16}
    raw["evaluate"]["speed"]["repeats"] = 0
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def run_until(step, path, home, before=b""):
    """Start the command, kill it when the step has a new record; returns that."""
    process = whole_run.start(path, home)
    while True:
        found = [manifest.read_bytes() for manifest in (home / "artifacts").glob(f"ptl/*/{step}/manifest.json")]
        if found and found[0] not in (before, b"{}"):
            process.kill()
            return found[0], process.communicate()[0]
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.slow
def test_a_changed_file_repeats_what_read_it_and_a_corrected_config_what_it_changes(problem, tmp_path):
    home, train, benchmark = tmp_path / "home", tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    scored, _ = run_until("evaluate-0", problem, home)

    # Other questions under the same ids; the training file is written again with the same bytes.
    benchmark.write_text("".join(reversed(benchmark.read_text().splitlines(keepends=True))))
    train.write_bytes(train.read_bytes())
    os.utime(train, (1, 1))
    trained, output = run_until("recover-1", problem, home)
    assert f"evaluate-0: {benchmark} has changed since it was done: it is done again" in output
    assert "import-model: done before" in output and str(train) not in output
    records = whole_run.records(home)
    assert json.loads(scored)["pointer"]["digest"] != records["evaluate-0"]["pointer"]["digest"]

    train.write_bytes((tmp_path / "other.jsonl").read_bytes())
    again, output = run_until("recover-1", problem, home, before=trained)
    assert f"recover-1: {train} has changed since it was done: it is done again" in output
    assert "evaluate-0: done before" in output and "prune-1: done before" in output
    assert json.loads(again)["pointer"]["digest"] != json.loads(trained)["pointer"]["digest"]

    # Another config of this name: a run of its own, which takes over what the change does not affect.
    earlier = (home / "latest").resolve().name
    raw = yaml.safe_load(problem.read_text())
    raw["gate"]["margin"] = 0.5
    problem.write_text(yaml.safe_dump(raw))
    os.utime(train, (2, 2))
    output = whole_run.finish(whole_run.start(problem, home))
    for step in ("evaluate-0", "prune-1", "recover-1"):
        assert f"{step}: taken over from run {earlier}" in output
    run = (home / "latest").resolve()
    assert run.name != earlier
    manifest = home / f"artifacts/ptl/{run.name}/recover-1/manifest.json"
    assert json.loads(manifest.read_bytes())["pointer"]["digest"] == json.loads(again)["pointer"]["digest"]
    assert json.loads((run / "result.json").read_text())["examples"]["compared"] == 16
