"""Recovery on an exact budget: optimizer state, learning rate, checkpoints, kills, LoRA, chains, errors, width."""

import json
import math
import multiprocessing
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import full_disk
from recovering import DATA, DENSE, SHORT, as_if_died_after, cut, losses, prune_to, recover, weights
from safetensors.torch import save_file

from ptl.config.data import TrainingData
from ptl.config.recover import RecoverStage, Recovery
from ptl.config.run import Calibration
from ptl.data.sequences import training_chunk
from ptl.errors import InputError, WorkError
from ptl.model import checkpoint, pretrained
from ptl.recovery import sft, training
from ptl.recovery.job import RecoveryJob, StageBudget
from ptl.recovery.recover import RECOVERIES, budgets_before
from ptl.recovery.training import learning_rate_curve, optimizer_for
from ptl.storage.local_files import COMPLETE, last_complete

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("recover")]
CPT, DISTIL = {"method": "cpt"}, {"method": "distil"}
LORA = CPT | {"lora": {"rank": 4}, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    """One uninterrupted recovery: folder, report, logs."""
    dst, log = tmp_path_factory.mktemp("straight") / "out", []
    return dst, recover(small, dst, CPT, log=log), log


def bytes_of(folder):
    return (folder / "model.safetensors").read_bytes()


def files_in(folder):
    return {path.name for path in folder.iterdir()}


def rates(log):
    """The learning rate at each step that was logged, as a part of the highest."""
    return [
        metrics["learning_rate"] / RecoverStage().learning_rate
        for _, metrics in log
        if "loss" in metrics
    ]


def test_tokens_are_exact_and_counted_while_training(small, straight):
    """The result is an ordinary checkpoint: files and config of its source, other numbers."""
    dst, report, log = straight
    assert report.tokens == losses(log)[-1][0] == 1500
    assert report.details["passes"] == report.details["sequences"] / 10_000  # rows
    tokens = [tokens for tokens, _ in losses(log)]
    assert tokens == sorted(tokens) and len(tokens) == report.steps == math.ceil(
        report.details["sequences"] / 4
    )
    assert all(math.isfinite(loss) for _, loss in losses(log))
    assert rates(log) == pytest.approx(curve(steps=report.steps))
    before, after = weights(small), weights(dst)
    assert before.keys() == after.keys() and all(
        not torch.equal(before[name], after[name]) for name in before
    )
    assert files_in(dst) == files_in(small)
    assert (dst / "config.json").read_text() == (small / "config.json").read_text()


def test_the_first_step_is_reported_before_the_first_log_and_the_last_has_a_loss(
    small, tmp_path, monkeypatch
):
    """Ten steps of a large model are minutes, and an iteration shorter than logging_steps has a curve too."""
    assert [training.logging_steps(steps) for steps in (1, 19, 20, 99, 100, 5000)] == [
        1,
        1,
        2,
        9,
        10,
        10,
    ]
    monkeypatch.setattr(training, "logging_steps", lambda _: 100)
    report = recover(small, tmp_path / "out", CPT, tokens=500, log=(log := []))
    start, first, *_ = [
        (step, metrics["progress"], metrics["num_input_tokens_seen"]) for step, metrics in log
    ]
    assert start == (0, 0, 0) and first[0] == 1 and 0 < first[1] < 1 and 0 < first[2] < 500
    ((tokens, loss),) = losses(log)
    assert report.steps > 1 and tokens == 500 and 0 < loss < 10


def test_decontamination_leaves_rows_out_of_the_training(small, tmp_path):
    rows = [
        {"text": f"{name} has nine red cups and two green cups on Sunday"}
        for name in ("Ann", "Bob", "Eva")
    ]
    train, test = (
        {"source": str(tmp_path / f"{name}.jsonl"), "format": "text"} for name in ("train", "test")
    )
    for source, some in ((train, rows), (test, rows[:1])):
        (tmp_path / source["source"]).write_text("".join(json.dumps(row) + "\n" for row in some))
    data = TrainingData(sources=[train], decontaminate={"tasks": False, "against": [test]})
    job = RecoveryJob(data, StageBudget(300, (), 1, True, 0), tmp_path, print)
    one, tokenizer = (
        SimpleNamespace(world_size=1, per_device_train_batch_size=4),
        pretrained.tokenizer(small),
    )
    dataset, details = sft.training_dataset(tokenizer, RecoverStage(loss="all"), job, one)
    text = "".join(map(tokenizer.decode, dataset["input_ids"]))
    assert details["decontaminated"]["rows_dropped"] == 1 and "Bob" in text and "Ann" not in text


def test_a_step_that_is_split_has_rows_of_like_lengths_together(small, tmp_path):
    job = RecoveryJob(DATA, StageBudget(1500, (), 1, True, 0), tmp_path, print)
    one, tokenizer = (
        SimpleNamespace(world_size=1, per_device_train_batch_size=2),
        pretrained.tokenizer(small),
    )
    whole, split = (
        sft.training_dataset(tokenizer, RecoverStage(batch_size=4, accumulation=passes), job, one)[
            0
        ]["input_ids"]
        for passes in (1, 2)
    )
    steps = [
        [list(rows[begin : begin + 4]) for begin in range(0, len(rows), 4)]
        for rows in (whole, split)
    ]
    assert (
        all(sorted(one, key=len) == other for one, other in zip(*steps, strict=True))
        and steps[0] != steps[1]
    )


def test_packing_joins_sequences_and_keeps_the_count(small, tmp_path):
    report = recover(
        small, tmp_path / "out", CPT | {"packing": True, "loss": "all"}, log=(log := [])
    )
    assert report.tokens == losses(log)[-1][0] == 1500
    # 14 or so rows of 128 tokens, 4 to a step
    assert report.steps == 4 < math.ceil(report.details["sequences"] / 4)


def test_the_loss_is_that_of_trl(small, straight, tmp_path, monkeypatch):
    """On a CPU the model's own loss is used in place of trl's fused one, for speed; the numbers are the same."""
    from trl import SFTTrainer

    expected = [loss for _, loss in losses(straight[2])]
    recover(small, tmp_path / "own", CPT | {"accumulation": 2}, log=(own := []))
    monkeypatch.setattr(sft, "sft_trainer", lambda: SFTTrainer)
    recover(small, tmp_path / "trl", CPT, log=(of_trl := []))
    for log in (own, of_trl):
        assert [loss for _, loss in losses(log)] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["cpt", "distil"])
