"""Random models of every family, a few thousand parameters each, as checkpoints on disk."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
import yaml
from checkout import DENSE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from ptl.config.data import DataSource
from ptl.config.run import Calibration
from ptl.model import checkpoint
from ptl.model.families import family_of

VOCABULARY = 48
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
}
SIZES |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES["initializer_range"] = 0.2  # far enough from zero that every part matters
KINDS = yaml.safe_load(Path(__file__).with_name("variants.yaml").read_text())
# By variant: its model_type, and what differs from SIZES
VARIANTS, MOE_VARIANTS = (
    {name: (fields.pop("model_type"), fields) for name, fields in KINDS[kind].items()}
    for kind in ("dense", "mixtures")
)
YARN = KINDS[".yarn"]
# What differs by more than numbers: of each day, where the others find the same mistakes
DAILY = (
    "llama-biases",
    "llama-tied",
    "qwen2-sliding",
    "gemma2",
    "gemma2-untied",
    "phi3",
    "olmo2",
    "smollm3",
)
DAILY += ("phi3-longrope",)
DAILY += (
    "granite",
    "cohere2",
    "helium",
    "qwen3_moe-dense",
    "qwen2_moe",
    "deepseek_v3",
    "gpt_oss",
    "olmoe",
    "mixtral",
)
# Those whose experts can be narrowed: all layers have them, none is shared by their width
NARROW_VARIANTS = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral")
VISION_TOWERS = {"gemma3": "siglip_vision_model", "mistral3": "pixtral"}
VISION_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
VISION_SIZES |= {"head_dim": 8, "image_size": 28, "patch_size": 14}


def nightly_but(*always, of):
    """Parameters: the others of these find the same mistakes."""
    cases = [case if isinstance(case, tuple) else (case,) for case in of]
    always = [case if isinstance(case, tuple) else (case,) for case in always]
    return [
        pytest.param(*case, marks=[] if case in always else pytest.mark.nightly) for case in cases
    ]


def build(variant, seed=0, **changes):
    """A random model of the variant, in eval mode; norms and biases are random too."""
    model_type, fields = (VARIANTS | MOE_VARIANTS)[variant]
    return _random(
        AutoModelForCausalLM,
        AutoConfig.for_model(model_type, **{**SIZES, **fields, **changes}),
        seed,
    )


def build_multimodal(model_type, variant, **changes):
    """A random multimodal model with a text model of the variant and a vision tower of one layer."""
    text_type, fields = VARIANTS[variant]
    config = AutoConfig.for_model(
        model_type,
        text_config={"model_type": text_type, **SIZES, **fields},
        vision_config={"model_type": VISION_TOWERS[model_type], **VISION_SIZES},
        image_token_index=VOCABULARY - 1,
        **changes,
    )
    return _random(transformers.AutoModelForImageTextToText, config)


def _random(auto_class, config, seed=0):
    torch.manual_seed(seed)
    model = auto_class.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("_bias") or (tensor.dim() == 1 and tensor.requires_grad):
                tensor.add_(torch.randn_like(tensor) * 0.1)
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, max_length=40
    )
    return model


def save(model, folder, shard_size="5GB", tokenizer=True, fused=False):
    """Write the model as an ordinary checkpoint, with a tokenizer that has a chat template.

    `fused`: experts in the layout that transformers has in memory, not in that of the hub.
    """
    model.save_pretrained(folder, max_shard_size=shard_size, save_original_format=not fused)
    if tokenizer:
        words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
        core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        special = {
            "pad_token": "<pad>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<pad>",
        }
        made = PreTrainedTokenizerFast(tokenizer_object=core, **special)
        made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        made.save_pretrained(folder)
    return folder


def with_reasoners_tokenizer(variant, folder, **changes):
    """A random model of the variant, as a checkpoint with the tiny reasoner's tokenizer and context."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(DENSE)
    ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    model = build(variant, vocab_size=len(tokenizer), max_position_embeddings=256, **ids, **changes)
    tokenizer.save_pretrained(save(model, folder, tokenizer=False))
    return folder


def width_of(variant):
    """Neurons of each layer, or of each expert."""
    return (VARIANTS | MOE_VARIANTS)[variant][1].get(
        "moe_intermediate_size", SIZES["intermediate_size"]
    )


def num_parameters(model):
    """Parameters, and the routers' corrections, which transformers counts as buffers."""
    corrections = [
        buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")
    ]
    return model.num_parameters() + sum(map(torch.numel, corrections))


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def family_at(folder):
    return family_of(checkpoint.read_config(folder))


def change_config(folder, **changes):
    """Change fields of config.json; one that becomes `...` is left out."""
    config = checkpoint.read_config(folder) | changes
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not ...})
    )
    return folder


