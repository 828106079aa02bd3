"""The shape of each tensor of a checkpoint, and how many parameters that makes, from its sizes. Torch-free."""

from __future__ import annotations

import math
from itertools import chain

from ptl.model import experts as moe
from ptl.model.config_fields import Fields
from ptl.model.families import ConfigJson, Family
from ptl.model.safetensors_io import TensorShape
from ptl.model.sizes import Sizes

Length = tuple[int, Fields]  # of a dimension, and the fields that give it


def expected(part: str, family: Family, dims: Sizes) -> tuple[TensorShape, Fields]:
    """The shape of a tensor's weight, and the config's fields that it follows from.

    `part` is a family's part of a layer, or `embed_tokens`, `lm_head` or `norm`.
    """
    # Every length that a dimension can have
    key_width = dims.num_key_value_heads * dims.head_dim
    head = (dims.head_dim, ("head_dim",))
    heads = (dims.num_attention_heads, ("num_attention_heads",))
    hidden = (dims.hidden_size, ("hidden_size",))
    of_head = ("qk_nope_head_dim", "qk_rope_head_dim") if dims.kv_lora_rank else ("head_dim",)
    queries = (dims.query_width, ("num_attention_heads", *of_head))
    values = (dims.value_width, ("num_attention_heads", "v_head_dim" if dims.kv_lora_rank else "head_dim"))
    keys = (key_width, ("num_key_value_heads", "head_dim"))
    fused_qkv = (dims.query_width + 2 * key_width, ("num_attention_heads", "num_key_value_heads", "head_dim"))
    width = "dense_intermediate_size" if family.experts else "intermediate_size"  # of the MLP, where a layer has one
    neurons = (getattr(dims, width), (width,))
    fused_neurons = (family.fused_projections * getattr(dims, width), (width,))
    shared_neurons: Length = (dims.shared_width, ("shared_expert_intermediate_size",))
    if dims.n_shared_experts:
        shared_neurons = (dims.shared_width, ("n_shared_experts", "intermediate_size"))
    latent = (dims.kv_lora_rank, ("kv_lora_rank",))
    latent_queries = (dims.q_lora_rank, ("q_lora_rank",))
    latent_and_ropes = (dims.kv_lora_rank + dims.qk_rope_head_dim, ("kv_lora_rank", "qk_rope_head_dim"))
    keys_and_values = (
        dims.num_attention_heads * (dims.qk_nope_head_dim + dims.v_head_dim),
        ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"),
    )
    vocabulary = (dims.vocab_size, ("vocab_size",))

    # Dimensions of the parts, by the last piece of their names
    layouts: dict[str, tuple[Length, ...]] = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "qkv_proj": (fused_qkv, hidden),
        "o_proj": (hidden, values),
        "q_norm": (head if family.norm_per_head else queries,),
        "sinks": (heads,),
        "k_norm": (head if family.norm_per_head else keys,),
        # Of latent attention
        "q_a_proj": (latent_queries, hidden),
        "q_a_layernorm": (latent_queries,),
        "q_b_proj": (queries, latent_queries),
        "kv_a_proj_with_mqa": (latent_and_ropes, hidden),
        "kv_a_layernorm": (latent,),
        "kv_b_proj": (keys_and_values, latent),
        # Of the shared expert
        "gate_proj": (shared_neurons, hidden),
        "up_proj": (shared_neurons, hidden),
        "down_proj": (hidden, shared_neurons),
        "shared_expert_gate": ((1, ()), hidden),
        "embed_tokens": (vocabulary, hidden),
        "lm_head": (vocabulary, hidden),
    }
    layout = layouts.get(part.rpartition(".")[2], (hidden,))  # all other norms
    if part in family.up_projections:
        layout = (fused_neurons, hidden)
    elif part == family.down_projection:
        layout = (hidden, neurons)
    shape, fields = zip(*layout, strict=True)
    return shape, tuple(chain(*fields))


def expert_tensors(family: Family, dims: Sizes, fused: bool) -> dict[str, tuple[TensorShape, Fields]]:
    """Shape and fields, as of `expected`, of each tensor of a layer's experts and router; none in a dense model."""
    experts = family.experts
    if experts is None:
        return {}
    number, width, hidden = dims.num_experts, dims.intermediate_size, dims.hidden_size
    tensors: dict[str, tuple[TensorShape, Fields]] = {
        f"{experts.router(fused)}.weight": ((number, hidden), ("num_experts", "hidden_size")),
    }
    if experts.router_vector:
        tensors[experts.router_vector] = ((number,), ("num_experts",))
    both = ("intermediate_size", "hidden_size")
    if fused:
        fields = ("num_experts", *both)
        tensors[moe.GATE_UP] = ((number, 2 * width, hidden), fields)
        tensors[moe.DOWN] = ((number, hidden, width), fields)
        if experts.transposed:
            tensors[moe.GATE_UP] = ((number, hidden, 2 * width), fields)
            tensors[moe.DOWN] = ((number, width, hidden), fields)
            biases = zip(moe.BIASES, ((number, 2 * width), (number, hidden)), strict=True)
            tensors |= {name: (shape, fields) for name, shape in biases}
        return tensors
    gate, up, down = experts.projections
    for expert in range(number):
        tensors[f"{experts.part(expert, gate)}.weight"] = ((width, hidden), both)
        tensors[f"{experts.part(expert, up)}.weight"] = ((width, hidden), both)
        tensors[f"{experts.part(expert, down)}.weight"] = ((hidden, width), both)
    return tensors


def count(config: ConfigJson, family: Family, dims: Sizes) -> tuple[int, int]:
    """Parameters of the model, and those of them that each token is multiplied with: the output layer's too.

    Of a layer's experts a token is multiplied with `num_experts_per_tok`.
    """
    embeddings = dims.vocab_size * dims.hidden_size
    params, products = inactive(dims), embeddings  # the output layer is as large as the embeddings
    kinds = {True: dims.expert_layers, False: dims.num_hidden_layers - dims.expert_layers}  # by whether it has experts
    for has_experts, layers in kinds.items():
        matrices, vectors = _of_layer(config, family, dims, has_experts)
        products += layers * matrices
        params += layers * vectors
    params += products + dims.hidden_size  # the last norm
    if not family.is_tied(config):
        params += embeddings
    return params, products


def _of_layer(config: ConfigJson, family: Family, dims: Sizes, has_experts: bool) -> tuple[int, int]:
    """Parameters of a layer: of the weights that a token is multiplied with, and of norms and biases."""
    matrices = vectors = 0
    if has_experts:
        matrices += dims.num_experts * dims.hidden_size  # the router
        weights = 3 * dims.hidden_size * dims.intermediate_size  # of an expert
        matrices += dims.num_experts_per_tok * weights
        vectors += dims.num_experts_per_tok * (dims.params_per_expert - weights)
        vectors += dims.num_experts * dims.router_vectors
    for part in family.parts(config, has_experts):
        shape, _ = expected(part, family, dims)
        if len(shape) == 1:
            vectors += shape[0]
        else:
            matrices += math.prod(shape)
    for part in (*family.biases_of(config, has_experts), *family.vectors):
        shape, _ = expected(part, family, dims)
        vectors += shape[0]
    return matrices, vectors


def inactive(dims: Sizes) -> int:
    """Parameters of the experts that a token is not sent to, in all layers."""
    unused = dims.num_experts - dims.num_experts_per_tok
    return dims.expert_layers * unused * dims.params_per_expert
