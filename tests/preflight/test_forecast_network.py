"""What GPUs send each other: bytes by hand, and the seconds that compute does not hide."""

from dataclasses import replace

import pytest

from ptl.config.recover import Cpt, Lora
from ptl.preflight.forecast_model import GpuGroup, Shape
from ptl.preflight.forecast_network import LINK_SHARE, Exchange, exchange, ring_seconds, waiting_seconds
from ptl.preflight.gpus import GPUS

CARD = replace(GPUS["h100"], link=400e9 / LINK_SHARE, network=10e9 / LINK_SHARE)  # bytes/s that are reached: 400, 10 G
SHAPE = Shape(
    params=8 * 10**9,
    matrices=7 * 10**9,
    layers=32,
    hidden=4096,
    vocabulary=128_000,
    heads_width=4096,
    kv_bytes=131_072,
    itemsize=2,
)
NODE, NODES = GpuGroup(8), GpuGroup(8, 4)


def sent(group, **changes):
    return exchange(SHAPE, Cpt(dtype="bfloat16", **changes), group, CARD)


def test_a_ring_passes_on_all_but_a_gpus_own_part():
    assert ring_seconds(8e9, NODE, CARD) == pytest.approx(7e9 / 400e9)
    assert ring_seconds(8e9, GpuGroup(1), CARD) == 0


def test_a_ring_through_nodes_uses_all_adapters_of_a_node():
    """Eight of 10 GB/s are slower than a link of 400; eight of 100 are not."""
    assert ring_seconds(32e9, NODES, CARD) == pytest.approx(31e9 / 80e9)
    fast = replace(CARD, network=100e9 / LINK_SHARE)
    assert ring_seconds(32e9, NODES, fast) == pytest.approx(31e9 / 400e9)


def test_copies_reduce_float32_gradients_once_for_each_optimizer_step():
    """An all-reduce is a reduce-scatter and an all-gather."""
    copies = sent(NODE)
    assert (copies.forward, copies.backward) == (0, 0)
    assert copies.update == pytest.approx(2 * 7 / 8 * 32e9 / 400e9)


def test_fsdp_gathers_twice_and_reduces_once_for_each_pass():
    """In bfloat16, as accelerate sets it for weights and gradients; without it in float32."""
    once = 31 / 32 * 16e9 / 80e9
    sharded = sent(NODES, sharding="fsdp")
    assert sharded.forward == pytest.approx(once)
    assert sharded.total(passes=1) == pytest.approx(3 * once)
    single = exchange(SHAPE, Cpt(dtype="float32", sharding="fsdp"), NODES, CARD)
    assert single.total(passes=1) == pytest.approx(2 * sharded.total(passes=1))
    assert sharded.total(passes=4) > sharded.total(passes=1) + 3 * 2 * once - 1e-9


def test_an_adapter_sends_nothing_that_counts():
    assert sent(NODES, lora=Lora()) == Exchange(0, 0, 0)
    whole = sent(NODES, sharding="fsdp")
    assert sent(NODES, sharding="fsdp", lora=Lora()) == Exchange(whole.forward, whole.forward, 0)


def test_only_what_is_longer_than_the_compute_beside_it_is_waited_for():
    """Four passes of 1 s forward and 2 s backward; each weight and gradient can hide behind its own pass only."""
    assert waiting_seconds(Exchange(1, 2, 0), 1, 2, passes=4) == 0
    assert waiting_seconds(Exchange(1.5, 2, 0), 1, 2, passes=4) == pytest.approx(4 * 0.5)
    assert waiting_seconds(Exchange(0, 2.5, 0), 1, 2, passes=4) == pytest.approx(4 * 0.5)
    assert waiting_seconds(Exchange(0, 0, 3), 1, 2, passes=4) == pytest.approx(1)  # the last backward pass only
    assert waiting_seconds(Exchange(0, 1, 3), 1, 2, passes=4) == pytest.approx(2)
