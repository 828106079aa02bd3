"""Training in several processes: the same tokens and the same result, as whole copies and sharded; what is refused."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import free_port
from recovering import DENSE, ROOT, cut, losses, recover, weights

from ptl.config.recover import RecoverStage
from ptl.errors import InputError, WorkError
from ptl.recovery import launch
from ptl.recovery.job import Machines

CPT = {"method": "cpt"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return cut(DENSE, tmp_path_factory.mktemp("cut"), 130_000)


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    """One recovery in one process: folder, report, losses."""
    dst, log = tmp_path_factory.mktemp("straight") / "out", []
    return dst, recover(small, dst, CPT, log=log), [loss for _, loss in losses(log)]


@pytest.fixture
def replace_worker(monkeypatch):
    """Have accelerate start a script in place of ptl.recovery.worker."""
    whole = launch.command
    return lambda script: monkeypatch.setattr(launch, "command", lambda *args: [*whole(*args)[:-2], str(script)])


@pytest.fixture
def sharding(monkeypatch, replace_worker):
    """accelerate shards on GPUs only: a mock makes it take CPU processes for some."""
    monkeypatch.setattr(launch, "can_shard", lambda: True)
    replace_worker(ROOT / "tests/fsdp_on_cpu.py")


@pytest.mark.slow
def test_two_processes_train_on_the_same_tokens_to_the_same_loss(small, straight, tmp_path):
    """accelerate launch with gloo: the same batches, so the losses differ by floating point only."""
    log = []
    report = recover(small, tmp_path / "out", CPT | {"processes": 2}, log=log)
    one = straight[1]
    assert (report.details["processes"], one.details["processes"]) == (2, 1)
    assert (report.tokens, report.steps) == (one.tokens, one.steps) == (1500, one.steps)
    assert losses(log)[-1][0] == 1500
    assert [loss for _, loss in losses(log)] == pytest.approx(straight[2], rel=1e-4)
    assert [step for step, metrics in log if "loss" in metrics] == list(range(1, one.steps + 1))
    mine, theirs = weights(tmp_path / "out"), weights(straight[0])
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-4


@pytest.mark.slow
def test_sharded_training_in_two_processes_is_the_same_and_goes_on_after_a_kill(small, straight, tmp_path, sharding):
    """FSDP2 with gloo: weights and optimizer state are halved; tokens and, up to rounding, result are the same."""
    stage = CPT | {"processes": 2, "sharding": "fsdp", "gradient_checkpointing": True, "accumulation": 2}
    dst = tmp_path / "out"
    report = recover(small, dst, stage, log=(log := []))
    one = straight[1]
    assert (report.tokens, report.steps, report.details["processes"]) == (1500, one.steps, 2)
    assert [loss for _, loss in losses(log)] == pytest.approx(straight[2], rel=1e-4)
    mine, theirs = weights(dst), weights(straight[0])
    assert mine.keys() == theirs.keys()
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-4
    assert {path.name for path in dst.iterdir()} == {path.name for path in small.iterdir()}

    for path in tmp_path.glob("out.training/checkpoint-*"):  # as if it had died after step 4
        if path.name != "checkpoint-4":
            shutil.rmtree(path)
    again = recover(small, tmp_path / "again", stage, scratch=tmp_path / "out.training")
    assert again.resumed_at == 4 and again.steps == one.steps == 5
    resumed = weights(tmp_path / "again")
    assert all(torch.equal(resumed[name], mine[name]) for name in mine)


@pytest.mark.slow
def test_adapters_of_a_sharded_model_are_merged_into_it(small, tmp_path, sharding):
    """Where one process, which starts from the same adapters, ends."""
    stage = CPT | {"lora": {"rank": 8}, "learning_rate": 3e-3, "gradient_checkpointing": True}
    one = recover(small, tmp_path / "one", stage, log=(log_of_one := []))
    report = recover(small, tmp_path / "out", stage | {"processes": 2, "sharding": "fsdp"}, log=(log := []))
    assert (report.tokens, report.steps, report.details["processes"]) == (1500, one.steps, 2)
    ours = [loss for _, loss in losses(log)]
    assert ours == pytest.approx([loss for _, loss in losses(log_of_one)], rel=1e-4)
    mine, theirs, before = (weights(path) for path in (tmp_path / "out", tmp_path / "one", small))
    assert mine.keys() == theirs.keys() == before.keys()
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-4
    assert any(float((mine[name] - before[name]).abs().max()) > 1e-2 for name in mine)

    for path in tmp_path.glob("out.training/checkpoint-*"):  # as if it had died after step 4
        if path.name != "checkpoint-4":
            shutil.rmtree(path)
    sharded = stage | {"processes": 2, "sharding": "fsdp"}
    assert recover(small, tmp_path / "again", sharded, scratch=tmp_path / "out.training").resumed_at == 4
    resumed = weights(tmp_path / "again")
    assert all(torch.equal(resumed[name], mine[name]) for name in mine)


@pytest.mark.slow
def test_sharded_training_in_bf16(small, straight, tmp_path, sharding):
    """The weights stay float32, and are saved in the dtype they came in."""
    stage = CPT | {"processes": 2, "sharding": "fsdp", "gradient_checkpointing": True, "dtype": "bfloat16"}
    report = recover(small, tmp_path / "out", stage, log=(log := []))
    assert (report.tokens, report.steps) == (1500, straight[1].steps)
    assert [loss for _, loss in losses(log)] == pytest.approx(straight[2], abs=0.02)
    before, after = weights(small), weights(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_reinforcement_learning_goes_with_sharding(small, tmp_path, sharding):
    """Generation, reference model and saving, with the weights spread."""
    stage = {"method": "grpo", "learning_rate": 3e-4, "steps": 2, "batch_size": 16, "num_generations": 4}
    stage |= {"max_completion_length": 44, "guard_prompts": 4, "processes": 2, "sharding": "fsdp"}
    report = recover(small, tmp_path / "out", stage | {"rewards": [{"name": "final_answer"}]})
    assert report.steps == 2 and report.tokens > 0
    before, after = weights(small), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert 0 < max(float((before[name] - after[name]).abs().max()) for name in before) < 0.01


@pytest.mark.slow
def test_a_process_that_is_killed_is_reported_with_its_signal(small, tmp_path, replace_worker):
    """A mock of the worker is killed, as by a machine that runs out of memory; the other one is stopped for it."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, signal, time\n"
        "print('loading', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '1' else time.sleep(60)\n"
    )
    replace_worker(script)
    with pytest.raises(WorkError, match=r"in 2 processes failed: a process was killed by SIGKILL .*memory") as error:
        recover(small, tmp_path / "out", CPT | {"processes": 2})
    assert "loading" in str(error.value) and "elastic" not in str(error.value)


