"""Recovery on an exact budget: optimizer state, learning rate, checkpoints, kills, processes, LoRA, chains, errors."""

import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from recovering import DATA, DENSE, ROOT, SHORT, SOURCE, cut, losses, recover, weights
from transformers import AutoTokenizer

from ptl.config.recover import RecoverStage, Recovery, TrainingData
from ptl.data.sequences import training_chunk
from ptl.errors import InputError, WorkError
from ptl.model import checkpoint
from ptl.recovery import sft, training
from ptl.recovery.job import RecoveryJob, StageBudget
from ptl.recovery.recover import RECOVERIES, budgets_before
from ptl.recovery.training import learning_rate_curve, optimizer_for
from ptl.storage.local_files import COMPLETE, last_complete

CPT = {"method": "cpt"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return cut(DENSE, tmp_path_factory.mktemp("cut"), 130_000)


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    """One uninterrupted recovery: folder, report, logs."""
    dst, log = tmp_path_factory.mktemp("straight") / "out", []
    return dst, recover(small, dst, CPT, log=log), log


def test_two_steps_move_the_weights_and_the_loss_is_finite(small, tmp_path):
    report = recover(small, tmp_path / "out", CPT, tokens=500, log=(log := []))
    before, after = weights(small), weights(tmp_path / "out")
    assert before.keys() == after.keys() and report.steps >= 2
    assert report.details["passes"] == report.details["sequences"] / 10_000  # rows
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(math.isfinite(loss) for _, loss in losses(log))


def test_sequences_that_were_cut_are_counted(small, tmp_path):
    report = recover(small, tmp_path / "out", CPT | {"max_length": 64}, tokens=500)
    assert 0 < report.details["cut_sequences"] <= report.details["sequences"]


def test_an_iteration_shorter_than_logging_steps_has_a_curve(small, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "logging_steps", lambda _: 100)
    report = recover(small, tmp_path / "out", CPT, tokens=500, log=(log := []))
    ((tokens, loss),) = losses(log)
    assert report.steps > 1 and tokens == 500 and 0 < loss < 10


def test_tokens_are_exact_and_counted_while_training(straight):
    _, report, log = straight
    assert report.tokens == 1500 and losses(log)[-1][0] == 1500
    seen = [tokens for tokens, _ in losses(log)]
    assert seen == sorted(seen) and len(seen) == report.steps == math.ceil(report.details["sequences"] / 4)


def test_the_first_step_is_reported_before_the_first_log(small, tmp_path, monkeypatch):
    """Ten steps of a large model are minutes."""
    monkeypatch.setattr(training, "logging_steps", lambda _: 100)
    log = []
    recover(small, tmp_path / "out", CPT, tokens=1500, log=log)
    start, first, *_ = [(step, metrics["progress"], metrics["num_input_tokens_seen"]) for step, metrics in log]
    assert start == (0, 0, 0)
    assert first[0] == 1 and 0 < first[1] < 1 and 0 < first[2] < 1500


def test_the_same_seed_gives_the_same_bytes(small, straight, tmp_path):
    recover(small, tmp_path / "out", CPT)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (straight[0] / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_loss_is_that_of_trl(small, straight, tmp_path, monkeypatch):
    """On a CPU the model's own loss is used in place of trl's fused one, for speed; the numbers are the same."""
    from trl import SFTTrainer

    monkeypatch.setattr(sft, "sft_trainer", lambda: SFTTrainer)
    for change in ({}, {"accumulation": 2}):
        recover(small, tmp_path / f"out{len(change)}", CPT | change, log=(log := []))
        mine = [loss for _, loss in losses(straight[2])]
        assert [loss for _, loss in losses(log)] == pytest.approx(mine, rel=1e-4)


def test_the_result_is_an_ordinary_checkpoint(small, straight):
    names = {path.name for path in straight[0].iterdir()}
    assert names == {path.name for path in small.iterdir()} | set()
    assert (straight[0] / "config.json").read_text() == (small / "config.json").read_text()


def stored_as(src, dst, dtype):
    """A copy of a checkpoint in another dtype, which its config names."""
    stored = getattr(torch, dtype)
    copy = damaged(src, dst, lambda named: {name: tensor.to(stored) for name, tensor in named.items()})
    config = json.loads((dst / "config.json").read_text())
    (dst / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    return copy


STORED = {
    "cpt-bfloat16": ("bfloat16", CPT),
    "cpt-float16": ("float16", CPT),
    "distil-bfloat16": ("bfloat16", {"method": "distil"}),
    "lora-float16": ("float16", CPT | {"lora": {"rank": 2}}),
}


@pytest.mark.parametrize("case", STORED)
@pytest.mark.slow
def test_weights_keep_the_dtype_that_the_config_names(small, tmp_path, case):
    """Training is in float32: its result differs from that of a float32 copy by the rounding of the last write only."""
    dtype, stage = STORED[case]
    half = stored_as(small, tmp_path / "half", dtype)
    full = stored_as(half, tmp_path / "full", "float32")
    for src, dst in ((half, "out"), (full, "reference")):
        recover(src, tmp_path / dst, stage | {"learning_rate": 1e-2}, tokens=150, teacher=DENSE)
    before, after, reference = (weights(folder) for folder in (half, tmp_path / "out", tmp_path / "reference"))
    assert {tensor.dtype for tensor in after.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert all(torch.equal(after[name], reference[name].to(after[name].dtype)) for name in after)


@pytest.mark.slow
@pytest.mark.parametrize("named", ["bfloat16", "float32", None])
def test_the_weights_dtype_counts_where_the_config_names_another(small, tmp_path, named):
    """As in prune; the defect: float32 weights were read and written in the bfloat16 of config.json."""
    src = stored_as(small, tmp_path / "src", "float32" if named == "bfloat16" else "float16")
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(config | {"dtype": named}))
    recover(src, tmp_path / "out", CPT, tokens=50)
    assert {each.dtype for each in weights(tmp_path / "out").values()} == {each.dtype for each in weights(src).values()}
    assert (tmp_path / "out/config.json").read_text() == (src / "config.json").read_text()


@pytest.mark.slow
def test_a_chain_keeps_the_dtype(small, tmp_path):
    half = stored_as(small, tmp_path / "half", "bfloat16")
    recover(half, tmp_path / "out", CPT | {"share": 0.5}, CPT, tokens=200)
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.slow
def test_packing_joins_sequences_and_keeps_the_count(small, tmp_path):
    report = recover(small, tmp_path / "out", CPT | {"packing": True, "loss": "all"}, log=(log := []))
    assert report.tokens == losses(log)[-1][0] == 1500
    assert report.steps == 4 < math.ceil(report.details["sequences"] / 4)  # 14 or so rows of 128 tokens, 4 to a step


@pytest.mark.slow
def test_the_optimizer_state_is_carried_through_pruning(tmp_path):
    """The optimizer state at the end of the first iteration is, sliced like the weights, that of the second's start."""
    first, second = tmp_path / "first", tmp_path / "second"
    recover(DENSE, first, CPT, tokens=600, last=False)
    before = dict(checkpoint.tensors(first / checkpoint.STATE))
    cut(first, second, 150_000)
    after = dict(checkpoint.tensors(second / checkpoint.STATE))
    old, new = weights(first), weights(second)
    name = "model.layers.0.mlp.gate_proj.weight"
    kept = [next(i for i, row in enumerate(old[name]) if torch.equal(row, wanted)) for wanted in new[name]]
    assert len(kept) < len(old[name]) and before["step"] == after["step"] > 0
    for kind in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[f"{kind}.{name}"], before[f"{kind}.{name}"][kept])
        assert torch.equal(after[f"{kind}.model.norm.weight"], before[f"{kind}.model.norm.weight"])
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(second).float()
    optimizer = optimizer_for(model, RecoverStage(), second / checkpoint.STATE)
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert torch.equal(state["exp_avg"], after[f"exp_avg.{name}"]) and state["step"] == before["step"]

    carried = recover(second, tmp_path / "carried", CPT, tokens=600, earlier=(600,))
    fresh = recover(second, tmp_path / "fresh", CPT | {"carry_moments": False}, tokens=600, earlier=(600,))
    assert carried.tokens == fresh.tokens == 600
    assert not torch.equal(weights(tmp_path / "carried")[name], weights(tmp_path / "fresh")[name])
    assert not (tmp_path / "carried" / checkpoint.STATE).exists()  # it was the last iteration


@pytest.mark.slow
def test_the_optimizer_state_is_written_only_where_it_is_continued(small, tmp_path):
    recover(small, tmp_path / "kept", CPT, tokens=300, last=False)
    recover(small, tmp_path / "switched-off", CPT | {"carry_moments": False}, tokens=300, last=False)
    assert (tmp_path / "kept" / checkpoint.STATE).is_file()
    assert not (tmp_path / "switched-off" / checkpoint.STATE).exists()


def curve(iteration=1, weights=(1,), *, carried=False, steps=100, **settings):
    budget = StageBudget(1, (), iteration, iteration == len(weights), 0, weights)
    factor = learning_rate_curve(RecoverStage(**settings), budget, steps, carried)
    return [factor(step) for step in range(steps)]


def test_the_learning_rate_decays_at_the_end_of_the_run():
    """One curve over all iterations, wherever they end: half of the recovery is in the last of these."""
    early, middle, final = (curve(i, (1, 2, 3), warmup_steps=10) for i in (1, 2, 3))
    assert early[10:] == middle[10:] == [1.0] * 90 and early[0] == pytest.approx(0.1)
    assert final[10] == 1.0 and final[55] == pytest.approx(0.5) and final[-1] < 0.001
    assert all(later <= earlier for earlier, later in itertools.pairwise(final[10:]))
    whole = curve(carried=True)
    assert whole[:51] == [1.0] * 51 and whole[75] == pytest.approx(0.5) and whole[-1] < 0.005
    parts = curve(1, (1, 1), carried=True, decay=1, steps=50) + curve(2, (1, 1), carried=True, decay=1, steps=50)
    assert parts == pytest.approx(curve(carried=True, decay=1))
    assert curve(decay=0, carried=True) == [1.0] * 100


def test_each_decays_every_time_and_a_carried_optimizer_state_needs_no_warm_up():
    assert curve(1, (1, 2), decay="each") == curve(2, (1, 2), decay="each") == curve(decay=1)
    assert curve(1, (1, 2), carried=True) == [1.0] * 100
    assert curve(2, (1, 2), carried=True)[0] == 1.0
    assert curve(1, (1, 2), warmup_steps=50, steps=10)[:5] == [pytest.approx((i + 1) / 5) for i in range(5)]


@pytest.mark.slow
def test_half_written_training_checkpoints_are_passed_over(small, straight, tmp_path):
    scratch = tmp_path / "training"
    for name, mark in (("checkpoint-2", True), ("checkpoint-10", True), ("checkpoint-99", False)):
        (scratch / name).mkdir(parents=True)
        if mark:
            (scratch / name / COMPLETE).touch()
    assert last_complete(scratch) == scratch / "checkpoint-10"
    shutil.rmtree(scratch)
    (scratch / "checkpoint-3").mkdir(parents=True)
    (scratch / "checkpoint-3/model.safetensors").write_bytes(b"half")
    report = recover(small, tmp_path / "out", CPT, scratch=scratch)
    assert report.resumed_at == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (straight[0] / "model.safetensors").read_bytes()


SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from recovering import recover
print(recover(Path({src!r}), Path({dst!r}), {{"method": {method!r}}}).resumed_at)
"""


def in_a_process(src, dst, method="cpt"):
    code = SCRIPT.format(tests=str(ROOT / "tests"), src=str(src), dst=str(dst), method=method)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_kill_in_mid_training_changes_nothing(small, straight, tmp_path):
    """kill -9 after the first training checkpoint; the second process resumes from there to the same bytes."""
    dst = tmp_path / "out"
    process = in_a_process(small, dst)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(f"out.training/checkpoint-*/{COMPLETE}")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (dst / "model.safetensors").exists()
    again = in_a_process(small, dst)
    output, _ = again.communicate(timeout=120)
    assert int(output.split()[-1]) >= 2
    assert (dst / "model.safetensors").read_bytes() == (straight[0] / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_lora_is_merged_into_an_ordinary_checkpoint(small, tmp_path):
    report = recover(small, tmp_path / "out", CPT | {"lora": {"rank": 4}, "learning_rate": 1e-2}, last=False)
    before, after = weights(small), weights(tmp_path / "out")
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in small.iterdir()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "proj" in name} and report.tokens == 1500
    for path in tmp_path.glob("out.training/checkpoint-*"):  # as if it had died after step 4
        if path.name != "checkpoint-4":
            shutil.rmtree(path)
    stage = CPT | {"lora": {"rank": 4}, "learning_rate": 1e-2}
    again = recover(small, tmp_path / "again", stage, last=False, scratch=tmp_path / "out.training")
    resumed = weights(tmp_path / "again")
    assert again.resumed_at == 4 and all(torch.equal(resumed[name], after[name]) for name in after)


@pytest.mark.slow
def test_lora_begins_with_what_the_seed_says(small, tmp_path):
    for name in ("first", "second"):
        torch.manual_seed(len(name))  # what ran before in this process
        recover(small, tmp_path / name, CPT | {"lora": {"rank": 2}}, tokens=150)
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_a_chain_leaves_nothing_of_its_own_in_the_checkpoint(small, tmp_path):
    stages = (CPT | {"share": 0.5}, CPT)
    for name in ("first", "second"):
        recover(small, tmp_path / name, *stages, tokens=200)
    assert {path.name for path in (tmp_path / "first").iterdir()} == {path.name for path in small.iterdir()}
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_a_chain_runs_its_stages_on_their_own_budgets(small, tmp_path):
    log = []
    stages = (CPT | {"share": 0.25}, CPT | {"learning_rate": 1e-4})
    report = recover(small, tmp_path / "out", *stages, tokens=1001, log=log)
    first, second = report.details["stages"]
    assert (first["tokens"], second["tokens"]) == (250, 751) and report.tokens == 1001
    assert report.method == "cpt+cpt" and report.steps == first["steps"] + second["steps"]
    assert losses(log) == sorted(losses(log), key=lambda point: point[0])
    assert losses(log)[-1][0] == 1001 and [step for step, _ in log] == sorted(step for step, _ in log)


@pytest.mark.slow
def test_a_chain_does_not_repeat_a_finished_stage(small, tmp_path, monkeypatch):
    stages = (CPT | {"share": 0.5}, CPT)
    recover(small, tmp_path / "whole", *stages, tokens=600)
    ran = []

    def dies(src, dst, settings, job):
        ran.append(job.scratch.name)
        if job.scratch.name.startswith("1-") and len(ran) == 2:
            raise KeyboardInterrupt
        return original(src, dst, settings, job)

    original = RECOVERIES["cpt"]
    monkeypatch.setitem(RECOVERIES, "cpt", dies)
    with pytest.raises(KeyboardInterrupt):
        recover(small, tmp_path / "out", *stages, tokens=600)
    recover(small, tmp_path / "out", *stages, tokens=600)
    assert ran == ["0-cpt", "1-cpt", "1-cpt"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_stage_without_a_token_is_refused_before_training(small, tmp_path):
    """As an iteration of a pipeline started with --param may have it, past the config's own check."""
    with pytest.raises(InputError, match="1 tokens for iteration 1 leave none for cpt"):
        recover(small, tmp_path / "out", {"method": "cpt"}, {"method": "distil"}, tokens=1)


@pytest.mark.parametrize("stage", [CPT, CPT | {"loss": "all"}, {"method": "distil"}], ids=["cpt", "all", "distil"])
@pytest.mark.slow
def test_a_sequence_of_one_token_alone_in_its_batch_is_no_error(small, tmp_path, stage):
    """It has nothing to be predicted from, so its loss is zero: the budget stays exact, the weights are numbers."""
    tokenizer = AutoTokenizer.from_pretrained(small)
    whole = training_chunk(DATA, tokenizer, SHORT["max_length"], seed=0, earlier=(), budget=2000)[1]
    budget = len(whole.ids) + 1
    report = recover(small, tmp_path / "out", stage | {"batch_size": 1}, tokens=budget, teacher=DENSE, log=(log := []))
    assert report.tokens == budget and report.steps == 2
    assert losses(log)[0] == (1, 0.0) and losses(log)[1][1] > 0
    assert all(bool(tensor.isfinite().all()) for tensor in weights(tmp_path / "out").values())


def test_a_budget_of_one_token_is_refused(small, tmp_path):
    with pytest.raises(InputError, match="1 tokens for iteration 1 leave 1 for cpt, which needs 2"):
        recover(small, tmp_path / "out", CPT, tokens=1)


def test_budgets_add_up_and_follow_each_other():
    chain = Recovery(stages=[{"share": 0.3}, {"method": "grpo"}, {"method": "distil"}])
    assert chain.budgets(1001) == (300, None, 701)
    assert budgets_before(chain, [10, 100], 2) == (3, 7, 30)
    assert Recovery(stages=[{}, {}, {}]).budgets(100) == (33, 34, 33)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"share": 0.6}, {"share": 0.6}], "add up to 1.2"),
        ([{"share": 0.6}], "must add up to 1"),
        ([{"share": 1.0}, {}], "leaves nothing"),
        ([{"method": "magic"}], "Input should be 'cpt', 'distil' or 'grpo'"),
        ([{"method": "distil", "packing": True, "loss": "all"}], "packing is no field of distil but of cpt"),
        ([{"method": "grpo", "batch_size": 9}], "multiple of num_generations"),
        ([{"method": "grpo", "rewards": [{"name": "format"}]}], "verifies the answer"),
    ],
)
def test_wrong_stages_are_refused(stages, said):
    from ptl.config.run import check

    with pytest.raises(InputError, match=said):
        check(Recovery, {"stages": stages}, "recover")


