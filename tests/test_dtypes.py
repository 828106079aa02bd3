"""Each tensor keeps its name and its dtype through every step, in whatever dtype the model is computed."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from recovering import DATA, DENSE, prune_to, recover, weights
from tiny_models import MOE_VARIANTS, VARIANTS, batches, build, nightly_but, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptl.config.run import Calibration
from ptl.model import checkpoint
from ptl.model.dimensions import model_dimensions
from ptl.model.families import FAMILIES
from ptl.model.hub import import_checkpoint
from ptl.pruning.layerwise import LayerwiseModel

pytestmark = pytest.mark.usefixtures("one_thread")
CPT = {"method": "cpt", "max_length": 64}
BIAS = 8.0  # of DeepSeek-V3's routers, about as published: bfloat16 would round it to a 32nd


def saved(variant, folder, *, float32_routers=False, fused=False):
    """A checkpoint that transformers loaded and saved in bfloat16; `float32_routers`: as some are on the hub."""
    tokenizer = AutoTokenizer.from_pretrained(DENSE)
    model = build(variant, vocab_size=len(tokenizer))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.add_(BIAS)
    save(model, folder / "float32", tokenizer=False)
    model = AutoModelForCausalLM.from_pretrained(folder / "float32", dtype=torch.bfloat16)
    if float32_routers:
        for layer in model.get_decoder().layers:
            for router in ("gate", "router"):
                if hasattr(layer.mlp, "experts") and hasattr(layer.mlp, router):
                    getattr(layer.mlp, router).float()
    tokenizer.save_pretrained(folder / "source")
    return save(model, folder / "source", tokenizer=False, fused=fused)


CASES = [(variant, False, False) for variant in (*VARIANTS, *MOE_VARIANTS)]
CASES += [(variant, True, fused) for variant in MOE_VARIANTS for fused in (False, True)]


@pytest.mark.parametrize(
    ("variant", "float32_routers", "fused"),
    nightly_but(("gemma2", False, False), ("deepseek_v3", True, False), of=CASES),
)
def test_tensors_keep_their_dtypes_through_every_step(variant, float32_routers, fused, tmp_path):
    source = saved(variant, tmp_path, float32_routers=float32_routers, fused=fused)
    import_checkpoint(str(source), None, tmp_path / "imported")
    dense = model_dimensions(
        tmp_path / "imported", FAMILIES[checkpoint.read_config(source)["model_type"]]
    )
    unit, goal = (
        ("experts", replace(dense, experts=4).params)
        if dense.experts
        else ("neurons", dense.params * 9 // 10)
    )
    calibration = Calibration(data=DATA.sources[0], num_sequences=4, max_length=64)
    prune_to(goal, tmp_path / "imported", tmp_path / "pruned", calibration, unit=unit, target=unit)
    recover(tmp_path / "pruned", tmp_path / "recovered", CPT, tokens=100)
    recover(tmp_path / "pruned", tmp_path / "merged", CPT | {"lora": {"rank": 2}}, tokens=100)
    before, imported, pruned, recovered, merged = (
        {name: entry.dtype for name, entry in checkpoint.contents(tmp_path / step).items()}
        for step in ("source", "imported", "pruned", "recovered", "merged")
    )
    assert (
        imported == before and pruned == recovered == merged and pruned.items() <= imported.items()
    )
    has_float32 = float32_routers or variant in ("deepseek_v3", "glm4_moe")
    assert set(pruned.values()) == ({"BF16", "F32"} if has_float32 else {"BF16"})
    for name, value in weights(source).items():
        if name.endswith("e_score_correction_bias"):  # no gradient moves it
            assert set(weights(tmp_path / "recovered")[name].tolist()) <= set(value.tolist())


@pytest.mark.parametrize(
    ("variant", "float32_routers"),
    nightly_but(("qwen2_moe", False), ("glm4_moe", True), of=product(MOE_VARIANTS, (False, True))),
)
def test_layer_by_layer_it_is_computed_as_from_pretrained_does(variant, float32_routers, tmp_path):
    source = saved(variant, tmp_path, float32_routers=float32_routers)
    whole, batch = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval(), batches()[0]
    model = LayerwiseModel(source, FAMILIES[checkpoint.read_config(source)["model_type"]], [batch])
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = (getattr(each, kind)() for each in (model.causal_lm, whole))
        assert {name: tensor.dtype for name, tensor in mine} == {
            name: tensor.dtype for name, tensor in theirs
        }
    with torch.no_grad():
        states = model.embed()
        for i in range(len(model.layers)):
            with model.layer(i):
                states = [model.run(i, b, hidden) for b, hidden in enumerate(states)]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        expected = []
        whole.get_decoder().norm.register_forward_pre_hook(
            lambda _norm, arguments: expected.append(arguments[0])
        )
        whole(**inputs, use_cache=False)
    kept = batch["attention_mask"].bool()
    assert torch.equal(states[0][kept], expected[0][kept])