def test_a_batch_that_cannot_be_divided_is_refused_before_any_work(small, tmp_path):
    with pytest.raises(InputError, match="must be a multiple of accumulation=1 times the 3 training processes"):
        recover(small, tmp_path / "out", CPT, CPT | {"processes": 3})
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_an_error_in_another_process_keeps_its_message(small, tmp_path, replace_worker):
    """A mock of a method fails in both processes."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom ptl.recovery import worker\nfrom ptl.errors import InputError\n"
        "def refuses(*_): raise InputError('recover.x: refused in a process')\n"
        "worker.RECOVERIES = {'cpt': refuses}\nworker.main(Path(sys.argv[1]))\n"
    )
    replace_worker(script)
    with pytest.raises(InputError, match=r"^recover\.x: refused in a process$"):
        recover(small, tmp_path / "out", CPT | {"processes": 2})


def on_two_machines(src, folder, stage):
    """Two launchers that reach each other as the nodes of a TrainJob do; the report and files of the first."""
    port = free_port()

    def train(rank):
        return recover(src, folder / str(rank), stage, machines=Machines(2, rank, "127.0.0.1", port))

    with ThreadPoolExecutor(2) as machines:
        report, _ = machines.map(train, (0, 1))
    assert not list((folder / "1").glob("*.safetensors"))  # the first machine has the files
    return report, folder / "0"


@pytest.mark.slow
def test_two_machines_train_as_two_processes_of_one(small, straight, tmp_path):
    report, folder = on_two_machines(small, tmp_path, CPT)
    recover(small, tmp_path / "processes", CPT | {"processes": 2})
    recover(small, tmp_path / "alone", CPT, machines=Machines(2))  # one machine stands for both
    assert (report.tokens, report.steps, report.details["processes"]) == (1500, straight[1].steps, 2)
    nodes, processes, alone = (weights(path) for path in (folder, tmp_path / "processes", tmp_path / "alone"))
    one = weights(straight[0])
    assert max(float((nodes[name] - one[name]).abs().max()) for name in nodes) < 1e-4
    assert max(float((nodes[name] - processes[name]).abs().max()) for name in nodes) < 1e-6
    assert all(torch.equal(alone[name], processes[name]) for name in alone)


@pytest.mark.slow
def test_weights_are_sharded_over_machines(small, straight, tmp_path, sharding):
    report, folder = on_two_machines(small, tmp_path, CPT | {"sharding": "fsdp"})
    assert (report.tokens, report.steps, report.details["processes"]) == (1500, straight[1].steps, 2)
    mine, theirs = weights(folder), weights(straight[0])
    assert mine.keys() == theirs.keys()
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-4


@pytest.mark.slow
def test_reinforcement_learning_goes_on_two_machines(small, tmp_path):
    stage = {"method": "grpo", "learning_rate": 3e-4, "steps": 2, "batch_size": 16, "num_generations": 4}
    stage |= {"max_completion_length": 44, "guard_prompts": 4, "processes": 1, "rewards": [{"name": "final_answer"}]}
    report, folder = on_two_machines(small, tmp_path, stage)
    assert report.steps == 2 and report.tokens > 0
    before, after = weights(small), weights(folder)
    assert 0 < max(float((before[name] - after[name]).abs().max()) for name in before) < 0.01


def test_a_machine_that_stands_for_all_has_their_processes(monkeypatch):
    def counts(stage, machines):
        return launch.processes_here(stage, machines), launch.processes_of_all(stage, machines)

    node = Machines(2, 1, "node-0", 29500)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert (
        counts(RecoverStage(), Machines()) == (1, 1)
        and counts(RecoverStage(), Machines(2)) == (2, 2)
        and counts(RecoverStage(), node) == (1, 2)
    )
    assert counts(RecoverStage(processes=3), Machines(2)) == (6, 6) and counts(RecoverStage(processes=3), node) == (
        3,
        6,
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert counts(RecoverStage(), Machines(2)) == (4, 4) and counts(RecoverStage(), node) == (4, 8)
