"""What stays takes over what the neurons that go gave: by hand, and of copies nearly all."""

import pytest
import torch
from recovering import prune_to
from tiny_models import batches, build, family_at, load, logits, save

from ptl.errors import InputError
from ptl.pruning import prune, repair
from ptl.pruning.layerwise import LayerwiseModel
from ptl.pruning.surgery import Selection, write_pruned

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_change_is_fitted_by_ridge_regression(monkeypatch):
    monkeypatch.setattr(repair, "STRENGTH", 0.5)
    generator = torch.Generator().manual_seed(1)
    rows, errors = torch.randn(50, 6, generator=generator), torch.randn(50, 3, generator=generator)
    # as least squares over the rows, and rows of the penalty's root below them
    penalty = 0.5 * rows.square().sum(dim=0).mean()
    left = torch.cat([rows, penalty.sqrt() * torch.eye(6)])
    right = torch.cat([errors, torch.zeros(6, 3)])
    found = repair.change(rows.t() @ rows, rows.t() @ errors)
    torch.testing.assert_close(found, torch.linalg.lstsq(left, right).solution.t())


@pytest.mark.parametrize(
    ("variant", "reader"), [("llama", None), ("gemma2", "post_feedforward_layernorm")]
)
def test_each_token_counts_by_its_source_and_by_what_the_next_norm_reads(
    variant, reader, monkeypatch, tmp_path
):
    """By hand: what the neurons that stay give, and what is missing in the dimensions that stay."""
    dense, kept, changes = build(variant), torch.tensor([1, 3, 4]), []
    text = batches()
    text[1]["source"] += 1  # 33 tokens of the first source, 12 of the second
    counts = torch.tensor([3 / 33] * 33 + [1 / 12] * 12)[:, None]
    monkeypatch.setattr(
        repair, "change", lambda *its: changes.append(its) or torch.full((28, 3), 0.5)
    )
    source = save(dense, tmp_path / "source")
    model = LayerwiseModel(source, family_at(source), text)
    selection = Selection((0, 1, 2, 3), dict.fromkeys(range(4), kept), hidden=torch.arange(28))
    for name in ("cut", "repaired"):
        write_pruned(source, tmp_path / name, model.family, selection)
    cut = load(tmp_path / "cut")
    repair.repair(tmp_path / "repaired", model, selection.hidden, [3.0, 1.0])
    wanted = observed(dense, reader)
    for i, layer in enumerate(cut.get_decoder().layers):
        rows, output = observed(cut, reader)[i]
        target = wanted[i][1][:, :28]
        factor = counts / (target.square().mean(dim=1, keepdim=True) + 1e-6)
        expected = (rows.t() @ (rows * factor), rows.t() @ ((target - output) * factor))
        torch.testing.assert_close(changes[i], expected, rtol=1e-4, atol=1e-5)
        # the later layers are fitted to what this one gives then
        layer.mlp.down_proj.weight.data += 0.5
    torch.testing.assert_close(load(tmp_path / "repaired").state_dict(), cut.state_dict())


def observed(model, reader):
    """Of each layer the activations of all tokens, and what the layer's `reader`, or else what follows it, reads."""
    decoder = model.get_decoder()
    following = (
        [getattr(layer, reader) for layer in decoder.layers]
        if reader
        else [*decoder.layers[1:], decoder.norm]
    )
    pairs = zip((layer.mlp.down_proj for layer in decoder.layers), following, strict=True)
    modules = [module for pair in pairs for module in pair]
    read = {module: [] for module in modules}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, arguments: read[module].append(arguments[0])
        )
        for module in modules
    ]
    for batch in batches():
        logits(model, batch)
    for hook in hooks:
        hook.remove()
    masks = [batch["attention_mask"].bool() for batch in batches()]
    tokens = [
        torch.cat([states[mask] for states, mask in zip(read[module], masks, strict=True)])
        for module in modules
    ]
    return list(zip(tokens[::2], tokens[1::2], strict=True))


@pytest.mark.parametrize("variant", ["llama", "gemma2", "granite"])
def test_neurons_take_over_what_their_copies_gave(variant, calibration, monkeypatch, tmp_path):
    monkeypatch.setattr(repair, "STRENGTH", 1e-3)
    model, batch = build(variant), batches()[0]
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                part.weight[:16] = part.weight[16:32]
            layer.mlp.down_proj.weight[:, :16] *= 0.01  # so that these go
    source, goal = save(model, tmp_path / "source"), model.num_parameters() - 16 * 4 * 3 * 32
    errors = {}
    for sequences in (0, 8):
        folder = tmp_path / str(sequences)
        prune_to(
            goal, source, folder, calibration, criterion="max", repair=sequences, width_multiple=1
        )
        errors[sequences] = (logits(load(folder), batch) - logits(model, batch)).norm()
    assert 0 < errors[8] < 0.1 * errors[0]


def test_a_repair_has_text_of_its_own(calibration, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(prune, "repair", lambda *arguments: calls.append(arguments))
    (source,) = calibration.data
    two = calibration.model_copy(
        update={"data": (source, source.model_copy(update={"weight": 0.5}))}
    )
    model = build("llama")
    sizes = {
        "unit": "width",
        "target": "width",
        "width": {"hidden": 16, "kv": 2},
        "width_multiple": 1,
    }
    prune_to(
        model.num_parameters() // 3,
        save(model, tmp_path / "source"),
        tmp_path / "out",
        two,
        repair=12,
        **sizes,
    )
    ((folder, before, stay, weights),) = calls
    assert (folder, before.num_sequences, len(stay), weights) == (
        tmp_path / "out",
        12,
        16,
        [1.0, 0.5],
    )


def test_an_iteration_that_removes_layers_repairs_nothing(calibration, tmp_path):
    model = build("llama")
    source, goal = save(model, tmp_path / "source"), model.num_parameters() - 1000
    both = {"unit": "layers", "target": "neurons_then_layers", "criterion": "max"}
    for sequences in (0, 8):
        prune_to(goal, source, tmp_path / str(sequences), calibration, repair=sequences, **both)
    cut, repaired = (load(tmp_path / name).state_dict() for name in ("0", "8"))
    torch.testing.assert_close(repaired, cut)


def test_what_has_no_repair_is_refused(calibration, tmp_path):
    with pytest.raises(InputError, match=r"prune\.repair: experts are not repaired"):
        prune_to(
            1, save(build("qwen3_moe"), tmp_path / "moe"), tmp_path / "out", calibration, repair=1
        )