def damaged(src, dst, change):
    """A copy of a checkpoint with changed weights."""
    from safetensors.torch import save_file

    shutil.copytree(src, dst)
    save_file(change(weights(src)), dst / "model.safetensors", metadata={"format": "pt"})
    return dst


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_and_names_the_step(small, tmp_path):
    broken = damaged(small, tmp_path / "broken", lambda w: w | {"model.norm.weight": w["model.norm.weight"] * 1e38})
    with pytest.raises(WorkError, match=r"loss .* is nan at optimizer step 1; .*check the checkpoint's weights"):
        recover(broken, tmp_path / "out", CPT)
    assert not (tmp_path / "out/model.safetensors").exists()


def test_weights_that_the_stored_dtype_cannot_hold_are_not_written(small, tmp_path):
    """A mock of a trainer whose model has grown beyond float16."""
    half = damaged(small, tmp_path / "half", lambda w: {name: tensor.half() for name, tensor in w.items()})
    model = training.load(half)
    torch.nn.init.constant_(model.model.norm.weight, 1e5)
    out = tmp_path / "out"
    out.mkdir()
    trainer = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(unwrap_model=lambda wrapped: wrapped, get_state_dict=torch.nn.Module.state_dict),
        state=SimpleNamespace(global_step=7),
        is_world_process_zero=lambda: True,
    )
    with pytest.raises(WorkError, match="a weight is NaN or infinite at optimizer step 7"):
        training.save(trainer, half, out, tmp_path)
    assert not list(out.iterdir())


