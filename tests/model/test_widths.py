"""Sizes that width pruning chooses from, and those on the way to them."""

from contextlib import suppress
from dataclasses import replace
from functools import cache, reduce
from operator import or_

import pytest
from tiny_models import MOE_VARIANTS, SIZES, VARIANTS, build

from ptl.errors import InputError
from ptl.model import shapes
from ptl.model.dimensions import dimensions_of, resolve_multiple, width_for
from ptl.model.families import FAMILIES
from ptl.model.widths import candidates, towards

EVERY = VARIANTS | MOE_VARIANTS
FREE = {"hidden": None, "ffn": None, "kv": None}
REASONER = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "vocab_size": 256}
REASONER |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
# What differs from the model that transformers' defaults describe
MODELS = {
    "llama": ("llama", {"num_key_value_heads": 8}),  # hidden size 4096, FFN width 11008, 32 heads
    "reasoner": ("llama", REASONER),
    "mixtral": ("mixtral", {}),
    "deepseek": ("deepseek_v3", {"num_hidden_layers": 8}),
    "cohere": ("cohere2", {}),
    "olmo": ("olmo2", {"num_key_value_heads": 8}),
    "tiny": ("llama", SIZES),
    "mixture": ("qwen3_moe", SIZES | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
}


@cache
def dimensions(name):
    model_type, fields = MODELS[name]
    return dimensions_of(shapes.of_config({"model_type": model_type, **fields}, FAMILIES[model_type], "config.json"))


@pytest.mark.parametrize("variant", EVERY)
def test_parameters_are_those_of_the_narrower_model(variant):
    """Of each size by itself, and of all together, as transformers builds it."""
    config = build(variant).config
    content = config.to_dict()
    family = FAMILIES[content["model_type"]]
    before = dimensions_of(shapes.of_config(content, family, "config.json"))
    heads = before.groups // 2
    in_config = {"num_key_value_heads": heads, "num_attention_heads": heads * before.heads_per_group}
    sizes = {
        "hidden": ({"hidden": 24}, {"hidden_size": 24}),
        "kv": ({"groups": heads}, in_config),
        "ffn": ({"width": 16}, {family.width_field: 16}),
        "experts": ({"experts": 4}, dict.fromkeys(family.experts.counts if family.experts else (), 4)),
    }
    other = {"experts"} if before.narrowable else {"ffn"}
    cases = [case for name, case in sizes.items() if name not in before.fixed.keys() | other]
    cases.append(tuple(reduce(or_, parts) for parts in zip(*cases, strict=True)))
    for planned, fields in cases:
        narrow = shapes.of_config(content | {"head_dim": config.head_dim} | fields, family, "config.json")
        assert replace(before, **planned) == dimensions_of(narrow), planned
        assert replace(before, **planned).params == narrow.params, planned


# ---- where a loop ends


@pytest.fixture(params=MODELS)
def model(request):
    return dimensions(request.param)


@pytest.mark.parametrize("multiple", ["auto", 1, 24])
def test_candidates_have_as_many_parameters_as_the_goal_allows(model, multiple):
    is_small = model.hidden < 64
    for share in () if is_small and multiple == 24 else (0.9, 0.7, 0.5, 0.4):
        goal = int(share * model.params)
        found = candidates(model, goal, multiple, FREE)
        with suppress(InputError):  # where the FFN does it alone, that is one of them
            width_for(model, goal, multiple)
            assert (found[0].hidden, found[0].groups) == (model.hidden, model.groups)
        assert len({(each.hidden, each.width, each.groups, each.experts) for each in found}) == len(found)
        for each in found:
            step = resolve_multiple(model.width, each.width, multiple, model.least_multiple)
            wider = replace(each, width=each.width + step)
            if not model.narrowable:
                wider = replace(each, experts=each.experts + model.expert_groups)
            # The FFN of a small model may have nothing more to give.
            assert each.params <= goal and (goal < wider.params or is_small)
            assert each.width % step == 0 if model.narrowable else each.width == model.width
            assert each.hidden == model.hidden or "hidden" not in model.fixed
            assert each.hidden % each.heads == each.hidden % model.least_multiple == 0
            assert multiple != 24 or each.hidden == model.hidden or each.hidden % 24 == 0
            assert each.groups in ({model.groups} if "kv" in model.fixed else {model.groups, model.groups // 2})


def test_goals_that_are_met_or_out_of_reach(model):
    assert candidates(model, model.params, "auto", FREE) == [model]
    for ends in (FREE, FREE | {"ffn": model.width}, FREE | {"hidden": model.hidden, "kv": model.groups}):
        with pytest.raises(InputError, match="1,000 parameters cannot be reached by width") as refused:
            candidates(model, 1000, "auto", ends)
        assert refused.value.field == "schedule.target"


def test_sizes_that_are_set_stay_and_the_others_take_what_is_left():
    llama = dimensions("llama")
    goal = llama.params // 2

    def found(multiple=64, goal=goal, **ends):
        return candidates(llama, goal, multiple, FREE | ends)

    for each in found(hidden=3072):
        assert each.hidden == 3072 and each.params <= goal < replace(each, width=each.width + 64).params
    for each in found(ffn=5504):  # the largest hidden size with it
        assert each.width == 5504 and each.params <= goal < replace(each, hidden=each.hidden + 64).params
    assert [each.groups for each in found(ffn=5504)] == [each.groups for each in found(hidden=3072)] == [8, 4]
    assert {each.groups for each in found(kv=2)} == {2} and len(found(kv=2)) == 4
    (each,) = found(hidden=3072, kv=2)
    assert (each.hidden, each.groups) == (3072, 2) and each.params <= goal < replace(each, width=each.width + 64).params
    (each,) = found(ffn=7040, kv=2)
    assert (each.width, each.groups) == (7040, 2)
    assert each.params <= goal < replace(each, hidden=each.hidden + 64).params
    assert [each.groups for each in found(hidden=3072, ffn=5504)] == [8, 4]
    assert found(hidden=3072, ffn=5504, kv=2) == [replace(llama, hidden=3072, width=5504, groups=2)]
    # They need not be used up, and must do.
    assert found(hidden=1024) == [replace(llama, hidden=1024, groups=groups) for groups in (8, 4)]
    with pytest.raises(InputError, match="cannot be reached by width"):
        found(hidden=4096, ffn=5504, kv=8)


@pytest.mark.parametrize(
    ("name", "ends", "said"),
    [
        ("llama", {"hidden": 4128}, "hidden: 4128 is more than the model's 4096; lower it"),
        ("llama", {"ffn": 11009}, "ffn: 11009 is more than the model's 11008; lower it"),
        ("llama", {"kv": 9}, "kv: 9 is more than the model's 8; lower it"),
        ("cohere", {"hidden": 4096}, "hidden: 4096 cannot be had: .* it stays 8192, as its norms subtract a mean"),
        ("olmo", {"kv": 4}, "kv: 4 cannot be had: .* it stays 8, as a norm is over all of its heads together"),
        ("deepseek", {"ffn": 1024}, "ffn: 1024 cannot be had: .* it stays 2048, as not all of its layers have experts"),
        ("llama", {"hidden": 4010}, "hidden: 4010 is no multiple of 32: .*; set 4000"),
        ("llama", {"hidden": 20}, "hidden: 20 is no multiple of 32: .*; set 32"),
        ("llama", {"hidden": 4016, "kv": 2}, None),  # eight query heads are left
        ("tiny", {"hidden": 28}, None),
        ("mixture", {"hidden": 28}, "hidden: 28 is no multiple of 8: .*; set 24"),
        ("cohere", {"hidden": 8192}, None),
    ],
)
def test_sizes_that_a_model_cannot_have_are_refused(name, ends, said):
    model = dimensions(name)
    goal = int(model.params * 0.6)
    if said is None:
        assert candidates(model, goal, 1, FREE | ends)
        return
    with pytest.raises(InputError, match=rf"^prune\.width\.{said}"):
        candidates(model, goal, 1, FREE | ends)


# ---- on the way


@pytest.mark.parametrize("iterations", [3, 8])
@pytest.mark.parametrize("share", [0.6, 0.45])
def test_every_iteration_is_smaller_than_the_last_and_not_below_the_end(model, share, iterations):
    goals = [int(model.params * (1 - (1 - share) * i / iterations)) for i in range(1, iterations + 1)]
    for end in candidates(model, goals[-1], "auto", FREE):
        path = [model]
        for goal in goals:
            # The last one takes what is left.
            path.append(end if goal == goals[-1] else towards(path[-1], end, goal, "auto"))
            assert path[-1].params <= goal
            assert path[-1].hidden % path[-1].heads == path[-1].hidden % model.least_multiple == 0
            for name in ("hidden", "width", "groups", "experts"):
                assert getattr(path[-2], name) >= getattr(path[-1], name) >= getattr(end, name), (name, end)
        # Each iteration chooses anew: whatever it took on the way, there is a way on.
        for reached in path:
            assert all(each.params <= goals[-1] for each in candidates(reached, goals[-1], "auto", FREE))


def test_kv_heads_go_in_the_iteration_whose_part_is_as_large():
    llama = dimensions("llama")
    end = next(each for each in candidates(llama, llama.params // 2, "auto", FREE) if each.groups == 4)
    without = replace(llama, groups=4).params
    assert towards(llama, end, without, "auto").groups == 4
    early = towards(llama, end, without + 1, "auto")
    assert early.groups == 8 and early.width < llama.width
    # Nor the hidden size: it has fallen by half when half of the parameters have gone.
    end = candidates(llama, llama.params // 2, "auto", FREE)[3]
    halfway = towards(llama, end, (llama.params + end.params) // 2, "auto")
    assert (end.hidden, halfway.hidden) == (3200, 3712)
    assert towards(llama, end, llama.params + 1, "auto") == llama and towards(llama, end, end.params, "auto") == end
