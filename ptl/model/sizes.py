"""The sizes in a config.json by which tensors are shaped, checked. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ptl.model import config_fields
from ptl.model.checkpoint import checkpoint_error
from ptl.model.config_fields import CORRECT, Fields
from ptl.model.families import ConfigJson, Family

MAX_SIZE = 1 << 31  # a model beyond it is a typing error
MAX_LAYERS = 10_000  # as above
LATENT_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


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
    def narrowable(self) -> bool:
        """Whether neurons can be pruned: not where the width is a shared expert's too, or layers and experts differ."""
        return not (self.n_shared_experts or self.dense_layers or self.expert_biases)

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
    config_fields.check_not_quantized(config, source)
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
    config_fields.check(config, source)
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