def test_a_sequence_of_one_token_alone_in_its_batch_is_no_error(
    small, tmp_path, monkeypatch, method
):
    """It has nothing to be predicted from, so its loss is zero: the budget stays exact, the weights are numbers."""
    monkeypatch.setenv("WORLD_SIZE", "4")  # as in a shell of Slurm
    tokenizer, stage = pretrained.tokenizer(small), {"method": method, "batch_size": 1}
    whole = training_chunk(DATA, tokenizer, SHORT["max_length"], seed=0, earlier=(), budget=2000)[1]
    report = recover(
        small, tmp_path / "out", stage, tokens=len(whole.ids) + 1, teacher=DENSE, log=(log := [])
    )
    assert report.tokens == len(whole.ids) + 1 and report.steps == 2
    assert losses(log)[0] == (1, 0.0) and losses(log)[1][1] > 0
    assert all(bool(tensor.isfinite().all()) for tensor in weights(tmp_path / "out").values())


def test_budgets_add_up_and_follow_each_other():
    chain = Recovery(stages=[{"share": 0.3}, {"method": "grpo"}, {"method": "distil"}])
    assert chain.budgets(1001) == (300, None, 701)
    assert budgets_before(chain, [10, 100], 0) == (3, 7)
    assert budgets_before(chain, [10, 100], 2) == (3, 7, 30)
    assert Recovery(stages=[{}, {}, {}]).budgets(100) == (33, 34, 33)
    prompts_first = Recovery(stages=[{"method": "grpo", "share": 0.75}, {}])
    assert budgets_before(prompts_first, [1000, 1000], 1) == (250,)  # of rows that were trained on
    with pytest.raises(ValueError, match=r"give them one max_length, not \[32, 64\]"):
        Recovery(
            stages=[{"max_length": 32}, {"method": "grpo"}, {"method": "distil", "max_length": 64}]
        )


def test_a_stage_without_tokens_is_refused(small, tmp_path):
    # As an iteration of a pipeline started with --param may have it, past the config's own check
    with pytest.raises(InputError, match="1 tokens for iteration 1 leave none for cpt"):
        recover(small, tmp_path / "out", CPT, {"method": "distil"}, tokens=1)
    assert recover(small, tmp_path / "out", CPT, tokens=2).tokens == 2


def stored_as(src, dst, dtype, *, named):
    """A copy of a checkpoint in another dtype, and with the one that its config names."""
    shutil.copytree(src, dst)
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights(src).items()}
    save_file(tensors, dst / "model.safetensors", metadata={"format": "pt"})
    checkpoint.write_json(dst / "config.json", checkpoint.read_config(src) | {"dtype": named})
    return dst


