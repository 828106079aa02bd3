"""Neurons or experts go, alone or with hidden size and KV heads, and logits stay those of the masked original."""

import math
from dataclasses import replace

import pytest
import tiny_models
import torch
from recovering import prune_to
from tiny_models import (
    DAILY,
    MOE_VARIANTS,
    NARROW_VARIANTS,
    VARIANTS,
    batches,
    build,
    family_at,
    load,
    logits,
    save,
)
from torch import nn

from ptl.config.chat import NO_CHAT
from ptl.model import axes, checkpoint, dimensions
from ptl.model.dimensions import model_dimensions
from ptl.model.families import FAMILIES
from ptl.pruning.importance import all_width_scores, neuron_scores
from ptl.pruning.layerwise import LayerwiseModel
from ptl.pruning.prune import _batches
from ptl.pruning.surgery import Selection, write_pruned

pytestmark = pytest.mark.usefixtures("one_thread")
ALL, LAYERS = (0, 1, 2, 3), (0, 2, 3)
UNITS = [(variant, "neurons") for variant in (*VARIANTS, *NARROW_VARIANTS)]
UNITS += [(variant, "experts") for variant in MOE_VARIANTS]
CASES = [(*unit, narrow) for unit in UNITS for narrow in (True, False)]
BY_DAY = [(variant, unit, narrow) for variant, unit, narrow in CASES if narrow or variant in DAILY]
# Fields of config.json that follow the layers
OF_LAYERS = {"num_hidden_layers", "layer_types", "no_rope_layers", "max_window_layers"}
# What cannot be pruned exactly: attention as wide as the hidden size, norms that subtract a mean, or over all heads
FIXED = {
    "helium": {"hidden", "kv"},
    "olmoe": {"hidden", "kv"},
    "cohere2": {"hidden"},
    "olmo2": {"kv"},
    "olmo3": {"kv"},
}
FIXED |= {"phi3-longrope": {"hidden", "kv"}, "phi3-longrope-partial": {"hidden", "kv"}}
# Norms of queries and keys keep their size, and have the epsilon of the others, which grows by 32 / 20: it is too small
# to be measured in these
NO_EPSILON = {"rms_norm_eps": 1e-12}
EXACT = 5e-5  # of the largest logit: sums are in another order


def some(count, layers, *sizes, seed=5):
    """So many of each of the last size, others in each layer, ascending."""
    orders = torch.rand(len(layers), *sizes, generator=torch.Generator().manual_seed(seed)).argsort(
        dim=-1
    )
    return dict(zip(layers, orders[..., :count].sort(dim=-1).values, strict=True))


