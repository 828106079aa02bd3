"""What the tests of recovery share: one call that prunes, a small pruned reasoner, and one call that trains it."""

import shutil

from checkout import DENSE

from ptl.config.data import TrainingData
from ptl.config.recover import Recovery
from ptl.config.run import Calibration
from ptl.config.schedule import Prune
from ptl.model import checkpoint
from ptl.pruning.prune import prune_checkpoint
from ptl.recovery.job import RecoveryJob, StageBudget
from ptl.recovery.recover import recover_checkpoint

SOURCE = {
    "source": str(DENSE.parent / "train.jsonl.gz"),
    "prompt": "{question}\n",
    "completion": "{answer}",
}
DATA = TrainingData(sources=[SOURCE])
SHORT = {"batch_size": 4, "max_length": 128, "save_steps": 2, "processes": 1}


def cut(src, dst, goal):
    dst.mkdir(parents=True, exist_ok=True)
    # by `max`: the pruned reasoner still solves some problems, from which GRPO can learn
    scored = Calibration(data=DATA.sources[0], num_sequences=8, max_length=128)
    prune_to(goal, src, dst, scored, criterion="max")
    return dst


def prune_to(
    goal, source, folder, calibration, *, unit="neurons", end=None, chosen=None, seed=0, **settings
):
    """Prune to so many parameters as a step does, with these settings of `prune`."""
    amounts = {"unit": unit, "goal": goal, "end": end or goal, "chosen": chosen or {}, "seed": seed}
    return prune_checkpoint(source, folder, Prune(**settings), calibration, **amounts)


def recover(
    src, dst, *stages, tokens=1500, earlier=(), last=True, log=None, data=DATA, stores=(), **more
):
    """Run the stages on `tokens` tokens after those of `earlier` iterations; logs go into the list `log`."""
    iteration = len(earlier) + 1
    weights = (1,) * (iteration if last else iteration + 1)
    budget = StageBudget(tokens, (), iteration, last, 0, weights)
    scratch = more.pop("scratch", dst.with_name(dst.name + ".training"))
    log = [] if log is None else log
    job = RecoveryJob(
        data, budget, scratch, lambda metrics, step: log.append((step, metrics)), **more
    )
    recovery = Recovery(
        stages=[{**SHORT, **stage} if stage.get("method") != "grpo" else stage for stage in stages]
    )
    return recover_checkpoint(src, dst, recovery, [*earlier, tokens], job, stores)


def as_if_died_after(step, scratch):
    """Of a training that has ended leave the checkpoint of this step alone, from which it is then resumed."""
    for path in {*scratch.glob("checkpoint-*")} - {scratch / f"checkpoint-{step}"}:
        shutil.rmtree(path)


def losses(log):
    """Tokens seen and loss at each log that has a loss."""
    return [
        (metrics["num_input_tokens_seen"], metrics["loss"])
        for _, metrics in log
        if "loss" in metrics
    ]


def weights(folder):
    return {
        name: tensor
        for path in checkpoint.shards(folder)
        for name, tensor in checkpoint.tensors(path)
    }
