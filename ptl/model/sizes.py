"""The fields of a config.json, checked, and the sizes among them by which tensors are shaped. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ptl.model.checkpoint import DTYPES, checkpoint_error
from ptl.model.families import ConfigJson, Family

CORRECT = "correct it, or fetch the checkpoint again"
MAX_SIZE = 1 << 31  # a model beyond it is a typing error
MAX_LAYERS = 10_000  # as above
LAYER_TYPES = ("full_attention", "sliding_attention")
# Config lists with one entry for each layer, and the entries that they may have
PER_LAYER = {
    "layer_types": LAYER_TYPES,
    "no_rope_layers": (0, 1),  # 0: without rotary embeddings
}
# Names that transformers gives to activations without weights of their own (tests/model/test_shapes.py compares)
ACTIVATIONS = (
    *("gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "gelu_accurate", "quick_gelu"),
    *("silu", "swish", "relu", "relu2", "relu6", "leaky_relu", "mish", "laplace", "hardswish"),
    *("sigmoid", "tanh", "linear"),
)
LATENT_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
Fields = tuple[str, ...]  # of config.json
# Kinds of rotary embeddings and the parameters that each needs
ROPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "su": ("short_factor", "long_factor"),  # an old name of longrope
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class Sizes:
    """The sizes by which tensors are shaped, named as in config.json."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int  # FFN neurons in each layer, or in each expert
    num_hidden_layers: int  # decoder layers
    vocab_size: int
    num_experts: int = 0  # in each layer that has experts; 0: a dense model
    num_experts_per_tok: int = 0  # that each token is sent to
    # Of the expert that every token meets, where there is one: its neurons, or as how many experts it is as wide
    shared_expert_intermediate_size: int = 0
    n_shared_experts: int = 0
    expert_biases: int = 0  # 1 where the projections of experts have them
    router_vectors: int = 0  # numbers that a router has for each expert besides its row
    # Routers choose groups of experts first: how many there are in a layer, and how many of them are chosen
    n_group: int = 1
    topk_group: int = 1
    dense_layers: tuple[int, ...] = ()  # the layers of a mixture that have one MLP in place of experts
    dense_intermediate_size: int = 0  # neurons of that MLP

    # Of latent attention (MLA); 0: ordinary attention, or no latent queries
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0

    @property
    def query_width(self) -> int:
        """Queries of all heads."""
        latent = self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.num_attention_heads * (latent or self.head_dim)

    @property
    def value_width(self) -> int:
        """What all heads give."""
        return self.num_attention_heads * (self.v_head_dim or self.head_dim)

    @property
    def cached_numbers(self) -> int:
        """Numbers in the KV cache for a token in one layer: keys and values, or what they are computed from."""
        if self.kv_lora_rank:
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def shared_width(self) -> int:
        """Neurons of the shared expert."""
        return self.shared_expert_intermediate_size or self.n_shared_experts * self.intermediate_size

    @property
    def fewest_experts(self) -> int:
        """The fewest experts that a layer can have: a token finds all of its own in the groups that are chosen."""
        of_group = math.ceil(self.num_experts_per_tok / self.topk_group)
        if self.n_group > 1:
            of_group = max(2, of_group)  # by its two best experts a group is chosen
        return self.n_group * of_group

    @property
    def params_per_route(self) -> int:
        """Parameters that a layer's router has for one expert."""
        return self.hidden_size + self.router_vectors

    @property
    def expert_layers(self) -> int:
        """Layers that have experts."""
        return self.num_hidden_layers - len(self.dense_layers) if self.num_experts else 0

    @property
    def params_per_expert(self) -> int:
        """Parameters of one expert in one layer, without its row of the router."""
        return self.intermediate_size * self.params_per_expert_neuron + self.expert_biases * self.hidden_size

    @property
    def params_per_expert_neuron(self) -> int:
        """Parameters of one neuron of one expert: in its gate, up and down projection, and biases of the former."""
        return 3 * self.hidden_size + 2 * self.expert_biases