def selection_of(variant, unit=None, layers=LAYERS, narrow=True):
    """Some of the unit, by default neurons where the variant has any; `narrow`: and of hidden size and KV heads."""
    model, fixed = build(variant), FIXED.get(variant, ()) if narrow else ("hidden", "kv")
    selection, heads = Selection(layers, {}), axes.kv_heads(model.config)
    if (unit or dict(reversed(UNITS))[variant]) == "neurons":
        neurons = some(16, layers, *[6] * (variant in MOE_VARIANTS), tiny_models.width_of(variant))
        selection = replace(selection, neurons=neurons)
    else:
        with_experts = [i for i in layers if hasattr(model.get_decoder().layers[i].mlp, "experts")]
        selection = replace(selection, experts=some(4, with_experts, 6))
    hidden = None if "hidden" in fixed else some(20, [0], 32)[0]
    return replace(
        selection, hidden=hidden, kv_heads={} if "kv" in fixed else some(heads // 2, layers, heads)
    )


def masked(model, family, selection):
    """The original without what goes: the reference."""
    everything = torch.arange(model.config.hidden_size)
    kept = everything if selection.hidden is None else selection.hidden
    stream = torch.zeros(len(everything)).index_fill(0, kept, 1)
    nothing = torch.zeros(axes.kv_heads(model.config))
    heads = {i: nothing.index_fill(0, kept, 1) for i, kept in selection.kv_heads.items()}
    model = tiny_models.avoiding(tiny_models.skipping(model, selection.layers), selection.experts)
    return tiny_models.multiplied(
        tiny_models.silenced(model, family, selection.neurons), stream, heads
    )


def differences(model, reference):
    """The largest difference of each token's logits, as a part of the largest logit."""
    pairs = [(logits(model, batch), logits(reference, batch)) for batch in batches()]
    return torch.cat([(one - other).abs().amax(dim=1) / other.abs().max() for one, other in pairs])


@pytest.mark.parametrize(("variant", "unit", "narrow"), tiny_models.nightly_but(*BY_DAY, of=CASES))
def test_a_pruned_model_equals_the_masked_original(variant, unit, narrow, tmp_path):
    """With a layer less or with all, in one file or in shards, in both layouts of mixtures; saved and read again."""
    layers = ALL if variant in MOE_VARIANTS and not narrow else LAYERS
    fused = (UNITS.index((variant, unit)) % 2 == 0) == narrow
    changes = NO_EPSILON if variant in ("olmo2", "olmo3", "exaone4") else {}
    model, selection = build(variant, **changes), selection_of(variant, unit, layers, narrow)
    source = save(model, tmp_path / "source", "16KB" if narrow else "5GB", fused=fused)
    family, state = (
        family_at(source),
        {f"exp_avg_sq.{name}": p.detach() * 3 for name, p in model.named_parameters()},
    )
    checkpoint.write_shard(source / checkpoint.STATE, state)
    write_pruned(source, tmp_path / "pruned", family, selection)
    assert (len(checkpoint.shards(tmp_path / "pruned")) > 1) == narrow
    pruned, plain = load(tmp_path / "pruned"), tiny_models.skipping(build(variant), layers)
    reference = masked(model, family, selection)
    assert differences(pruned, reference).max() < EXACT < 0.1 < differences(plain, reference).max()
    pruned.save_pretrained(tmp_path / "again")
    assert differences(load(tmp_path / "again"), pruned).max() < 1e-6
    before, after, again = (
        model_dimensions(tmp_path / name, family) for name in ("source", "pruned", "again")
    )
    sizes = {"width": 16} if unit == "neurons" else {"experts": 4}
    sizes |= {"hidden": 20} if selection.hidden is not None else {}
    sizes |= {"kv_heads": before.kv_heads // 2} if selection.kv_heads else {}
    assert after == again and after.params == tiny_models.num_parameters(pruned)
    assert after == replace(before, layers=len(layers), **sizes) or before.dense_layers
    if not narrow:
        old, new = (checkpoint.read_config(folder) for folder in (source, tmp_path / "pruned"))
        changed = {name for name in new if new[name] != old[name]} - OF_LAYERS
        named = family.experts.counts if unit == "experts" else [family.width_field]
        assert new.keys() == old.keys() and changed <= {*named}

    # The optimizer state is cut along the same rows and columns, but not scaled.
    state = dict(checkpoint.tensors(tmp_path / "pruned" / checkpoint.STATE))
    assert state.keys() == {f"exp_avg_sq.{name}" for name, _ in pruned.named_parameters()}
    for name, parameter in pruned.named_parameters():
        value, offset = (
            state[f"exp_avg_sq.{name}"] / 3,
            family.norm_offset * name.endswith("norm.weight"),
        )
        growth = 1.0 if torch.allclose(value, parameter, rtol=1e-5) else 1.6**0.5
        torch.testing.assert_close(parameter, (value + offset) * growth - offset, msg=name)
        assert growth == 1 or (narrow and name.endswith(("norm.weight", "embed_tokens.weight"))), (
            name
        )


@pytest.mark.parametrize("variant", tiny_models.nightly_but(*DAILY, of=VARIANTS | MOE_VARIANTS))
def test_in_bfloat16_only_the_gains_are_rounded(variant, tmp_path):
    """Of a mixture half of the tokens: others may be sent to other experts for it."""
    source = save(build(variant).bfloat16(), tmp_path / "source")
    family, selection = family_at(source), selection_of(variant)
    write_pruned(source, tmp_path / "pruned", family, selection)
    assert {entry.dtype for entry in checkpoint.contents(tmp_path / "pruned").values()} <= {
        "BF16",
        "F32",
    }
    pruned, whole = (load(folder, dtype=torch.float32) for folder in (tmp_path / "pruned", source))
    found = differences(pruned, masked(whole, family, selection))
    assert found.median() < 0.01 and (variant in MOE_VARIANTS or found.max() < 0.1)


@pytest.mark.parametrize("variant", ["llama", "phi3", "qwen2", "granite", "cohere2", "qwen3_moe"])
def test_the_config_has_all_sizes_that_would_follow_from_others(variant, tmp_path):
    source = tiny_models.change_config(save(build(variant), tmp_path / "source"), head_dim=...)
    selection = selection_of(variant)
    write_pruned(source, tmp_path / "pruned", family_at(source), selection)
    before, after = (checkpoint.read_config(folder) for folder in (source, tmp_path / "pruned"))
    sizes = {"head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {family_at(source).width_field: 16}
    if selection.hidden is not None:
        sizes |= {"hidden_size": 20, "rms_norm_eps": before["rms_norm_eps"] * 1.6}
    changed = {name: value for name, value in after.items() if before.get(name) != value}
    assert {name: value for name, value in changed.items() if name not in OF_LAYERS} == sizes


@pytest.mark.parametrize("variant", tiny_models.nightly_but(*DAILY, of=VARIANTS | MOE_VARIANTS))
def test_keeping_everything_changes_no_tensor_and_no_config(variant, tmp_path):
    source, fixed = (
        save(build(variant), tmp_path / "source", fused=variant == "mixtral"),
        FIXED.get(variant, ()),
    )
    body, config = model_dimensions(source, family_at(source)), checkpoint.read_config(source)
    assert body.fixed.keys() == {*fixed}
    layers = [i for i in range(4) if i not in body.dense_layers]
    neurons = torch.arange(body.width).expand(*[6] * (body.experts > 0), -1)
    kv_heads = {} if "kv" in fixed else dict.fromkeys(range(4), torch.arange(body.kv_heads))
    experts = dict.fromkeys(layers if body.experts else (), torch.arange(6))
    everything = Selection(ALL, dict.fromkeys(layers, neurons) if body.narrowable else {})
    for name, selection in {
        "plain": everything,
        "experts": replace(everything, neurons={}, experts=experts),
        "narrow": replace(
            everything, hidden=None if "hidden" in fixed else torch.arange(32), kv_heads=kv_heads
        ),
    }.items():
        write_pruned(source, tmp_path / name, family_at(source), selection)
        old, new = (
            dict(checkpoint.tensors(folder / checkpoint.WEIGHTS))
            for folder in (source, tmp_path / name)
        )
        assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
        # is written where it is left out
        head_dim = {"head_dim": 8} if name == "narrow" and kv_heads else {}
        assert checkpoint.read_config(tmp_path / name) == head_dim | config


@pytest.mark.parametrize(
    "variant",
    [
        "llama",
        "qwen2-sliding",
        "gemma2",
        "gemma3_text",
        "phi3",
        "smollm3",
        "exaone4",
        "deepseek_v3",
        "gpt_oss",
    ],
)
def test_generation_with_the_cache_equals_generation_without(variant, tmp_path):
    source = save(build(variant), tmp_path / "source")
    write_pruned(
        source, tmp_path / "pruned", family_at(source), selection_of(variant, layers=(1, 2, 3))
    )
    pruned, prompt = load(tmp_path / "pruned"), batches(((9, 9),))[0]["input_ids"]
    assert pruned.generation_config.max_length == 40
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached, plain = (pruned.generate(prompt, use_cache=use, **options) for use in (True, False))
    assert cached.shape == (2, 21) and torch.equal(cached, plain)


# ---- scores


def by_autograd(model):
    """Mean over the sequences of the size of the gradients by factors of 1, of the whole model.

    Of dimensions [H], of each layer's KV heads, and of its neurons' columns of down_proj.
    """
    layers, kv_heads = (
        model.get_decoder().layers,
        [torch.ones(axes.kv_heads(model.config)) for _ in range(4)],
    )
    factors = [mask.requires_grad_() for mask in (torch.ones(32), *kv_heads)]
    tiny_models.multiplied(model, factors[0], dict(enumerate(kv_heads)))
    # Without experts [H, F], with them [E, H, F]
    downs = [getattr(layer.mlp, "experts", layer.mlp).down_proj for layer in layers]
    downs = [getattr(down, "weight", down) for down in downs]
    totals = [torch.zeros_like(each) for each in (*factors, *(down.sum(dim=-2) for down in downs))]
    for batch in batches():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ids = ids[None, : mask.sum()]  # without padding
            loss = nn.functional.cross_entropy(
                model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"
            )
            slopes = torch.autograd.grad(loss, [*factors, *downs])
            of_neurons = [
                (down * slope).detach().sum(dim=-2)
                for down, slope in zip(downs, slopes[5:], strict=True)
            ]
            for total, change in zip(totals, (*slopes[:5], *of_neurons), strict=True):
                total += change.abs() / 5
    return totals[0], totals[1:5], totals[5:]


@pytest.mark.parametrize(
    "variant",
    ["llama", "llama-tied", "gemma2", "olmo2", "granite", "phi3", "deepseek_v3", *NARROW_VARIANTS],
)
def test_scores_are_gradients_by_factors_of_the_whole_model(variant, tmp_path):
    model = build(variant)
    layerwise = LayerwiseModel(
        save(model, tmp_path, tokenizer=False), family_at(tmp_path), batches()
    )
    narrowable = variant != "deepseek_v3"
    scores, (hidden, kv_heads, neurons) = (
        all_width_scores(layerwise, narrowable),
        by_autograd(model),
    )
    torch.testing.assert_close(scores.hidden, hidden, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scores.kv_heads, kv_heads, rtol=1e-3, atol=1e-4)
    assert scores.hidden.dtype == torch.float32 and len({*scores.hidden.tolist()}) == 32
    if narrowable:
        torch.testing.assert_close(scores.neurons, neurons, rtol=1e-3, atol=1e-4)
        # They are the same without masks.
        alone = neuron_scores(layerwise, "taylor", seed=0)
        torch.testing.assert_close(scores.neurons, alone, rtol=1e-5, atol=1e-6)


def test_a_source_counts_by_its_sequences_however_sure_of_them_the_model_is(tmp_path):
    model = build("llama")
    source, family = save(model, tmp_path, tokenizer=False), family_at(tmp_path)
    unsure, sure = batches(), batches(seed=2)
    for batch in sure:
        batch["source"] += 1
        batch["labels"][:, :4] = -100  # less loss
    kinds = (unsure, sure, unsure + sure)
    of_unsure, of_sure, of_both = (
        neuron_scores(LayerwiseModel(source, family, kind), "taylor", 0) for kind in kinds
    )
    gradients = []  # by the last hidden states, of each batch
    model.model.norm.register_full_backward_hook(
        lambda _module, of_input, _: gradients.append(of_input[0])
    )
    for batch in unsure + sure:
        predicted = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        nn.functional.cross_entropy(
            predicted.flatten(0, 1), targets.flatten(), reduction="sum"
        ).backward()
    sizes = (
        torch.cat([gradient.flatten(1).norm(dim=1) for gradient in gradients])
        .view(2, 5)
        .mean(dim=1)
    )
    factor = sizes[0] / sizes[1]
    assert factor > 1.2
    expected = [
        (of_source + factor * other) / 2
        for of_source, other in zip(of_unsure, of_sure, strict=True)
    ]
    torch.testing.assert_close(of_both, expected, rtol=1e-3, atol=1e-5)


# ---- one step


def prune(source, calibration, folder, goal, end=None, chosen=None, unit="width", **settings):
    settings = {"target": "width"} | settings
    return prune_to(
        goal, source, folder, calibration, unit=unit, end=end, chosen=chosen, **settings
    )


def arguments(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


@torch.no_grad()
def loss_of(folder, calibration):
    """Of a token of the calibration text, by the whole model."""
    model, losses = load(folder), []
    for batch in _batches(folder, calibration, NO_CHAT, seed=0, by_loss=True):
        predicted, targets = model(**arguments(batch)).logits[:, :-1], batch["labels"][:, 1:]
        losses += nn.functional.cross_entropy(
            predicted[targets != -100], targets[targets != -100], reduction="none"
        )
    return float(torch.stack(losses).mean())


def fitted(model, calibration, folder):
    """Saved after its output layer has learned the calibration text: its loss is below that of guessing."""
    optimizer = torch.optim.Adam(model.get_output_embeddings().parameters(), lr=0.05)
    for batch in 10 * _batches(save(model, folder), calibration, NO_CHAT, seed=0, by_loss=True):
        optimizer.zero_grad()
        model(**arguments(batch)).loss.backward()
        optimizer.step()
    return save(model, folder)


@pytest.mark.parametrize(
    ("variant", "share", "ranked"),
    [
        ("qwen3_moe", 0.45, True),
        ("cohere2", 0.6, True),
        ("llama", 0.6, False),
        ("glm4_moe", 0.6, False),
    ],
)
def test_the_loss_chooses_a_candidate_where_it_is_below_that_of_guessing(
    variant, share, ranked, calibration, tmp_path
):
    model = build(variant)
    source = (
        fitted(model, calibration, tmp_path / "fitted")
        if ranked
        else save(model, tmp_path / "source")
    )
    dense = model_dimensions(source, family_at(source))
    report = prune(source, calibration, tmp_path / "pruned", goal=int(dense.params * share))
    after = model_dimensions(tmp_path / "pruned", family_at(source))
    assert (report.unit, report.criterion, report.sequences) == ("width", "taylor", 8)
    assert (
        report.params
        == after.params
        == dimensions.static_cost(tmp_path / "pruned").params
        <= report.goal
    )
    first, least = report.candidates
    assert least.loss < first.loss and (least.loss < math.log(model.config.vocab_size)) == ranked
    best, other = (least, first) if ranked else (first, least)
    assert best.taken and not other.taken
    sizes = (after.hidden, after.width, after.kv_heads, after.experts)
    assert (best.hidden, best.width, best.kv_heads, best.experts or 0) == sizes
    assert best.loss == pytest.approx(loss_of(tmp_path / "pruned", calibration), rel=1e-4)
    # With sizes that are set nothing is chosen.
    sizes = {
        "hidden": other.hidden,
        "kv": other.kv_heads,
        "ffn": other.width if dense.narrowable else None,
    }
    goal = replace(
        dense,
        hidden=other.hidden,
        width=other.width,
        kv_heads=other.kv_heads,
        experts=other.experts or 0,
    )
    fixed = prune(source, calibration, tmp_path / "fixed", goal.params, width=sizes)
    assert fixed.candidates == () and (fixed.hidden, fixed.kv_heads) == (
        other.hidden,
        other.kv_heads,
    )
    assert other.loss == pytest.approx(loss_of(tmp_path / "fixed", calibration), rel=1e-4)
    assert not [*tmp_path.rglob("candidate-*")]


@pytest.mark.parametrize(
    ("variant", "share", "target", "unit"),
    [
        ("llama", 0.9, "width", "neurons"),
        ("qwen3_moe", 0.5, "auto", "neurons"),
        ("granite", 0.6, "auto", "neurons"),  # of which not all runtimes load another
        ("glm4_moe", 0.8, "auto", "experts"),
    ],
)
def test_where_only_the_ffn_shrinks_nothing_else_is_scored(
    variant, share, target, unit, calibration, tmp_path
):
    source = save(build(variant), tmp_path / "source")
    dense = model_dimensions(source, family_at(source)).params
    goal = int(dense * (1 + share) / 2)
    for end in (goal, int(dense * share)):  # of the last iteration, and of one before
        ways = {"width": {"target": target}}
        ways[unit] = {"target": unit, "criterion": "reap" if unit == "experts" else "taylor"}
        folders = {way: tmp_path / way for way in ways}
        reports = [
            prune(source, calibration, folders[way], goal, end, None, way, **ways[way])
            for way in ways
        ]
        one, same = (replace(report, seconds=0, chosen={}) for report in reports)
        assert one == same and one.unit == unit and one.candidates == ()
        one, same = ((tmp_path / way / checkpoint.WEIGHTS).read_bytes() for way in ways)
        assert one == same


def test_a_loop_gets_to_the_end_that_its_first_iteration_chooses(calibration, tmp_path):
    folder = save(build("llama"), tmp_path / "source")
    dense = model_dimensions(folder, FAMILIES["llama"])
    end, compared, chosen = int(dense.params * 0.45), [], {}
    for share in (0.85, 0.7, 0.55, 0.45):
        report = prune(
            folder, calibration, tmp_path / f"{share}", int(dense.params * share), end, chosen
        )
        folder = tmp_path / f"{share}"
        after = model_dimensions(folder, FAMILIES["llama"])
        assert after.params == report.params <= report.goal
        assert report.params > end * (0.9 if report.goal == end else 1)
        compared.append(report.candidates)
        chosen = report.chosen
    # Both are ways to the end, which an iteration need not have reached; the later ones keep to the first one's.
    ends = [
        replace(dense, hidden=c.hidden, width=c.width, kv_heads=c.kv_heads).params
        for c in compared[0]
    ]
    assert len(ends) == 2 and max(ends) <= end and compared[1:] == [()] * 3
    assert after == replace(dense, **chosen)
    assert torch.isfinite(logits(load(folder), batches()[0])).all()


@pytest.mark.parametrize("variant", ["llama", "gemma2", "granite"])
def test_dead_widths_are_pruned_without_any_change_of_the_logits(variant, calibration, tmp_path):
    """As those that are set by hand: here the second KV head, and of 32 dimensions and 40 neurons every fourth."""
    model, kept = build(variant), torch.arange(40) % 4 > 0
    stream = kept[:32].float()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(stream)
        for layer in model.get_decoder().layers:
            layer.self_attn.o_proj.weight[:, 16:] = 0
            layer.mlp.down_proj.weight.mul_(kept)
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight.mul_(stream[:, None])
    source = save(model, tmp_path / "source", "8KB")
    narrow = replace(model_dimensions(source, FAMILIES[variant]), hidden=24, width=30, kv_heads=1)
    sizes = {"hidden": 24, "ffn": 30, "kv": 1}
    report = prune(
        source, calibration, tmp_path / "pruned", narrow.params, width=sizes, width_multiple=1
    )
    assert (report.hidden, report.widths, report.kv_heads, report.params) == (
        24,
        (30,) * 4,
        1,
        narrow.params,
    )
    assert differences(load(tmp_path / "pruned"), model).max() < EXACT
