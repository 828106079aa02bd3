"""What init and plan find out about this machine: its GPU by CUDA's name, and the speed of its CPU."""

import json
from types import SimpleNamespace

import pytest
import torch
from checkout import TINY

from ptl.config.run import load_config
from ptl.errors import InputError
from ptl.preflight import machine, remedies
from ptl.preflight.forecast import forecast
from ptl.preflight.forecast_model import GPUS, NO_GPU, Gpu, forward_flops


def with_card(monkeypatch, name):
    """A machine with such a card, or with none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    sizes = SimpleNamespace(total_memory=24 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: sizes)


def test_a_card_is_known_by_cudas_name(monkeypatch):
    cards = {
        "Tesla T4": "t4",
        "NVIDIA L4": "l4",
        "NVIDIA A10": "a10",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "NVIDIA A100-PCIE-40GB": "a100-40",
        "NVIDIA A100-SXM4-80GB": "a100-80",
        "NVIDIA L40S": "l40s",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA H200": "h200",
        "NVIDIA B200": "b200",
    }
    assert {name: machine.kind_of(name) for name in cards} == cards and set(cards.values()) == set(
        GPUS
    )
    with_card(monkeypatch, "NVIDIA GeForce RTX 3090")
    with pytest.raises(
        InputError,
        match=r"^--gpu: this machine's .* RTX 3090 \(24 GiB\) is not known; name the kind",
    ):
        machine.gpu()
    with_card(monkeypatch, "NVIDIA L4")
    assert machine.gpu() == "l4"
    with_card(monkeypatch, None)
    assert machine.gpu() == NO_GPU


def test_hours_on_a_cpu_are_of_what_it_reaches(monkeypatch):
    slow = Gpu(16, 0.002, 0.001, 0.01, reached=1.0, decoded=1.0, layer_seconds=0.5)
    monkeypatch.setattr(machine, "cpu", lambda *_: slow)
    run = forecast(
        load_config(TINY, {"resources.accelerator": "nvidia.com/gpu", "resources.accelerators": 4}),
        NO_GPU,
    )
    step = run.of("recover")[0]
    trained = 3 * forward_flops(run.shape, step.model, step.tokens, 256)
    assert step.hours == pytest.approx(trained / 1e9 / 3600)
    # Each of 60 tokens of an answer goes through four layers; 500 items are four batches.
    assert run.of("evaluate")[0].hours * 3600 > 4 * 60 * 4 * 0.5
    assert run.gpu_hours == 0 and {step.gpus for step in run.steps} == {1}
    # Batches and memory are as on a GPU; there is nothing to share with.
    monkeypatch.setattr(machine, "cpu", lambda *_: Gpu(0.1, 1, 1, 1))
    said = " ".join(remedies.warnings(forecast(load_config(TINY), NO_GPU)))
    assert (
        "GiB of memory, this machine has 0 GiB: no setting makes it fit here: take a GPU (t4,"
        in said
    )
    assert "fsdp" not in said and "vllm" not in said


def test_the_cpu_is_measured(monkeypatch):
    monkeypatch.setattr(machine, "MEASURED", 0.01)
    machine.cpu.cache_clear()
    measured = machine.cpu(256, 512)
    assert 1e9 < measured.flops("float32") < 1e14 and 1e-6 < measured.layer_seconds < 0.1
    assert measured.gib > 0.5 and measured.bandwidth > 1e-4


def test_plan_takes_the_cpu_where_nothing_else_is_asked_for(ptl, monkeypatch):
    monkeypatch.setattr(machine, "cpu", lambda *_: Gpu(16, 0.1, 0.1, 0.1, reached=1.0, decoded=1.0))
    with_card(monkeypatch, None)
    code, said = ptl("plan", TINY)
    assert code == 0 and "parameters on this machine's CPU: " in said and "GPU" not in said, said
    kinds = {(): NO_GPU, ("--gpu", "l4"): "l4", ("--count", "2"): "h100"}
    kinds[
        ("--set", "resources.accelerator=nvidia.com/gpu", "--set", "resources.accelerators=1")
    ] = "h100"
    for options, kind in kinds.items():
        assert planned_kind(ptl, *options) == kind, options
    with_card(monkeypatch, "NVIDIA L4")
    assert planned_kind(ptl) == "l4"
    assert planned_kind(ptl, "--gpu", "none") == NO_GPU


def planned_kind(ptl, *options):
    """The GPU of a plan; warnings come behind the JSON."""
    document, _ = json.JSONDecoder().raw_decode(ptl("plan", TINY, "--json", *options)[1])
    return document["gpu"]