@pytest.mark.slow
def test_a_loss_that_explodes_keeps_the_last_good_checkpoint(small, tmp_path, monkeypatch):
    """A mock of the learning-rate curve, which explodes after the second step; the loss is no number in the fourth."""
    monkeypatch.setattr(training, "learning_rate_curve", lambda *args: lambda step: 1.0 if step < 2 else 1e38)
    with pytest.raises(WorkError, match=r"at optimizer step 4; the last good .* is .*/checkpoint-2; lower"):
        recover(small, tmp_path / "exact", CPT)
    assert last_complete(tmp_path / "exact.training").name == "checkpoint-2"
    assert not (tmp_path / "exact/model.safetensors").exists()
    with pytest.raises(WorkError, match=r"at optimizer step 5; no training checkpoint was"):
        monkeypatch.setattr(training, "logging_steps", lambda _: 5)
        recover(small, tmp_path / "coarse", CPT | {"save_steps": 100})


def test_a_checkpoint_with_nan_weights_is_not_marked_complete(small, tmp_path):
    good, bad = (tmp_path / f"checkpoint-{step}" for step in (2, 4))
    for folder in (good, bad):
        folder.mkdir()
    callback = training.watch(RecoveryJob(DATA, StageBudget(1, (), 1, True, 0), tmp_path, lambda metrics, step: None))
    model = torch.nn.Linear(2, 2)
    callback.on_save(None, SimpleNamespace(global_step=2, is_world_process_zero=True), None, model=model)
    model.weight.data[0, 0] = float("nan")
    with pytest.raises(WorkError, match="a weight is NaN or infinite at optimizer step 4"):
        callback.on_save(None, SimpleNamespace(global_step=4, is_world_process_zero=True), None, model=model)
    assert last_complete(tmp_path) == good


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.slow
def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(small, straight, tmp_path, earlier):
    """A file size limit of the kernel stands for a full disk: the write fails with EFBIG in the same place."""
    dst = tmp_path / "out"
    if earlier:
        shutil.copytree(straight[0].with_name(straight[0].name + ".training"), tmp_path / "out.training")
        for path in tmp_path.glob("out.training/checkpoint-*"):
            if path.name != "checkpoint-4":
                shutil.rmtree(path)
    code = SCRIPT.format(tests=str(ROOT / "tests"), src=str(small), dst=str(dst), method="cpt")
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
    done = subprocess.run([sys.executable, "-c", limit + code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "no space left while training" in done.stderr, done.stderr[-2000:]
    last = last_complete(tmp_path / "out.training")
    if not earlier:
        assert last is None and "no training checkpoint was written yet" in done.stderr
        return
    assert last.name == "checkpoint-4" and "the last good training checkpoint is" in done.stderr
    report = recover(small, dst, CPT, scratch=tmp_path / "out.training")  # there is space again
    assert report.resumed_at == 4
    assert (dst / "model.safetensors").read_bytes() == (straight[0] / "model.safetensors").read_bytes()


def test_a_disk_that_is_full_at_the_end_still_has_the_training_checkpoint(small, tmp_path, monkeypatch):
    """A mock of the last write, which finds no space."""

    def full(src, dst):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "copy_companions", full)
    said = r"no space left .*; the last good .* is .*/out\.training/checkpoint-\d"
    with pytest.raises(WorkError, match=said):
        recover(small, tmp_path / "out", CPT)


def test_longer_than_the_positions_and_missing_eos_are_refused(small, tmp_path):
    with pytest.raises(InputError, match=r"recover.max_length: 4096 is more than the model's \d+ positions"):
        recover(small, tmp_path / "out", CPT | {"max_length": 4096})
    mute = tmp_path / "mute"
    shutil.copytree(small, mute)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (mute / name).is_file():
            told = json.loads((mute / name).read_text())
            told.pop("eos_token", None)
            (mute / name).write_text(json.dumps(told))
    with pytest.raises(InputError, match="no EOS token"):
        recover(mute, tmp_path / "out", CPT)


@pytest.mark.slow
def test_a_tokenizer_without_pad_token_trains(small, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(small, plain)
    told = json.loads((plain / "tokenizer_config.json").read_text())
    told.pop("pad_token", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(told))
    assert recover(plain, tmp_path / "out", CPT, tokens=400).tokens == 400


@pytest.mark.slow
def test_what_decontamination_dropped_is_reported(small, tmp_path):
    test = {**SOURCE, "source": str(ROOT / "examples/tiny_reasoner/test.jsonl")}
    data = TrainingData(sources=[SOURCE], decontaminate={"against": [test]})
    report = recover(small, tmp_path / "out", CPT, tokens=400, data=data)
    told = report.details["decontaminated"]
    assert told["items"] == 1000 and 0 <= told["dropped"] <= told["rows"] and report.tokens == 400
    assert SHORT["batch_size"] == 4
