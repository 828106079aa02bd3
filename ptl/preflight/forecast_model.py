"""A model as its config says it, and what such a model costs: FLOPs, memory for training, time to generate.

FLOPs: 2 per weight and token forward, 6 with backward (Kaplan et al. 2020, 2001.08361, section 2.1), attention's
products added. Activations: Korthikanti et al. 2022 (2205.05198), equation 2 without the attention matrix, which is
never stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ptl.config.recover import Distil, Grpo, NextToken, RecoverStage
from ptl.model import checkpoint, hub, shapes, text_tower
from ptl.model.families import family_of
from ptl.model.sizes import read_sizes
from ptl.preflight.gpus import Gpu

DECODE_SHARE = 0.5  # of the memory bandwidth that generation reaches
CONTEXT = 1 << 30  # bytes for CUDA, kernels and fragments
PROMPT_TOKENS = 512  # of a prompt, where nothing says how long it is


@dataclass(frozen=True)
class GpuGroup:
    """The GPUs that train together."""

    per_node: int
    nodes: int = 1

    @property
    def count(self) -> int:
        """All of them."""
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Shape:
    """A model as its config says it."""

    params: int
    matrices: int  # weights of linear layers, the output layer included: the ones that cost FLOPs
    layers: int
    hidden: int
    vocabulary: int
    heads_width: int  # heads * head_dim; the mean of queries and values where these differ
    kv_bytes: int  # per token of context
    itemsize: int  # bytes of a stored weight
    # Of a mixture of experts; 0 in a dense model
    experts: int = 0  # in each layer
    routed: int = 0  # parameters in all layers of the experts that a token is sent to; part of `matrices`
    inactive: int = 0  # the same of the other experts, which cost memory and no FLOPs
    routers: int = 0  # weights of the routers in all layers; part of `matrices`
    params_per_expert: int = 0  # of one expert in all layers, its row of the routers included
    narrowable: bool = True  # whether neurons can be pruned

    @property
    def in_layers(self) -> int:
        """Weights of the layers' linear parts, all experts included."""
        return self.matrices + self.inactive - self.vocabulary * self.hidden

    def scaled(self, params: int, unit: str = "neurons") -> Shape:
        """The shape with fewer parameters, all of them taken from the linear layers, or from experts not in use."""
        removed = self.params - params
        if unit == "experts":
            return self._with_fewer_experts(params)
        if self.experts and unit == "neurons":
            # All neurons of a mixture are in its experts, and the routers stay.
            whole = self.in_experts
            routers = self.routers
            per_expert = self.params_per_expert - removed // self.experts
        else:
            # A layer takes its share of the experts and routers with it.
            whole = self.in_layers
            routers = self.routers - removed * self.routers // whole
            per_expert = self.params_per_expert - removed * self.params_per_expert // whole
        inactive = removed * self.inactive // whole
        return replace(
            self,
            params=params,
            matrices=self.matrices - (removed - inactive),
            routed=self.routed - removed * self.routed // whole,
            inactive=self.inactive - inactive,
            routers=routers,
            params_per_expert=per_expert,
        )

    @property
    def in_experts(self) -> int:
        """Weights of all experts in all layers; 0 in a dense model."""
        return self.routed + self.inactive

    @property
    def removable_experts(self) -> int:
        """Parameters of the experts that can go, as a token is not sent to them, and of their rows of the routers."""
        return self._unused * self.params_per_expert

    @property
    def _unused(self) -> int:
        """Experts in each layer that a token is not sent to."""
        return round(self.experts * self.inactive / self.in_experts) if self.experts else 0

    def _with_fewer_experts(self, params: int) -> Shape:
        """The shape with fewer parameters: as many experts less as have them, which need not be a whole number."""
        removed = (self.params - params) / self.params_per_expert  # experts of each layer
        routers = round(removed / self.experts * self.routers)
        inactive = round(removed / self._unused * self.inactive)
        return replace(
            self,
            params=params,
            matrices=self.matrices - routers,
            experts=self.experts - round(removed),
            inactive=self.inactive - inactive,
            routers=self.routers - routers,
        )

    def read_params(self, rows: float) -> float:
        """Parameters that are read to decode a token of so many rows: of the experts those that a row is sent to."""
        if not self.inactive:
            return self.params
        # As if tokens were sent to experts at random.
        untouched = self.in_experts * (self.inactive / self.in_experts) ** rows
        return self.params - untouched


