"""Training in several processes: the same tokens and the same result, as whole copies and sharded; what is refused."""

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch
from checkout import ROOT
from conftest import free_port
from recovering import DATA, as_if_died_after, losses, recover, weights

from ptl import processes
from ptl.config.recover import RecoverStage
from ptl.errors import InputError, WorkError
from ptl.recovery import launch, worker
from ptl.recovery.job import Machines, RecoverReport, RecoveryJob, StageBudget

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("launch")]
CPT, LORA = {"method": "cpt"}, {"lora": {"rank": 8}, "learning_rate": 3e-3}
SHARDED = {"processes": 2, "sharding": "fsdp", "gradient_checkpointing": True}
GRPO = {"method": "grpo", "learning_rate": 3e-4, "steps": 2, "batch_size": 16, "num_generations": 4}
GRPO |= {"max_completion_length": 44, "guard_prompts": 4, "rewards": [{"name": "final_answer"}]}


@pytest.fixture
def sharding(monkeypatch):
    """accelerate shards on GPUs only: a mock makes it take CPU processes for some."""
    whole, script = launch.command, str(ROOT / "tests/fsdp_on_cpu.py")
    monkeypatch.setattr(launch, "can_shard", lambda: True)
    monkeypatch.setattr(launch, "command", lambda *args: [*whole(*args)[:-2], script])


