"""`ptl run --rehearse`: every step of a run works, in a minute, and the command says what that shows."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ptl.cli import app, run
from ptl.local.run_directory import RunDir
from ptl.log import table_text

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"
GRPO = "{method: grpo, steps: 8, max_completion_length: 120, rewards: [{name: final_answer}], dtype: bfloat16}"
SETTINGS = ["schedule.iterations=1", "evaluate.speed.repeats=0", f"recover=[{{method: cpt, max_length: 256}}, {GRPO}]"]


@pytest.mark.slow
def test_a_run_with_gate_and_reinforcement_learning_is_rehearsed(tmp_path):
    config = "pipelines/prune_tune_loop/configs/tiny-gate.yaml"
    options = run._repeated(SETTINGS)
    command = [sys.executable, "-m", "ptl", "run", config, "--rehearse", "--home", str(tmp_path), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    # Before the run, what is smaller; after it, what it has shown.
    assert re.search(r"schedule\.recovery_tokens +│ +480,000 │ +4,800 ", done.stdout)
    assert "Not rehearsed: recover.dtype=bfloat16." in done.stdout
    assert "ptl submit pipelines/prune_tune_loop/configs/tiny-gate.yaml --set schedule.iterations=1" in done.stdout
    result = json.loads((tmp_path / "latest/result.json").read_text())
    assert result["name"] == "tiny-gate-rehearsal" and result["not_needed"] == []
    assert [row["verdict"] for row in result["rows"]] == ["baseline", "accepted"]
    assert result["rows"][0]["items"] == 8


def test_a_rehearsal_is_submitted_with_what_only_the_cluster_has(monkeypatch):
    submitted = []
    monkeypatch.setattr("pipelines.prune_tune_loop.submit.submit", lambda config, *_, **__: submitted.append(config))
    config = str(ROOT / "pipelines/prune_tune_loop/configs/qwen2.5-7b-grpo.yaml")
    done = CliRunner().invoke(app.app, ["submit", config, "--rehearse"])
    assert done.exit_code == 0 and "When it has succeeded, submit without --rehearse." in done.output
    (stage,) = submitted[0].recover
    assert (stage.sharding, stage.dtype, stage.batch_size) == ("fsdp", "bfloat16", 16)  # on eight GPUs


def test_cells_are_shown_as_they_are():
    shown = table_text("mine", ["Field", "Run"], [["storage.experiment", "[b]mine[/b] [/]"]], numbers=("Run",))
    assert " [b]mine[/b] [/] " in shown


def test_steps_without_work_are_named(tmp_path, capsys):
    skipped = [{"step": "prune-4", "iteration": 4, "reason": "target reached"}]
    (tmp_path / "result.json").write_text(json.dumps({"not_needed": skipped}))
    run._conclude(RunDir(tmp_path, tmp_path), [], ["config.yaml", "--set", "seed=2"])
    printed = capsys.readouterr().out
    assert "Not rehearsed, because the loop had ended: prune-4." in printed
    assert "  ptl submit config.yaml --set seed=2\n" in printed
