"""The benchmark that a user runs on GPUs of his own, with a tiny model."""

import json
import sys

import pytest
from checkout import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.mark.nightly
@pytest.mark.parametrize("part", ["recovery", "prune", "evaluate-plain", "evaluate-hf"])
def test_every_part_is_measured(part, tmp_path, monkeypatch, capsys):
    import gpu
    import train

    train.make("0.5M", tmp_path)
    tiny = "--shape 0.5M --steps 4 --warmup 2 --length 32 --batch-size 2 --items 4 --new-tokens 4 --sequences 4"
    options = [
        *tiny.split(),
        "--repeats",
        "1",
        "--gpu",
        "h100",
        "--eval-batch-size",
        "4",
        "--dtype",
        "float32",
    ]
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", *options, "--measure", part, "--folder", str(tmp_path)]
    )
    monkeypatch.chdir(gpu.ROOT)
    gpu.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    if part == "recovery":
        assert found["ptl"]["tokens_per_s"] > 0 and found["bare"]["tokens_per_s"] > 0
        assert found["peak_flops"] == 67e12 and 0 < found["ptl"]["mfu"] < 1
    elif part == "prune":
        assert found["params"] < 0.9 * 492_384 and found["seconds"] > 0
    else:
        assert found["items_per_s"] == pytest.approx(4 / found["seconds"])