def shape_of(path: str, revision: str | None = None) -> Shape:
    """A model's shape from its config.json alone; of a folder without a dtype there, from the weights' headers too."""
    folder = hub.locate(path, revision, ["config.json"])
    config = text_tower.read_config(folder)
    family = family_of(config)
    sizes = read_sizes(config, family, f"config.json of {path}")
    params, matrices = shapes.count(config, family, sizes)
    itemsize = checkpoint.itemsize(folder)
    return Shape(
        params=params,
        matrices=matrices,
        layers=sizes.num_hidden_layers,
        hidden=sizes.hidden_size,
        vocabulary=sizes.vocab_size,
        heads_width=(sizes.query_width + sizes.value_width) // 2,
        kv_bytes=sizes.num_hidden_layers * sizes.cached_numbers * itemsize,
        itemsize=itemsize,
        experts=sizes.num_experts,
        routed=sizes.expert_layers * sizes.num_experts_per_tok * sizes.params_per_expert,
        inactive=shapes.inactive(sizes),
        routers=sizes.expert_layers * sizes.num_experts * sizes.hidden_size,
        params_per_expert=sizes.expert_layers * (sizes.params_per_expert + sizes.params_per_route),
        narrowable=sizes.narrowable,
    )


def forward_flops(shape: Shape, tokens: float, context: float) -> float:
    """FLOPs of a forward pass over `tokens`, each looking back over half of `context` on average."""
    weights = 2 * shape.matrices
    attention = 2 * shape.layers * shape.heads_width * context  # queries by keys, weights by values
    return tokens * (weights + attention)


def decode_seconds(shape: Shape, rows: float, itemsize: int, context: float, card: Gpu) -> float:
    """Seconds to decode one token of every row: all weights in use and the cache are read once."""
    weights = shape.read_params(rows) * itemsize  # bytes
    cache = rows * context * shape.kv_bytes  # bytes
    bandwidth = card.bandwidth * DECODE_SHARE
    return (weights + cache) / bandwidth


def activations(shape: Shape, tokens: float, itemsize: int, checkpointed: bool) -> float:
    """Bytes kept for the backward pass of `tokens` tokens on one device."""
    # 34 bytes for each hidden value in a layer at 2 bytes a number.
    layer = 34 / 2 * itemsize * shape.hidden * tokens
    if not checkpointed:
        return shape.layers * layer
    # Only each layer's input is kept; one layer at a time is computed again.
    inputs = itemsize * shape.hidden * tokens
    return shape.layers * inputs + layer


def training_memory(shape: Shape, stage: RecoverStage, teacher: Shape, group: GpuGroup) -> float:
    """Bytes on each GPU of a group: float32 weights, gradients and optimizer state, activations, logits, teacher."""
    # Weights, gradients and Adam's two averages, 4 bytes each; an adapter's are too small to count.
    weights = 4.0 * shape.params
    lora = isinstance(stage, NextToken) and stage.lora is not None
    trained = 0.0 if lora else 12.0 * shape.params
    sharded = stage.sharding == "fsdp"
    if sharded:
        weights /= group.count
        trained /= group.count
    memory = weights + trained + CONTEXT
    if sharded and group.count > 1:
        memory += _unsharded(shape, stage)

    # What a batch needs; `tokens` are those of one forward pass on one GPU.
    micro_batches = stage.accumulation * group.count
    rows = math.ceil(stage.batch_size / micro_batches)
    tokens = rows * sequence_length(stage)
    memory += activations(shape, tokens, itemsize_of(stage), stage.gradient_checkpointing)
    if isinstance(stage, Distil):
        memory += 3 * 4.0 * tokens * shape.vocabulary  # logits of both models and their gradient
        memory += teacher.params * teacher.itemsize
    if isinstance(stage, Grpo):
        if stage.beta:
            memory += 4.0 * shape.params  # the reference model
        memory += tokens * shape.kv_bytes  # the cache while it generates
    return memory


def _unsharded(shape: Shape, stage: RecoverStage) -> float:
    """Bytes of weights and gradients that FSDP holds in one piece, in the precision of the pass."""
    embeddings = shape.vocabulary * shape.hidden
    layer = shape.in_layers / shape.layers
    # Weights at work, the next ones, which are gathered meanwhile, and gradients that are being reduced.
    return 3 * max(layer, embeddings) * itemsize_of(stage)


def itemsize_of(stage: RecoverStage) -> int:
    """Bytes of a number in a stage's forward and backward passes."""
    return 2 if stage.dtype == "bfloat16" else 4


def sequence_length(stage: RecoverStage) -> int:
    """Tokens of the longest sequence that a stage trains on."""
    if isinstance(stage, NextToken):
        return stage.max_length
    return PROMPT_TOKENS + stage.max_completion_length
