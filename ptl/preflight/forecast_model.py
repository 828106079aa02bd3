"""What a model costs by its config alone: FLOPs, GPU memory and seconds to generate.

FLOPs: 2 per weight and token forward, 6 with backward (Kaplan et al. 2020, 2001.08361, section 2.1), attention's
products added. Activations: Korthikanti et al. 2022 (2205.05198), equation 2 without the attention matrix, which is
never stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ptl.config.recover import RecoverStage
from ptl.config.run import Calibration
from ptl.model import checkpoint, hub, shapes, text_tower
from ptl.model.dimensions import ModelDimensions, dimensions_of
from ptl.model.families import family_of
from ptl.preflight.gpus import Gpu

DECODE_SHARE = 0.5  # of the memory bandwidth that generation reaches
CONTEXT = 1 << 30  # bytes for CUDA, kernels and fragments
PROMPT_TOKENS = 512  # of a prompt, where nothing says how long it is


@dataclass(frozen=True)
class Shape:
    """A model as its config says it: what stays when neurons, experts or layers go."""

    dimensions: ModelDimensions  # of the dense model
    hidden: int
    vocabulary: int
    lookup: int  # parameters of an input embedding that is no output layer too: they cost no FLOPs
    heads_width: int  # heads * head_dim; the mean of queries and values where these differ
    cached_numbers: int  # in the KV cache for a token in all layers
    itemsize: int  # bytes of a stored weight
    context: int | None  # tokens that the model can read; None: its config has no limit

    @property
    def params(self) -> int:
        """All parameters of the dense model."""
        return self.dimensions.params

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache for a token."""
        return self.cached_numbers * self.itemsize


def shape_of(path: str, revision: str | None = None) -> Shape:
    """A model's shape from its config.json alone; of a folder without a dtype there, from the weights' headers too."""
    folder = hub.locate(path, revision, ["config.json"])
    config = text_tower.read_config(folder)
    family = family_of(config)
    model = shapes.of_config(config, family, f"config.json of {path}")
    dimensions = dimensions_of(model)
    return Shape(
        dimensions=dimensions,
        hidden=model.config.hidden_size,
        vocabulary=model.config.vocab_size,
        lookup=0 if model.tied else model.config.vocab_size * model.config.hidden_size,
        heads_width=model.attention_width // (2 * dimensions.layers),
        cached_numbers=model.cached_numbers,
        itemsize=checkpoint.itemsize(folder),
        context=config.get("max_position_embeddings"),
    )


def forward_flops(shape: Shape, model: ModelDimensions, tokens: float, context: float) -> float:
    """FLOPs of a forward pass of a pruned model over `tokens`, each looking back over half of `context` on average."""
    weights = 2 * (model.active_params - shape.lookup)
    attention = 2 * model.layers * shape.heads_width * context  # queries by keys, weights by values
    return tokens * (weights + attention)


def decode_seconds(shape: Shape, model: ModelDimensions, rows: float, itemsize: int, context: float, gpu: Gpu) -> float:
    """Seconds to decode one token of every row: all weights in use and the cache are read once."""
    # As if each row's token were sent to experts at random.
    unused = (1 - model.experts_per_token / model.experts) ** rows if model.experts else 0.0
    read = model.params - unused * model.experts * model.params_per_expert
    cache = rows * context * shape.kv_bytes  # bytes
    return (read * itemsize + cache) / (gpu.bandwidth * DECODE_SHARE)


def scoring_memory(shape: Shape, calibration: Calibration) -> float:
    """Bytes on the GPU of a prune step: one layer, or embeddings and head; all hidden states once, a batch at work."""
    model = shape.dimensions
    weights = (
        max(
            model.params_per_layer,
            model.params - model.layers * model.params_per_layer,
        )
        * shape.itemsize
    )
    hidden_states = calibration.num_sequences * calibration.max_length * shape.hidden * shape.itemsize
    batch = activations(shape, 1, calibration.batch_size * calibration.max_length, shape.itemsize, False)
    # Of one sequence, in float32: logits, their logarithms and the gradient.
    logits = 3 * 4.0 * calibration.max_length * shape.vocabulary
    return weights + hidden_states + max(batch, logits) + CONTEXT


def training_memory(shape: Shape, model: ModelDimensions, stage: RecoverStage, gpus: int) -> float:
    """Bytes on each of `gpus`: float32 weights, gradients and optimizer state, activations, logits, teacher."""
    # Weights, gradients and Adam's two averages, 4 bytes each; an adapter's are too small to count.
    memory = (16.0 if stage.lora is None else 4.0) * model.params
    if stage.sharding == "fsdp" and gpus > 1:
        # A layer at work and the next one, which is gathered meanwhile, and gradients that are being reduced.
        largest = max(model.params_per_layer, shape.vocabulary * shape.hidden)
        memory = memory / gpus + 3 * largest * _itemsize(stage)
    memory += CONTEXT

    # What a batch needs; `tokens` are those of one forward pass on one GPU.
    rows = math.ceil(stage.batch_size / (stage.accumulation * gpus))
    tokens = rows * sequence_length(stage)
    memory += activations(shape, model.layers, tokens, _itemsize(stage), stage.gradient_checkpointing)
    if stage.method == "distil":
        memory += 3 * 4.0 * tokens * shape.vocabulary  # logits of both models and their gradient
        memory += shape.params * shape.itemsize  # the teacher
    if stage.method == "grpo":
        memory += tokens * shape.kv_bytes  # the cache while it generates
        if stage.beta:
            memory += 4.0 * model.params  # the reference model
    return memory


def activations(shape: Shape, layers: int, tokens: float, itemsize: int, checkpointed: bool) -> float:
    """Bytes kept for the backward pass of `tokens` tokens on one device."""
    # 34 bytes for each hidden value in a layer at 2 bytes a number.
    layer = 34 / 2 * itemsize * shape.hidden * tokens
    if not checkpointed:
        return layers * layer
    # Only each layer's input is kept; one layer at a time is computed again.
    return layers * itemsize * shape.hidden * tokens + layer


def sequence_length(stage: RecoverStage) -> int:
    """Tokens of the longest sequence that a stage trains on."""
    return PROMPT_TOKENS + stage.max_completion_length if stage.method == "grpo" else stage.max_length


def _itemsize(stage: RecoverStage) -> int:
    """Bytes of a number in a stage's forward and backward passes."""
    return 2 if stage.dtype == "bfloat16" else 4