def skipping(model, layers):
    """The model with the others of its layers passed over: the reference of a model without them."""
    for i, layer in enumerate(model.get_decoder().layers):
        if i not in layers:
            layer.forward = lambda hidden, *_args, **_kwargs: hidden
    return model


def router(layer):
    return layer.mlp.router if hasattr(layer.mlp, "router") else layer.mlp.gate


def avoiding(model, experts):
    """The original model whose routers give the experts outside `experts` a logit of minus infinity: the reference."""
    for i, kept in experts.items():
        gate = router(model.get_decoder().layers[i])
        pruned = torch.ones(len(gate.weight), dtype=torch.bool)
        pruned[kept] = False
        if hasattr(gate, "e_score_correction_bias"):  # the scores that choose have it added
            gate.e_score_correction_bias[pruned] = -torch.inf
            continue

        def forward(hidden, gate=gate, pruned=pruned):
            plain = torch.nn.functional.linear
            with mock.patch(
                "torch.nn.functional.linear",
                lambda *given: plain(*given).masked_fill(pruned, -torch.inf),
            ):
                return type(gate).forward(gate, hidden)

        gate.forward = forward
    return model


def silenced(model, family, neurons):
    """The model whose neurons outside `neurons` give nothing: the reference of a model without them."""
    for i, kept in neurons.items():
        name = "mlp.experts.down_proj" if family.experts else f"{family.down_projection}.weight"
        down = model.get_decoder().layers[i].get_parameter(name)  # [H, F] or [E, H, F]
        keep = torch.zeros(*kept.shape[:-1], down.shape[-1]).scatter(-1, kept, 1.0)  # [F] or [E, F]
        with torch.no_grad():
            down *= keep.unsqueeze(-2)
    return model


def multiplied(model, stream, heads):
    """The model with all that is written to its residual stream times `stream` [H], before norms that follow.

    What its KV heads give is multiplied by `heads` [KV heads] of each layer.
    """

    def write(_module, _inputs, output):
        return (output[0] * stream, *output[1:]) if isinstance(output, tuple) else output * stream

    decoder = model.get_decoder()
    for module in (
        decoder.embed_tokens,
        *(part for layer in decoder.layers for part in (layer.self_attn, layer.mlp)),
    ):
        module.register_forward_hook(write)
    for i, factors in heads.items():

        def read(_module, inputs, factors=factors):
            return ((inputs[0].unflatten(-1, (len(factors), -1)) * factors[:, None]).flatten(-2),)

        decoder.layers[i].self_attn.o_proj.register_forward_pre_hook(read)
    return model


@torch.no_grad()
def changes_by_removal(stream, neurons):
    """Largest change of each layer's output when one neuron goes: float32 [layers, experts or 1, neurons]."""
    experts = stream.family.experts
    largest = torch.zeros(4, 6 if experts else 1, len(neurons))
    states = stream.embed()
    for i in range(4):
        with stream.layer(i) as layer:
            plain = None if experts else layer.get_submodule(stream.family.down_projection).weight
            for b, hidden in enumerate(states):
                states[b] = stream.run(i, b, hidden)
                mask = stream.batches[b]["attention_mask"]
                for expert, down in enumerate(layer.mlp.experts.down_proj if experts else [plain]):
                    for n, neuron in enumerate(neurons):
                        column = down[:, neuron].clone()
                        down[:, neuron] = 0
                        change = (stream.run(i, b, hidden) - states[b]).norm(dim=-1) * mask
                        down[:, neuron] = column
                        largest[i, expert, n] = torch.maximum(largest[i, expert, n], change.max())
    return largest


def batches(lengths=((12, 9, 12), (5, 7)), seed=1):
    """Right-padded batches with sequences of these lengths, as calibration_batches makes them."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for group in lengths:
        ids = torch.randint(3, VOCABULARY, (len(group), max(group)), generator=generator)
        mask = (torch.arange(max(group)) < torch.tensor(group)[:, None]).long()
        ids = ids * mask
        labels, source = (
            ids.masked_fill(mask == 0, -100),
            torch.zeros(len(group), dtype=torch.int64),
        )
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels, "source": source})
    return made


def logits(model, batch):
    """Logits of the non-padding tokens: [tokens, vocabulary]."""
    with torch.no_grad():
        out = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
    return out[batch["attention_mask"].bool()]


def word_calibration(folder):
    """Twelve texts of the tiny tokenizer's words, of different lengths, of which eight are read."""
    path = folder / "rows.jsonl"
    generator = torch.Generator().manual_seed(3)
    words = [torch.randint(3, 48, (4 + n % 5,), generator=generator).tolist() for n in range(12)]
    rows = [{"text": " ".join(f"w{i}" for i in row)} for row in words]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return Calibration(
        data=DataSource(source=str(path), format="text"),
        num_sequences=8,
        max_length=16,
        batch_size=3,
    )
