"""`ptl run --rehearse`: the steps of a run with little to do, and the command says what that shows."""

import json
import re

import pytest
import whole_run
from chats import tokenizer_with
from checkout import EXAMPLE
from tiny_models import build, save
from typer.testing import CliRunner

from ptl.cli import app, run

GRPO = "{method: grpo, steps: 8, max_completion_length: 120, rewards: [{name: final_answer}], dtype: bfloat16}"
SETTINGS = [
    "schedule.iterations=1",
    "evaluate.speed.repeats=0",
    f"recover=[{{method: cpt, max_length: 256}}, {GRPO}]",
]
OPTIONS = ["--rehearse", *(word for setting in SETTINGS for word in ("--set", setting))]


def check_printed(output):
    """Before the run, what is smaller; after it, what it has shown, and what comes next."""
    assert re.search(r"schedule\.recovery_tokens +│ +480,000 │ +4,800 ", output)
    assert "Not rehearsed: recover.dtype=bfloat16." in output
    assert "  ptl submit tiny-gate --set schedule.iterations=1 " in output


@pytest.mark.nightly
def test_a_run_with_gate_and_reinforcement_learning_is_rehearsed(tmp_path):
    check_printed(whole_run.finish(whole_run.start("tiny-gate", tmp_path, *OPTIONS)))
    result = json.loads((tmp_path / "latest/result.json").read_text())
    assert result["name"] == "tiny-gate-rehearsal" and result["not_needed"] == []
    assert [row["verdict"] for row in result["rows"]] == ["baseline", "accepted"]
    assert result["rows"][0]["items"] == 8


@pytest.mark.nightly
@pytest.mark.parametrize("thinks", [True, False])
def test_what_init_writes_for_a_small_qwen3_is_rehearsed_in_both_modes(thinks, ptl, tmp_path):
    """By the template that it is published with; its random weights end few answers, which is said before any cut."""
    tokenizer = tokenizer_with("qwen3")
    ids = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "max_position_embeddings": 512,
    }
    model = build("qwen3", **ids)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 0]
    tokenizer.save_pretrained(save(model, tmp_path / "model", tokenizer=False))
    config, data, task = (
        tmp_path / "mine.yaml",
        EXAMPLE / "train.jsonl.gz",
        EXAMPLE / "tiny_reasoner.yaml",
    )
    code, said = ptl(
        "init", tmp_path / "model", "--data", data, "--task", task, "--gpu", "none", "-o", config
    )
    assert code == 0, said
    mode = f"chat.template_kwargs={{enable_thinking: {str(thinks).lower()}}}"
    output = whole_run.finish(
        whole_run.start(config, tmp_path / "home", "--rehearse", "--set", mode)
    )
    assert (
        output.index("hit the token limit")
        < output.index("answers: done in")
        < output.index("prune-1: started")
    )
    result = json.loads((tmp_path / "home/latest/result.json").read_text())
    assert result["settings"]["chat"]["template_kwargs"] == {"enable_thinking": thinks}
    assert [row["iteration"] for row in result["rows"]] == [0, 1, 2, 3, 4, 1]


@pytest.mark.parametrize("skipped", [[], ["prune-4"]])
def test_the_rehearsal_is_what_is_compiled_and_executed(
    skipped, new_database, tmp_path, monkeypatch
):
    jobs = []

    def execute(job, runner, directory, verbose):
        jobs.append(job)
        not_needed = [
            {"step": step, "iteration": 4, "reason": "target reached"} for step in skipped
        ]
        directory.result.write_text(json.dumps({"not_needed": not_needed}))

    monkeypatch.setattr(run, "_execute", execute)
    monkeypatch.setattr(run, "_print_end", lambda *_: None)
    home = new_database(tmp_path)
    done = CliRunner().invoke(app.app, ["run", "tiny-gate", "--home", str(home), *OPTIONS])
    assert done.exit_code == 0, done.output
    check_printed(done.stdout)
    assert ("Not rehearsed, because the loop had ended: prune-4." in done.stdout) == bool(skipped)
    (job,) = jobs
    assert (job.config.name, job.config.evaluate.tasks[0].limit) == ("tiny-gate-rehearsal", 8)
    assert "tiny-gate-rehearsal" in job.pipeline.read_text()


def test_a_rehearsal_is_submitted_with_what_only_the_cluster_has(monkeypatch):
    submitted = []
    monkeypatch.setattr(
        "pipelines.prune_tune_loop.submit.submit", lambda config, *_, **__: submitted.append(config)
    )
    done = CliRunner().invoke(app.app, ["submit", "paper-qwen2.5-math-7b-grpo", "--rehearse"])
    assert (
        done.exit_code == 0 and "When it has succeeded, submit without --rehearse." in done.output
    )
    (stage,) = submitted[0].recover
    # on eight GPUs
    assert (stage.sharding, stage.dtype, stage.batch_size) == ("fsdp", "bfloat16", 16)