@pytest.mark.parametrize(
    ("dtype", "named", "stage"), [("float16", None, LORA), ("bfloat16", "float32", DISTIL)]
)
def test_weights_keep_their_dtype_whatever_the_config_names(small, tmp_path, dtype, named, stage):
    """Training is in float32: its result differs from that of a float32 copy by the rounding of the last write only."""
    half = stored_as(small, tmp_path / "half", dtype, named=named)
    full = stored_as(half, tmp_path / "full", "float32", named="bfloat16")
    for src, dst in ((half, "out"), (full, "reference")):
        recover(src, tmp_path / dst, stage | {"learning_rate": 1e-2}, tokens=150, teacher=DENSE)
        assert (tmp_path / dst / "config.json").read_text() == (src / "config.json").read_text()
    before, after, reference = (
        weights(folder) for folder in (half, tmp_path / "out", tmp_path / "reference")
    )
    assert {tensor.dtype for tensor in reference.values()} == {torch.float32}
    assert {tensor.dtype for tensor in after.values()} == {getattr(torch, dtype)}
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert all(torch.equal(after[name], reference[name].to(after[name].dtype)) for name in after)


# ---- optimizer state and learning rate


def test_the_optimizer_state_is_carried_through_pruning(tmp_path):
    """That of the end of the first iteration is, pruned like the weights, that of the second's start."""
    first, second, name = (
        tmp_path / "first",
        tmp_path / "second",
        "model.layers.0.mlp.gate_proj.weight",
    )
    recover(DENSE, first, CPT, tokens=300, last=False)
    cut(first, second, 150_000)
    before, after = (
        dict(checkpoint.tensors(folder / checkpoint.STATE)) for folder in (first, second)
    )
    old, new = weights(first)[name], weights(second)[name]
    kept = [next(i for i, row in enumerate(old) if torch.equal(row, stays)) for stays in new]
    assert len(kept) < len(old) and before["step"] == after["step"] > 0
    # vLLM loads all of these
    assert [file.name for file in second.glob("*.safetensors")] == ["model.safetensors"]
    model = training.load(second)
    optimizer = optimizer_for(model, RecoverStage(), second / checkpoint.STATE)
    for kind in training.ADAM_STATE:
        assert torch.equal(after[f"{kind}.{name}"], before[f"{kind}.{name}"][kept])
        for parameter_name, parameter in model.named_parameters():
            state = optimizer.state[parameter]
            assert state["step"] == before["step"] and torch.equal(
                state[kind], after[f"{kind}.{parameter_name}"]
            )

    for carry in (True, False):
        dst, log = tmp_path / f"{carry}", []
        # so that there are steps enough for a warm-up
        stage = CPT | {"carry_moments": carry, "batch_size": 1}
        report = recover(second, dst, stage, tokens=500, earlier=(300,), last=False, log=log)
        assert (dst / checkpoint.STATE).exists() == (rates(log)[0] == 1) == carry
    assert (
        dict(checkpoint.tensors(tmp_path / "True" / checkpoint.STATE))["step"]
        == before["step"] + report.steps
    )


def test_the_optimizer_decays_matrices_and_nothing_else():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    # of four experts
    model.register_parameter("down_proj_bias", torch.nn.Parameter(torch.zeros(4, 3)))
    matrices, vectors = optimizer_for(
        model, RecoverStage(weight_decay=0.25, learning_rate=0.5)
    ).param_groups
    assert [tuple(parameter.shape) for parameter in matrices["params"]] == [(3, 2)] and matrices[
        "weight_decay"
    ] == 0.25
    shapes = [tuple(parameter.shape) for parameter in vectors["params"]]
    assert shapes == [(4, 3), (3,), (3,), (3,)] and vectors["weight_decay"] == 0
    assert matrices["lr"] == vectors["lr"] == 0.5


def curve(iteration=1, weights=(1,), *, carried=False, steps=100, **settings):
    budget = StageBudget(1, (), iteration, iteration == len(weights), 0, weights)
    factor = learning_rate_curve(RecoverStage(**settings), budget, steps, carried)
    return [factor(step) for step in range(steps)]