def read_sizes(config: ConfigJson, family: Family, source: str) -> Sizes:
    """Check a config and read its sizes. Raises InputError that names the field, its value and what is possible.

    `source` is the file, for the messages. Fields that config.json leaves out have the defaults of transformers.
    """
    _check_not_quantized(config, source)
    defaults = dict(family.defaults)

    def size(field: str, derived: int | None = None, largest: int = MAX_SIZE) -> int:
        """The family's default where the field is missing, `derived` where it is null."""
        value = config.get(field, defaults.get(field))
        if value is None:
            value = derived
        if value is None:
            raise checkpoint_error(f"{source} lacks {field}")
        # true is an int in Python.
        if type(value) is not int or not 0 < value <= largest:
            raise checkpoint_error(
                f"{source} has {field}={value!r}, which must be a whole number from 1 to {largest:,}",
            )
        return value

    hidden = size("hidden_size")
    heads = size("num_attention_heads")
    depth = size("num_hidden_layers", largest=MAX_LAYERS)
    experts = family.experts
    _check_dense_fields(config, family, depth, source)
    dense_layers = family.dense_layers(config, depth)
    checked = Sizes(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads", derived=heads),
        head_dim=size("head_dim", derived=hidden // heads),
        intermediate_size=size(experts.width if experts else "intermediate_size"),
        num_hidden_layers=depth,
        vocab_size=size("vocab_size"),
        num_experts=size(experts.count_field(config)) if experts else 0,
        num_experts_per_tok=size("num_experts_per_tok") if experts else 0,
        dense_layers=dense_layers,
        dense_intermediate_size=size("intermediate_size") if dense_layers else 0,
        **_optional_sizes(family, size),
    )
    if family.latent_attention and family.with_defaults(config)["q_lora_rank"] is not None:
        checked = replace(checked, q_lora_rank=size("q_lora_rank"))
    # The other fields must fit these sizes.
    _check_heads(config, family, checked, source)
    _check_experts(config, family, checked, source)
    _check_layer_types(config, family, checked.num_hidden_layers, source)
    _check_optional_fields(config, source)
    _check_padding(config, checked.vocab_size, source)
    _check_rope(config, source)
    return checked


def _optional_sizes(family: Family, size: Callable[[str], int]) -> dict[str, int]:
    """Sizes that only some families have."""
    fields: Fields = LATENT_SIZES if family.latent_attention else ()
    experts = family.experts
    if experts is None:
        return {field: size(field) for field in fields}
    fields += (experts.shared_width,) if experts.shared else ()
    fields += ("n_group", "topk_group") if experts.grouped else ()
    counts = {"router_vectors": int(bool(experts.router_vector)), "expert_biases": int(experts.transposed)}
    return {field: size(field) for field in fields} | counts


def _check_not_quantized(config: ConfigJson, source: str) -> None:
    """transformers would load something else than the weights that are there."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    remedy = "where the weights are float, remove that field, else dequantize the model and save it"
    if method == "mxfp4":  # gpt-oss
        remedy = (
            "load it by AutoModelForCausalLM.from_pretrained(..., quantization_config=Mxfp4Config(dequantize=True)) "
            "of transformers, save that model and its tokenizer, and give that folder"
        )
    raise checkpoint_error(
        f"{source} has a quantization_config ({method}), and only float weights can be pruned",
        remedy,
    )


def _check_heads(config: ConfigJson, family: Family, checked: Sizes, source: str) -> None:
    """Hidden size and heads are multiples as attention needs them."""
    hidden = checked.hidden_size
    heads = checked.num_attention_heads
    key_value_heads = checked.num_key_value_heads
    # GLM-4.5 has heads of a size of its own; transformers refuses a Llama all the same.
    has_own_size = family.experts is not None and "head_dim" in config
    if hidden % heads and not has_own_size:
        raise checkpoint_error(f"in {source} hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
    if heads % key_value_heads:
        raise checkpoint_error(
            f"in {source} num_attention_heads={heads} is not a multiple of num_key_value_heads={key_value_heads}"
        )
    rotary = "qk_rope_head_dim" if checked.kv_lora_rank else "head_dim"
    if getattr(checked, rotary) % 2:  # rotary embeddings turn pairs of numbers
        raise checkpoint_error(f"{source} gives the odd {rotary}={getattr(checked, rotary)}")


def _check_experts(config: ConfigJson, family: Family, checked: Sizes, source: str) -> None:
    """Every layer with experts has the same number of them, at least as many as each token is sent to."""
    experts = family.experts
    if experts is None:
        return
    counts = {field: config[field] for field in experts.counts if field in config}
    if len(set(counts.values())) > 1:
        settings = " and ".join(f"{field}={value}" for field, value in counts.items())
        raise checkpoint_error(f"{source} has {settings}, which mean the same and differ", CORRECT)
    if checked.num_experts_per_tok > checked.num_experts:
        raise checkpoint_error(
            f"{source} has num_experts_per_tok={checked.num_experts_per_tok}, more than the {checked.num_experts} "
            "experts of a layer",
            CORRECT,
        )
    loss = config.get("router_aux_loss_coef")
    if loss and not experts.router_loss:
        raise checkpoint_error(
            f"{source} has router_aux_loss_coef={loss!r}, and transformers has no auxiliary loss for the routers of "
            f"{family.model_type}",
            "remove that field",
        )
    groups, chosen = checked.n_group, checked.topk_group
    if checked.num_experts % groups or chosen > groups or checked.num_experts < checked.fewest_experts:
        raise checkpoint_error(
            f"{source} has n_group={groups} and topk_group={chosen}, by which {checked.num_experts_per_tok} experts "
            f"for each token cannot be chosen from {checked.num_experts}",
            CORRECT,
        )
    if not checked.expert_layers:
        settings = " and ".join(f"{field}={config[field]}" for field in experts.dense_fields if field in config)
        raise checkpoint_error(f"{source} has {settings}, by which no layer has experts", CORRECT)


# Config fields that say which layers of a mixture have one MLP in place of experts: which values they may have beside
# null, and the same in words
DENSE_FIELDS: dict[str, tuple[Callable[[Any, int], bool], str]] = {
    "mlp_only_layers": (
        lambda value, depth: isinstance(value, list) and all(type(i) is int and 0 <= i < depth for i in value),
        "a list of numbers of layers",
    ),
    "decoder_sparse_step": (lambda value, depth: type(value) is int and value > 0, "a whole number above 0"),
    "first_k_dense_replace": (lambda value, depth: type(value) is int and value >= 0, "a whole number from 0"),
}


def _check_dense_fields(config: ConfigJson, family: Family, depth: int, source: str) -> None:
    """Which layers have experts is said in a way that can be read."""
    for field in family.experts.dense_fields if family.experts else ():
        is_possible, possible = DENSE_FIELDS[field]
        value = config.get(field)
        if value is not None and not is_possible(value, depth):
            raise checkpoint_error(f"{source} has {field}={value!r}, which must be {possible}", CORRECT)


def _check_layer_types(config: ConfigJson, family: Family, layers: int, source: str) -> None:
    """Lists with one entry per layer are as long as the model is deep, and have entries that are known."""
    for field in family.per_layer_fields:
        entries: Any = config.get(field)
        possible = PER_LAYER[field]
        complete = isinstance(entries, list) and len(entries) == layers
        if entries is not None and not (complete and all(map(possible.__contains__, entries))):
            known = ", ".join(map(str, possible))
            raise checkpoint_error(
                f"{source} must have {layers} entries in {field}, one for each layer, each of {known}",
            )


def _is_number(value: Any) -> bool:
    # Exact types: true is an int in Python.
    return type(value) in (int, float) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


# Optional fields of config.json, which values they may have beside null, and the same in words
OPTIONAL_FIELDS: tuple[tuple[Fields, Callable[[Any], bool], str], ...] = (
    (
        (
            *("rms_norm_eps", "rope_theta", "rope_local_base_freq", "initializer_range"),
            *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        ),
        _is_positive,
        "a number above 0",
    ),
    (
        ("max_position_embeddings", "sliding_window"),
        lambda value: isinstance(value, int) and _is_positive(value),
        "a whole number above 0",
    ),
    (
        (
            *("tie_word_embeddings", "use_cache", "use_sliding_window", "norm_topk_prob", "output_router_logits"),
            *("attention_bias", "attention_out_bias", "mlp_bias", "use_bias", "qkv_bias", "bias"),
        ),
        lambda value: isinstance(value, bool),
        "true or false",
    ),
    (
        ("attention_dropout",),
        lambda value: _is_number(value) and 0 <= value < 1,
        "from 0 to below 1",
    ),
    (
        ("dtype", "torch_dtype"),
        lambda value: isinstance(value, str) and value in DTYPES,
        "one of " + ", ".join(DTYPES),
    ),
    (
        ("hidden_act", "hidden_activation"),
        ACTIVATIONS.__contains__,
        "known to transformers: one of " + ", ".join(ACTIVATIONS),
    ),
)


def _check_optional_fields(config: ConfigJson, source: str) -> None:
    """transformers would fail on these only when it builds or runs the model."""
    for fields, is_possible, possible in OPTIONAL_FIELDS:
        for field in fields:
            value = config.get(field)
            # Qwen 2's mixtures have 0 for a window that is switched off.
            unused = field == "sliding_window" and config.get("use_sliding_window") is False
            if value is not None and not unused and not is_possible(value):
                raise checkpoint_error(f"{source} has {field}={value!r}, which must be {possible}", CORRECT)


def _check_padding(config: ConfigJson, vocabulary: int, source: str) -> None:
    """The padding token is an index into the embeddings, which counts from the end where it is negative."""
    value = config.get("pad_token_id")
    if value is not None and not (isinstance(value, int) and -vocabulary <= value < vocabulary):
        raise checkpoint_error(
            f"{source} has pad_token_id={value!r}, which is not one of the {vocabulary} tokens of vocab_size",
            "set it to one of them, or to null",
        )


def _check_rope(config: ConfigJson, source: str) -> None:
    """Rotary embeddings of a known kind with the parameters that it needs, for all layers or by kind of attention."""
    for field in ("rope_parameters", "rope_scaling"):
        value: Any = config.get(field)
        # Gemma 3 rotates by other parameters where attention has a window.
        layer_types = [name for name in LAYER_TYPES if name in value] if isinstance(value, dict) else []
        for layer_type in layer_types:
            _check_rope_parameters(f"{field}.{layer_type}", value[layer_type], source)
        if value is not None and not layer_types:
            _check_rope_parameters(field, value, source)


def _check_rope_parameters(name: str, parameters: Any, source: str) -> None:
    """`name` is that of the field, for the messages."""
    if not isinstance(parameters, dict):
        raise checkpoint_error(f"{source} has {name}={parameters!r}, which must be a JSON object", CORRECT)
    # Older files call it `type`.
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPES:
        known = ", ".join(ROPES)
        raise checkpoint_error(
            f"{source} has {name}.rope_type={kind!r}, which is not known",
            f"it must be one of {known}",
        )
    for field in ROPES[kind]:
        value: Any = parameters.get(field)
        # longrope has a factor for each rotated pair
        is_list = isinstance(value, list) and field in ROPES["longrope"]
        if not all(map(_is_positive, value if is_list else [value])):
            raise checkpoint_error(
                f"{source} has {name}.{field}={value!r}, "
                f"and rope_type={kind} needs a number above 0 there, "
                "or a list of them for short_factor and long_factor",
                CORRECT,
            )
