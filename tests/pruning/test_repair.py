"""What stays takes over what the neurons that go gave: by hand, and of copies nearly all."""

import pytest
import torch
from pydantic import ValidationError
from recovering import prune_to
from tiny_models import batches, build, family_at, load, logits, save

from ptl.config.schedule import Prune
from ptl.errors import InputError
from ptl.pruning import repair
from ptl.pruning.layerwise import LayerwiseModel
from ptl.pruning.surgery import Selection, write_pruned

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_weight_is_fitted_by_ridge_regression(monkeypatch):
    monkeypatch.setattr(repair, "STRENGTH", 0.5)
    generator = torch.Generator().manual_seed(1)
    rows, weight = torch.randn(50, 6, generator=generator), torch.randn(3, 6, generator=generator)
    kept = torch.tensor([0, 2, 5])
    found = repair.fit(weight, rows[:, kept].t() @ rows, kept)
    # as least squares over the rows, and rows of the penalty's root below them
    penalty = 0.5 * rows[:, kept].square().sum(dim=0).mean()
    left = torch.cat([rows[:, kept], penalty.sqrt() * torch.eye(3)])
    right = torch.cat([rows @ weight.t(), penalty.sqrt() * weight[:, kept].t()])
    torch.testing.assert_close(found, torch.linalg.lstsq(left, right).solution.t())


@pytest.mark.parametrize(("variant", "reader"), [("llama", None), ("gemma2", "post_feedforward_layernorm")])
def test_a_token_counts_by_the_size_of_what_the_next_norm_reads(variant, reader, monkeypatch, tmp_path):
    model, kept = build(variant), torch.tensor([1, 3, 4])
    products = []
    monkeypatch.setattr(repair, "fit", lambda weight, its, _kept: products.append(its) or weight[:, kept])
    folder = save(model, tmp_path / "source")
    family = family_at(folder)
    selection = Selection((0, 1, 2, 3), dict.fromkeys(range(4), kept), hidden=torch.arange(28))
    with repair.fitted(LayerwiseModel(folder, family, batches()), selection.neurons, tmp_path) as found:
        assert [entry.shape for entry in found.values()] == [(32, 3)] * 4
        # here each is what the cut alone gives
        write_pruned(folder, tmp_path / "repaired", family, selection, repaired=found)
        write_pruned(folder, tmp_path / "cut", family, selection)
    repaired, cut = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("repaired", "cut"))
    assert repaired == cut
    seen = {}

    def record(name):
        return lambda _module, arguments: seen.setdefault(name, []).append(arguments[0])

    for i, layer in enumerate(model.get_decoder().layers):
        layer.mlp.down_proj.register_forward_pre_hook(record(("activations", i)))
        following = getattr(layer, reader) if reader else None
        if following or i < 3:
            (following or model.get_decoder().layers[i + 1]).register_forward_pre_hook(record(("read", i)))
    for batch in batches():
        logits(model, batch)
    masks = [batch["attention_mask"].bool() for batch in batches()]
    for i, its in enumerate(products[: 4 if reader else 3]):
        rows = torch.cat([values[mask] for values, mask in zip(seen["activations", i], masks, strict=True)])
        read = torch.cat([values[mask] for values, mask in zip(seen["read", i], masks, strict=True)])
        rows = rows / (read.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(its, rows[:, kept].t() @ rows)


@pytest.mark.parametrize("variant", ["llama", "gemma2"])
def test_neurons_take_over_what_their_copies_gave(variant, calibration, tmp_path):
    model, batch = build(variant), batches()[0]
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                part.weight[:16] = part.weight[16:32]
            layer.mlp.down_proj.weight[:, :16] *= 0.01  # so that these go
    source, goal = save(model, tmp_path / "source"), model.num_parameters() - 16 * 4 * 3 * 32
    errors = {}
    for is_repaired in (False, True):
        folder = tmp_path / str(is_repaired)
        prune_to(goal, source, folder, calibration, criterion="max", repair=is_repaired, width_multiple=1)
        assert not list(folder.glob("repaired-*"))
        errors[is_repaired] = (logits(load(folder), batch) - logits(model, batch)).norm()
    assert 0 < errors[True] < 0.1 * errors[False]


def test_what_has_no_repair_is_refused(calibration, tmp_path):
    with pytest.raises(InputError, match=r"prune\.repair: experts are not repaired"):
        prune_to(1, save(build("qwen3_moe"), tmp_path / "moe"), tmp_path / "out", calibration, repair=True)
    for target in ("layers", "experts"):
        with pytest.raises(ValidationError, match=f"repair is of neurons, and target={target} removes none"):
            Prune(target=target, repair=True)