def test_the_learning_rate_decays_at_the_end_of_the_run():
    """One curve over all iterations, wherever they end: half of the recovery is in the last of these."""
    early, middle, final = (curve(i, (1, 2, 3), warmup_steps=10) for i in (1, 2, 3))
    assert early[10:] == middle[10:] == [1.0] * 90
    assert early[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert final[10] == 1.0 and final[55] == pytest.approx(0.5) and final[-1] < 0.001
    assert final[10:] == sorted(final[10:], reverse=True)
    # which is over when it has warmed up
    assert max(curve(4, (1, 1, 1, 1), warmup_steps=10)) == pytest.approx(0.5)
    whole = curve(carried=True)
    assert whole[:51] == [1.0] * 51 and whole[75] == pytest.approx(0.5) and whole[-1] < 0.005
    parts = curve(1, (1, 1), carried=True, decay=1, steps=50) + curve(
        2, (1, 1), carried=True, decay=1, steps=50
    )
    assert parts == pytest.approx(curve(carried=True, decay=1))
    assert curve(decay=0, carried=True) == [1.0] * 100
    late = curve(decay=0.2, carried=True)
    assert late[:81] == [1.0] * 81 and late[90] == pytest.approx(0.5)


def test_each_decays_every_time_and_a_carried_optimizer_state_needs_no_warm_up():
    assert curve(1, (1, 2), decay="each") == curve(2, (1, 2), decay="each") == curve(decay=1)
    assert curve(1, (1, 2), carried=True) == [1.0] * 100
    assert curve(1, (1, 2), warmup_steps=50, steps=10)[:5] == [
        pytest.approx((i + 1) / 5) for i in range(5)
    ]
    for steps in (1, 2, 20):  # no step without training, and no decay of reinforcement learning
        factors = curve(2, (1, 2), method="grpo", steps=steps)
        assert min(factors) > 0 and factors[steps // 2 :] == [1.0] * (steps - steps // 2)


# ---- kills, and what is resumed


def test_a_kill_in_mid_training_changes_nothing(small, straight, tmp_path):
    """kill -9 after the first training checkpoint; the second attempt resumes from there to the same bytes."""
    dst, scratch = tmp_path / "out", tmp_path / "out.training"
    process = multiprocessing.get_context("fork").Process(target=recover, args=(small, dst, CPT))
    process.start()
    deadline = time.monotonic() + 300
    while not list(scratch.glob(f"checkpoint-*/{COMPLETE}")):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (dst / "model.safetensors").exists()
    (dst / "left-over.json").write_text("of an attempt that died")
    (scratch / "checkpoint-99").mkdir()
    (scratch / "checkpoint-99/model.safetensors").write_bytes(b"half")
    assert 2 <= recover(small, dst, CPT).resumed_at < 99
    assert bytes_of(dst) == bytes_of(straight[0]) and files_in(dst) == files_in(small)


def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(small, straight, tmp_path):
    dst, scratch = (
        tmp_path / "out",
        shutil.copytree(straight[0].with_name("out.training"), tmp_path / "out.training"),
    )
    as_if_died_after(4, scratch)
    refused = pytest.raises(
        WorkError, match=r"no space left while training in .*; the last good .* is .*checkpoint-4"
    )
    with full_disk(300_000), refused:
        recover(small, dst, CPT)
    assert recover(small, dst, CPT).resumed_at == 4  # there is space again
    assert bytes_of(dst) == bytes_of(straight[0])


@pytest.mark.parametrize(("step", "problem"), [(2, "mean loss"), (3, "a weight is NaN")])
def test_a_training_that_explodes_keeps_the_last_good_checkpoint(
    small, tmp_path, monkeypatch, step, problem
):
    """A mock of the learning-rate curve; the loss of the fourth step, or its weights afterwards, are no numbers."""
    monkeypatch.setattr(
        training, "learning_rate_curve", lambda *_: lambda at: 1.0 if at < step else math.inf
    )
    with pytest.raises(
        WorkError, match=rf"{problem} .* at optimizer step 4; the last good .* is .*/checkpoint-2;"
    ):
        recover(small, tmp_path / "out", CPT)
    assert last_complete(tmp_path / "out.training").name == "checkpoint-2"
    assert not (tmp_path / "out/model.safetensors").exists()


def test_weights_that_the_stored_dtype_cannot_hold_are_not_written(small, tmp_path, monkeypatch):
    """A mock of the learning-rate curve, which lets the weights grow beyond float16 in the only step."""
    half = stored_as(small, tmp_path / "half", "float16", named="float16")
    monkeypatch.setattr(training, "learning_rate_curve", lambda *args: lambda step: 1e12)
    with pytest.raises(WorkError, match="a weight is NaN or infinite at optimizer step 1"):
        recover(half, tmp_path / "out", CPT, tokens=150)
    assert not list((tmp_path / "out").iterdir())


def test_lora_is_merged_into_an_ordinary_checkpoint(small, tmp_path):
    report = recover(small, tmp_path / "out", LORA, last=False)
    before, after = weights(small), weights(tmp_path / "out")
    assert {name: t.shape for name, t in before.items()} == {
        name: t.shape for name, t in after.items()
    }
    assert files_in(tmp_path / "out") == files_in(small)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "proj" in name} and report.tokens == 1500
    torch.manual_seed(7)  # what ran before in this process changes nothing, in a new training
    recover(small, tmp_path / "anew", LORA, last=False)
    as_if_died_after(4, tmp_path / "out.training")  # nor in one that is resumed
    again = recover(small, tmp_path / "again", LORA, last=False, scratch=tmp_path / "out.training")
    assert again.resumed_at == 4
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "anew") == bytes_of(tmp_path / "out")