def difference(one, other):
    """The largest of two checkpoints' weights, which have the same names."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def test_two_processes_train_on_the_same_tokens_to_the_same_loss(small, tmp_path):
    """accelerate launch with gloo: the same batches, so the losses differ by floating point only."""
    one = recover(small, tmp_path / "one", CPT, log=(log_of_one := []))
    report = recover(small, tmp_path / "out", CPT | {"processes": 2}, log=(log := []))
    assert (report.details["processes"], one.details["processes"]) == (2, 1)
    assert report.tokens == one.tokens == losses(log)[-1][0] == 1500
    assert [loss for _, loss in losses(log)] == pytest.approx(
        [loss for _, loss in losses(log_of_one)], rel=1e-4
    )
    assert [step for step, metrics in log if "loss" in metrics] == list(range(1, one.steps + 1))
    assert difference(tmp_path / "out", tmp_path / "one") < 1e-4


def test_reinforcement_learning_goes_with_sharding(small, tmp_path, sharding):
    report = recover(small, tmp_path / "out", GRPO | {"processes": 2, "sharding": "fsdp"})
    assert report.steps == 2 and 0 < difference(tmp_path / "out", small) < 0.01


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("settings", "relative", "absolute"),  # tolerance of losses, and of weights
    [({"accumulation": 2}, 1e-4, 1e-4), (LORA, 1e-4, 1e-4), ({"dtype": "bfloat16"}, 0.2, 0.02)],
    ids=["accumulation", "lora", "bfloat16"],
)
def test_sharded_training_is_the_same_and_resumes(
    small, tmp_path, sharding, settings, relative, absolute
):
    """FSDP2 with gloo: weights and optimizer state are halved; tokens and, up to rounding, result are the same."""
    stage = CPT | settings
    one = recover(small, tmp_path / "one", stage, log=(log_of_one := []))
    report = recover(small, tmp_path / "out", stage | SHARDED, log=(log := []))
    assert (report.tokens, report.steps, report.details["processes"]) == (1500, one.steps, 2)
    assert [loss for _, loss in losses(log)] == pytest.approx(
        [loss for _, loss in losses(log_of_one)], rel=relative
    )
    assert difference(tmp_path / "out", tmp_path / "one") < absolute
    assert difference(tmp_path / "out", small) > 1e-3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in small.iterdir()
    }
    as_if_died_after(4, tmp_path / "out.training")
    again = recover(small, tmp_path / "again", stage | SHARDED, scratch=tmp_path / "out.training")
    assert again.resumed_at == 4 and difference(tmp_path / "again", tmp_path / "out") == 0


@pytest.mark.nightly
@pytest.mark.parametrize(
    "stage", [CPT | {"sharding": "fsdp"}, GRPO | {"processes": 1}], ids=["fsdp", "grpo"]
)
def test_two_machines_share_weights_and_answers(small, tmp_path, sharding, stage):
    """Two launchers that reach each other as the nodes of a TrainJob do."""
    port = free_port()

    def train(rank):
        return recover(
            small, tmp_path / str(rank), stage, machines=Machines(2, rank, "127.0.0.1", port)
        )

    with ThreadPoolExecutor(2) as machines:
        report, _ = machines.map(train, (0, 1))
    assert report.steps == stage.get("steps", 5) and 0 < difference(tmp_path / "0", small) < 0.01
    assert not list((tmp_path / "1").glob("*.safetensors"))  # the first machine has the files


BUDGET = StageBudget(100, (), 1, True, 0)
REPORT = RecoverReport("cpt", 100, 3, 0, {"sequences": 4})
WRITE_REPORT = f"job.with_name('report.json').write_bytes({launch.REPORT.dump_json(REPORT)!r})"


def run(tmp_path, monkeypatch, *lines, log=None):
    """Have the launcher run a script of these lines in place of accelerate; its argument is the job."""
    script = tmp_path / "processes.py"
    script.write_text(
        "\n".join(("import sys", "from pathlib import Path", "job = Path(sys.argv[1])", *lines))
    )
    monkeypatch.setattr(launch, "command", lambda *_: [sys.executable, str(script)])
    job = RecoveryJob(
        DATA, BUDGET, tmp_path / "scratch", lambda metrics, step: log.append((step, metrics))
    )
    return launch.run(tmp_path, tmp_path, RecoverStage(processes=2), job)


def test_metrics_and_report_are_passed_on_if_all_went_well(tmp_path, monkeypatch, capfd):
    lines = [
        "print('loading', flush=True)",
        "print('\\nptl-metrics [{\"loss\": 2.5}, 3]')",
        WRITE_REPORT,
    ]
    assert run(tmp_path, monkeypatch, *lines, log=(log := [])) == REPORT
    assert log == [(3, {"loss": 2.5})]
    printed = capfd.readouterr().out
    assert "loading" in printed and "ptl-metrics" not in printed
    (tmp_path / "scratch/error.json").write_text('{"problem": "an old one", "exit_code": 2}')
    # that report is an earlier attempt's, this one's is of a failure
    for lines in ([], [WRITE_REPORT, "sys.exit(1)"]):
        with pytest.raises(WorkError, match="in 2 processes failed"):
            run(tmp_path, monkeypatch, *lines)


def test_what_a_failed_training_printed_last_is_in_its_error(tmp_path, monkeypatch):
    lines = [f"print('line {number}')" for number in range(40)]
    lines += [
        "print('File torch/distributed/elastic/x.py')",
        "print('Root Cause (first observed failure):')",
    ]
    lines += ["print('Signal 9 (SIGKILL) received by PID 7')", "sys.exit(1)"]
    with pytest.raises(
        WorkError, match=r"in 2 processes failed: a process was killed by SIGKILL .*memory"
    ) as error:
        run(tmp_path, monkeypatch, *lines)
    assert all(text in str(error.value) for text in ("line 39", "line 10"))
    assert not any(text in str(error.value) for text in ("line 9\n", "elastic"))


def test_a_process_leaves_its_report_or_its_error(tmp_path, monkeypatch):
    """The first process of a machine the report; the error is of whichever failed first, and keeps its kind."""
    job_file = tmp_path / "job.pickle"
    job_file.write_bytes(
        pickle.dumps(
            (tmp_path, tmp_path, RecoverStage(), RecoveryJob(DATA, BUDGET, tmp_path, print))
        )
    )
    monkeypatch.setitem(worker.RECOVERIES, "cpt", lambda *_: REPORT)
    for rank, exists in (("1", False), ("0", True)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        worker.main(job_file)
        assert (tmp_path / "report.json").is_file() == exists
    for error in (
        InputError("refused", field="recover.x", remedy="give another"),
        WorkError("a consequence"),
    ):
        monkeypatch.setitem(worker.RECOVERIES, "cpt", Mock(side_effect=error))
        with pytest.raises(type(error)):
            worker.main(job_file)
    error_file = (tmp_path / "error.json").read_text()
    lines = [f"job.with_name('error.json').write_text({error_file!r})", "sys.exit(1)"]
    with pytest.raises(InputError, match=r"^recover\.x: refused; give another$"):
        run(tmp_path, monkeypatch, *lines)
    # of a full disk
    lines = ["job.with_name('error.json').touch()", "print('No space left')", "sys.exit(1)"]
    with pytest.raises(WorkError, match="No space left"):
        run(tmp_path, monkeypatch, *lines)


def test_a_machine_has_its_processes_and_a_batch_that_they_cannot_divide_is_refused(
    small, tmp_path, monkeypatch
):
    alone, node = Machines(), Machines(2, 1, "node-0", 29500)
    for gpus, settings, machines, expected in (
        *((0, {}, alone, (1, 1)), (0, {}, node, (1, 2)), (0, {"processes": 3}, node, (3, 6))),
        *((4, {}, alone, (4, 4)), (4, {}, node, (4, 8)), (1, {}, node, (1, 2))),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        stage = RecoverStage(**settings)
        counts = (
            processes.on_gpus(stage.processes, "recover"),
            launch.processes_of_all(stage, machines),
        )
        assert counts == expected, (gpus, machines)
    with pytest.raises(
        InputError, match=r"^recover\.processes: 2 processes, and this machine has 1 GPUs"
    ):
        launch.processes_of_all(RecoverStage(processes=2), alone)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(
        InputError, match="must be a multiple of accumulation=1 times the 3 training processes"
    ):
        recover(small, tmp_path / "out", CPT, CPT | {"processes": 3})
    assert not list(tmp_path.glob("out*"))
    assert launch.sequences_per_pass(RecoverStage(batch_size=24, accumulation=3), 4) == 2
