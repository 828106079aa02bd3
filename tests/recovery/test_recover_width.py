"""Recovery of a reasoner with a smaller hidden size and fewer KV heads: its teacher, adapters and optimizer state."""

import math

import pytest
import torch
from recovering import DATA, DENSE, losses, prune_to, recover, weights

from ptl.config.run import Calibration
from ptl.model import checkpoint

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("recover_width")]
CPT, DISTIL = {"method": "cpt"}, {"method": "distil"}


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
    report = recover(second, out, stage, tokens=600, earlier=(300,), last=False, teacher=DENSE, log=log)
    assert report.tokens == 600 and all(math.isfinite(loss) for _, loss in losses(log))
    before, after = weights(second), weights(out)
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert after.keys() == before.keys() and any("q_proj" in name for name in moved)
    # Adapters have no optimizer state that pruning could select from.
    assert (out / checkpoint.STATE).exists() == ("lora" not in stage)
    if "lora" not in stage:
        steps = [dict(checkpoint.tensors(folder / checkpoint.STATE))["step"] for folder in (second, out)]
        assert steps[1] == steps[0] + report.steps