def test_a_chain_runs_its_stages_on_their_own_budgets_and_does_not_repeat_a_finished_one(
    small, tmp_path, monkeypatch
):
    """And leaves nothing of its own in the checkpoint."""
    out, died, stages = (
        tmp_path / "out",
        tmp_path / "died",
        (CPT | {"share": 0.25}, CPT | {"learning_rate": 1e-4}),
    )
    report = recover(small, out, *stages, tokens=1001, log=(log := []))
    first, second = report.details["stages"]
    assert (first["tokens"], second["tokens"]) == (250, 751) and report.tokens == losses(log)[-1][
        0
    ] == 1001
    assert report.method == "cpt+cpt" and report.steps == first["steps"] + second["steps"]
    # tokens and steps are counted on
    assert losses(log) == sorted(losses(log), key=lambda point: point[0])
    assert [step for step, _ in log] == sorted(step for step, _ in log)
    assert files_in(out) == files_in(small)
    assert (tmp_path / "out.training/0-cpt-out" / checkpoint.STATE).exists()  # for the second stage
    ran, original = [], RECOVERIES["cpt"]

    def dies(src, dst, settings, job):
        ran.append(job.scratch.name)
        if ran == ["0-cpt", "1-cpt"]:
            raise KeyboardInterrupt
        return original(src, dst, settings, job)

    monkeypatch.setitem(RECOVERIES, "cpt", dies)
    with pytest.raises(KeyboardInterrupt):
        recover(small, died, *stages, tokens=1001)
    recover(small, died, *stages, tokens=1001)
    assert (
        ran == ["0-cpt", "1-cpt", "1-cpt"]
        and files_in(died) == files_in(out)
        and bytes_of(died) == bytes_of(out)
    )


def test_a_tokenizer_without_pad_token_trains(small, tmp_path):
    plain = shutil.copytree(small, tmp_path / "plain")
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("pad_token", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    assert recover(plain, tmp_path / "out", CPT, tokens=60).tokens == 60


# ---- a smaller hidden size and fewer KV heads: teacher, adapters and optimizer state


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """The end of a first iteration, and what width leaves of it: hidden size 64 -> 56, KV heads 2 -> 1."""
    root = tmp_path_factory.mktemp("width")
    recover(DENSE, root / "first", CPT, tokens=300, last=False)
    scored = Calibration(data=DATA.sources[0], num_sequences=4, max_length=128)
    width = {"unit": "width", "target": "width", "width": {"hidden": 56, "kv": 1}}
    (root / "second").mkdir()
    report = prune_to(120_000, root / "first", root / "second", scored, **width)
    assert (report.hidden, report.kv_heads, report.candidates) == (56, 1, ())
    return root / "first", root / "second"


@pytest.mark.parametrize("stage", [DISTIL, CPT | {"lora": {"rank": 4}}], ids=["distil", "lora"])
def test_it_recovers_and_carries_the_state_on(stage, narrow, tmp_path):
    """The teacher is the dense model, of another hidden size: only its logits count."""
    _, second = narrow
    out, log = tmp_path / "out", []
    report = recover(
        second, out, stage, tokens=600, earlier=(300,), last=False, teacher=DENSE, log=log
    )
    assert report.tokens == 600 and all(math.isfinite(loss) for _, loss in losses(log))
    before, after = weights(second), weights(out)
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert after.keys() == before.keys() and any("q_proj" in name for name in moved)
    # Adapters have no optimizer state that pruning could select from.
    assert (out / checkpoint.STATE).exists() == ("lora" not in stage)
    if "lora" not in stage:
        steps = [
            dict(checkpoint.tensors(folder / checkpoint.STATE))["step"] for folder in (second, out)
        ]
        assert steps[1] == steps[0] + report.steps
