"""Sizes that width pruning chooses from, and those on the way to them."""

import math
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cache, reduce
from itertools import product
from operator import or_

import pytest
from tiny_models import DAILY, MOE_VARIANTS, SIZES, VARIANTS, build, nightly_but

from ptl.errors import InputError
from ptl.model import shapes
from ptl.model.checkpoint import OUTPUT_LAYER
from ptl.model.dimensions import dimensions_of, experts_for, width_for
from ptl.model.families import FAMILIES
from ptl.model.widths import FFN_SHARE, ROUNDED, _step, candidates, towards

FREE = {"hidden": None, "ffn": None, "kv": None}
REASONER = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "vocab_size": 256}
REASONER |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
# More than its share in embeddings
GEMMA = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "vocab_size": 262144,
}
GEMMA |= {"num_attention_heads": 4, "num_key_value_heads": 1}
# What differs from the model that transformers' defaults describe
MODELS = {
    "llama": ("llama", {"num_key_value_heads": 8}),  # hidden size 4096, FFN width 11008, 32 heads
    "reasoner": ("llama", REASONER),
    "mixtral": ("mixtral", {}),
    "deepseek": ("deepseek_v3", {"num_hidden_layers": 8}),
    "cohere": ("cohere2", {}),
    "olmo": ("olmo2", {"num_key_value_heads": 8}),
    "gemma": ("gemma3_text", GEMMA),
    "tiny": ("llama", SIZES),
    "mixture": (
        "qwen3_moe",
        SIZES | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
}


@cache
def dimensions(name):
    model_type, fields = MODELS[name]
    return dimensions_of(
        shapes.of_config({"model_type": model_type, **fields}, FAMILIES[model_type], "config.json")
    )


@pytest.mark.parametrize("variant", nightly_but(*DAILY, of=VARIANTS | MOE_VARIANTS))
def test_parameters_are_those_of_the_narrower_model(variant):
    """Of each size by itself, and of all together, as transformers builds it."""
    config = build(variant).config
    content = config.to_dict()
    family = FAMILIES[content["model_type"]]
    before = dimensions_of(shapes.of_config(content, family, "config.json"))
    heads = before.kv_heads // 2
    in_config = {
        "num_key_value_heads": heads,
        "num_attention_heads": heads * before.heads_per_kv_head,
    }
    sizes = {
        "hidden": ({"hidden": 24}, {"hidden_size": 24}),
        "kv": ({"kv_heads": heads}, in_config),
        "ffn": ({"width": 16}, {family.width_field: 16}),
        "experts": (
            {"experts": 4},
            dict.fromkeys(family.experts.counts if family.experts else (), 4),
        ),
    }
    other = {"experts"} if before.narrowable else {"ffn"}
    cases = [case for name, case in sizes.items() if name not in before.fixed.keys() | other]
    cases.append(tuple(reduce(or_, parts) for parts in zip(*cases, strict=True)))
    for planned, fields in cases:
        narrow = shapes.of_config(
            content | {"head_dim": config.head_dim} | fields, family, "config.json"
        )
        assert replace(before, **planned) == dimensions_of(narrow), planned
        own = narrow.tensors.keys() - ({OUTPUT_LAYER} if narrow.tied else set())
        counted = sum(narrow.tensors[name].numel() for name in own)
        assert replace(before, **planned).params == counted, planned


# ---- where a loop ends


@pytest.fixture(params=MODELS)
def model(request):
    return dimensions(request.param)


def ffn_share(sizes):
    return 1 - replace(sizes, width=0).params / sizes.params


def filled(sizes, whole, goal, multiple):
    """With as much of the whole model's FFN as the goal leaves room for."""
    sizes = replace(sizes, width=whole.width, experts=whole.experts)
    if sizes.narrowable:
        return replace(sizes, width=width_for(sizes, goal, multiple))
    return replace(sizes, experts=experts_for(sizes, goal))


def test_candidates_have_as_many_parameters_as_the_goal_allows(model):
    """And no larger hidden size leaves the FFN its share."""
    multiples = ("auto", 1) if model.hidden < 64 else ("auto", 1, 24)
    for multiple, part in product(multiples, (0.9, 0.7, 0.5, 0.3)):
        goal = int(part * model.params)
        for each in candidates(model, goal, multiple, FREE):
            assert each.params <= goal and each == filled(each, model, goal, multiple)
            is_whole = (each.width, each.experts) == (model.width, model.experts)
            step = _step(model, each.heads, multiple)
            narrower = replace(
                each, hidden=each.hidden - step, width=model.width, experts=model.experts
            )
            # so that the FFN has to be narrower than it should
            overshoots = narrower.params < ROUNDED * goal
            assert ffn_share(each) >= FFN_SHARE or is_whole or overshoots or "hidden" in model.fixed
            assert each.hidden == model.hidden or "hidden" not in model.fixed
            assert each.hidden % each.heads == each.hidden % model.least_multiple == 0
            assert multiple != 24 or each.hidden == model.hidden or each.hidden % 24 == 0
            if multiple == 1 and each.hidden < model.hidden:
                step = math.lcm(each.heads, model.least_multiple)
                with suppress(InputError):  # the FFN would get too narrow for anything
                    larger = filled(replace(each, hidden=each.hidden + step), model, goal, multiple)
                    assert ffn_share(larger) < FFN_SHARE


def test_the_ffn_goes_alone_where_it_keeps_its_share():
    for name, share, expected, of_auto in (
        ("llama", 0.5, [(4096, 3456, 8)], None),
        ("llama", 0.4, [(4096, 3584, 4), (3712, 2560, 8)], None),
        ("mixtral", 0.1, [(4096, 960, 8)], None),
        # Eight neurons of each expert would be far fewer than asked for.
        ("mixture", 0.6, [(32, 8, 1), (24, 16, 2)], None),
        ("deepseek", 0.2, [(7168, 2048, 128)], None),  # experts alone
        ("deepseek", 0.1, [(5632, 2048, 64), (5120, 2048, 128)], None),
        # With both KV heads the whole FFN would stay, and less than the goal.
        ("tiny", 0.5, [(32, 15, 1)], None),
        # What cannot be pruned stays, and what not every runtime loads.
        ("olmo", 0.4, [(3456, 2816, 8)], [(4096, 1664, 8)]),
        ("cohere", 0.7, [(8192, 11776, 64)], None),
        ("cohere", 0.5, [(8192, 10112, 32), (8192, 4608, 64)], [(8192, 4608, 64)]),
        # The FFN never had its share.
        ("gemma", 0.61, [(384, 2048, 1)], None),
        # the next hidden size alone would leave a tenth less
        ("gemma", 0.9, [(576, 1920, 1)], None),
    ):
        model = dimensions(name)
        for ends, sizes in ((FREE, expected), (None, of_auto or expected)):
            found = candidates(model, int(share * model.params), "auto", ends)
            assert [(each.hidden, each.width, each.kv_heads) for each in found] == sizes, (
                name,
                share,
            )
            assert all(each.fixed == model.fixed for each in found)  # nothing else is changed


def test_goals_that_are_met_or_out_of_reach(model):
    assert candidates(model, model.params, "auto", FREE) == [model]
    whole = {"hidden": model.hidden, "kv": model.kv_heads}
    for ends in (FREE, None, FREE | {"ffn": model.width}, FREE | whole):
        with pytest.raises(
            InputError, match=r"^schedule\.target: 500 parameters cannot be reached by"
        ):
            candidates(model, 500, "auto", ends)


def test_sizes_that_are_set_stay_and_the_others_take_what_is_left():
    llama = dimensions("llama")
    goal = llama.params // 2

    def found(multiple=64, goal=goal, **ends):
        return candidates(llama, goal, multiple, FREE | ends)

    def is_largest(each, **larger):
        return each.params <= goal < replace(each, **larger).params

    for each in found(hidden=3072):
        assert each.hidden == 3072 and is_largest(each, width=each.width + 64)
    for each in found(ffn=5504):  # the largest hidden size with it
        assert each.width == 5504 and is_largest(each, hidden=each.hidden + 64)
    assert (
        [each.kv_heads for each in found(ffn=5504)]
        == [each.kv_heads for each in found(hidden=3072)]
        == [4, 8]
    )
    assert found(ffn=3456) == [replace(llama, width=3456)]
    for ends, hidden in (({"kv": 2}, 4096), ({"hidden": 3072, "kv": 2}, 3072)):
        (each,) = found(**ends)
        assert (each.hidden, each.kv_heads) == (hidden, 2) and is_largest(
            each, width=each.width + 64
        )
    (each,) = found(ffn=7040, kv=2)
    assert (each.width, each.kv_heads) == (7040, 2) and is_largest(each, hidden=each.hidden + 64)
    (each,) = found(multiple=1, kv=3)  # twelve query heads are left, which do not divide 4096
    assert (each.hidden, each.kv_heads) == (4092, 3)
    assert [each.kv_heads for each in found(hidden=3072, ffn=5504)] == [4, 8]
    fixed = replace(llama, hidden=3072, width=5504, kv_heads=2)
    assert found(goal=int(fixed.params / 0.95), hidden=3072, ffn=5504, kv=2) == [fixed]
    # They must do, and not alone remove much more.
    with pytest.raises(
        InputError, match=rf"leave {fixed.params:,} parameters or fewer, .*; set {fixed.params} or"
    ):
        found(hidden=3072, ffn=5504, kv=2)
    with pytest.raises(InputError, match=r"cannot be reached by width"):
        found(hidden=4096, ffn=5504, kv=8)


def test_sizes_that_a_model_cannot_have_are_refused():
    for name, ends, said in (
        ("llama", {"hidden": 4128}, "hidden: 4128 is more than the model's 4096; lower it"),
        ("llama", {"ffn": 11009}, "ffn: 11009 is more than the model's 11008; lower it"),
        ("llama", {"kv": 9}, "kv: 9 is more than the model's 8; lower it"),
        (
            "cohere",
            {"hidden": 4096},
            "hidden: 4096 cannot be had: .* it stays 8192, as its norms subtract a mean",
        ),
        (
            "olmo",
            {"kv": 4},
            "kv: 4 cannot be had: .* it stays 8, as a norm is over all of its heads together",
        ),
        (
            "deepseek",
            {"ffn": 1024},
            "ffn: 1024 cannot be had: .* it stays 2048, as not all of its layers have experts",
        ),
        ("llama", {"hidden": 4010}, "hidden: 4010 is no multiple of 32 .*; set 4000"),
        ("llama", {"hidden": 20}, "hidden: 20 is no multiple of 32 .*; set 32"),
        ("llama", {"hidden": 4016, "kv": 2}, None),  # eight query heads are left
        ("tiny", {"hidden": 28}, None),
        ("mixture", {"hidden": 28}, "hidden: 28 is no multiple of 8 .*; set 24"),
        ("cohere", {"hidden": 8192}, None),
    ):
        model = dimensions(name)
        with pytest.raises(InputError, match=rf"^prune\.width\.{said}") if said else nullcontext():
            assert candidates(model, int(model.params * 0.6), 1, FREE | ends)


# ---- on the way


@pytest.mark.parametrize(
    ("share", "iterations"), nightly_but((0.6, 8), (0.35, 3), of=product((0.6, 0.35), (3, 8)))
)
def test_every_iteration_is_smaller_than_the_last_and_not_below_the_end(model, share, iterations):
    goals = [
        int(model.params * (1 - (1 - share) * i / iterations)) for i in range(1, iterations + 1)
    ]
    for end in candidates(model, goals[-1], "auto", FREE):
        path = [model]
        for goal in goals:
            # The last one takes what is left.
            path.append(end if goal == goals[-1] else towards(path[-1], end, goal, "auto"))
            assert path[-1].params <= goal
            assert path[-1].hidden % path[-1].heads == path[-1].hidden % model.least_multiple == 0
            for name in ("hidden", "width", "kv_heads", "experts"):
                assert getattr(path[-2], name) >= getattr(path[-1], name) >= getattr(end, name), (
                    name,
                    end,
                )


def test_kv_heads_go_where_a_part_is_as_large_and_an_iteration_is_as_small_as_the_gate_says():
    llama = dimensions("llama")
    end, with_all = candidates(llama, int(llama.params * 0.3), "auto", FREE)
    without = replace(llama, kv_heads=4).params
    assert towards(llama, end, without, "auto").kv_heads == end.kv_heads == 4
    early = towards(llama, end, without + 1, "auto")
    assert early.kv_heads == 8 and early.width < llama.width
    # Nor the hidden size: it has fallen by half when half of the parameters have gone, by whole multiples of 128.
    removed = llama.params - with_all.params
    half, third = (
        towards(llama, with_all, llama.params - removed // part, "auto") for part in (2, 3)
    )
    assert (with_all.hidden, half.hidden, third.hidden) == (2816, 3456, 3712)
    assert (
        towards(llama, end, llama.params + 1, "auto") == llama
        and towards(llama, end, end.params, "auto") == end
    )
    # Also where KV heads are among what goes.
    model = dimensions("reasoner")
    for end, removed in product(
        candidates(model, int(model.params * 0.25), 1, FREE), (92_601, 25_000, 1_000)
    ):
        found = model.params - towards(model, end, model.params - removed, 1).params
        assert removed <= found < removed + model.params_per_neuron
