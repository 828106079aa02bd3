"""The benchmarks that a user runs on machines of his own, on a CPU and a tiny model."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu
import power
import train

from ptl.preflight import forecast_model
from ptl.preflight.forecast_model import GPUS

TINY = ["--shape", "0.5M", "--steps", "4", "--warmup", "2", "--length", "32", "--batch-size", "2", "--items", "4"]
TINY += ["--new-tokens", "4", "--sequences", "4", "--repeats", "1", "--eval-batch-size", "4", "--dtype", "float32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    train.make("0.5M", folder)
    return folder


@pytest.fixture
def measured(model, monkeypatch, capsys):
    """A part's result, as its process prints it."""

    def of(part):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *TINY, "--measure", part, "--folder", str(model)])
        monkeypatch.chdir(gpu.ROOT)
        gpu.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return of


@pytest.mark.slow
def test_recovery_is_measured_beside_the_bare_loop(measured):
    found = measured("recovery")
    assert found["ptl"]["tokens_per_s"] > 0 and found["bare"]["tokens_per_s"] > 0
    assert found["ptl"]["mfu"] is None  # a CPU has no data sheet here


def test_prune_reports_seconds_and_memory(measured):
    found = measured("prune")
    assert found["params"] < 0.9 * 492_384 and found["seconds"] > 0
    assert 0.05 < found["host_gib"] < 64


@pytest.mark.parametrize("part", ["evaluate-plain", "evaluate-hf"])
def test_evaluation_is_measured_by_either(measured, part):
    found = measured(part)
    assert math.isclose(found["items_per_s"], 4 / found["seconds"])


def test_utilization_is_that_of_the_data_sheet(model):
    """By hand: 6 FLOPs per weight and token, of a causal context of n tokens on average n / 2."""
    shape = forecast_model.shape_of(str(model))
    weights = 4 * (2 * 96 * 96 + 2 * 96 * 48 + 3 * 96 * 288) + 96 * 512
    flops = 3 * forecast_model.forward_flops(shape, shape.dimensions, 1, 1024)
    assert flops == pytest.approx(6 * weights + 6 * 4 * 96 * 1024, rel=2e-3)  # norms are counted as weights
    assert gpu.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16", None) == 989e12
    assert gpu.peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None) is None
    assert gpu.peak_flops("NVIDIA H100 NVL", "bfloat16", 835e12) == 835e12
    assert set(gpu.DRIVER_NAMES.values()) == set(GPUS)


def test_the_table_has_what_was_measured_and_what_failed():
    arm = {"tokens_per_s": 50_000.0, "mfu": 0.4, "gpu_gib": 30.0}
    results = {
        "recovery": {"ptl": arm, "bare": arm | {"tokens_per_s": 62_500.0, "mfu": 0.5}},
        "prune": {"seconds": 3.0, "host_gib": 1.5, "gpu_gib": 2.0},
        "evaluate-plain": {"items_per_s": 10.0},
        "evaluate-hf": {"items_per_s": 11.0},
        "evaluate-vllm": {"error": "OutOfMemoryError: CUDA out of memory"},
    }
    table = gpu.table({"results": results})
    assert "| recovery, tokens/s | 50,000 | bare loop 62,500 | 0.800 |" in table
    assert "| recovery, MFU in % | 40.0 | bare loop 50.0 | 0.800 |" in table
    assert "| evaluation by hf, answers/s | 11.0 | plain lm-eval 10.0 | 1.100 |" in table
    assert "evaluate-vllm failed: OutOfMemoryError: CUDA out of memory" in table


def test_a_failed_part_is_a_result(measured, monkeypatch):
    def too_large(model, given):
        raise MemoryError("CUDA out of memory\nmore lines")

    monkeypatch.setitem(gpu.PARTS, "prune", too_large)
    assert measured("prune") == {"error": "MemoryError: CUDA out of memory"}


def test_power_grows_with_the_items_and_the_drop():
    shares = {
        (n, drop): power.power(n, drop, churn=0.03, margin=0.02, alpha=0.05, trials=300)
        for n in (200, 1319)
        for drop in (0.0, 0.06)
    }
    assert all(sum(verdicts.values()) == pytest.approx(1) for verdicts in shares.values())
    assert shares[200, 0.0]["inferior"] <= 0.05
    assert shares[200, 0.06]["inferior"] < shares[1319, 0.06]["inferior"]
    assert shares[1319, 0.06]["inferior"] > 0.95
    assert shares[1319, 0.0]["not inferior"] > 0.8
