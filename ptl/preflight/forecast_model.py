"""What a model costs by its config alone: FLOPs, GPU memory and seconds to generate, on GPUs by their data sheets.

FLOPs: 2 per weight and token forward, 6 with backward (Kaplan et al. 2020, 2001.08361, section 2.1), attention's
products added. Activations: Korthikanti et al. 2022 (2205.05198), equation 2 without the attention matrix, which is
never stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ptl.config.recover import RecoverStage
from ptl.config.run import Calibration, Config
from ptl.evaluation import tasks
from ptl.model import checkpoint, hub, shapes, text_tower
from ptl.model.dimensions import ModelDimensions, dimensions_of
from ptl.model.families import family_of

GIB, TERA = 1 << 30, 1e12
OPTIMIZER_STATE = 8  # bytes a parameter: Adam's two averages in float32
REACHED = 0.35  # share of a data sheet's FLOP/s
DECODE_SHARE = 0.5  # of the memory bandwidth that generation reaches
CONTEXT = 1 << 30  # bytes for CUDA, kernels and fragments
PROMPT_TOKENS = 512  # of a prompt, whose length nothing says


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet. float32 is without TF32, which torch uses for matrix products only where it is set."""

    gib: float  # of memory
    bf16: float  # dense TFLOP/s
    fp32: float  # the same in float32
    bandwidth: float  # TB/s of the memory
    # Of a CPU these are measured, and its numbers above are what it reaches.
    reached: float = REACHED
    decoded: float = DECODE_SHARE
    layer_seconds: float = 0.0  # of a layer for one token, however small it is

    def flops(self, dtype: str) -> float:
        """FLOP/s that work reaches."""
        return (self.bf16 if dtype == "bfloat16" else self.fp32) * TERA * self.reached


USUAL_GPU = "h100"
NO_GPU = "none"  # in place of a kind: work is done by the CPU

# NVIDIA's data sheets; where they give bf16 with sparsity, half of that. Memory as sold: of cards whose ECC is kept in
# the memory itself the driver shows up to 6 % less, for which forecast.FULL leaves room.
GPUS = {
    "t4": Gpu(16, 8.1, 8.1, 0.32),  # Turing has no bf16; its 65 TFLOP/s are fp16
    "l4": Gpu(24, 121, 30.3, 0.3),
    "a10": Gpu(24, 125, 31.2, 0.6),
    "rtx4090": Gpu(24, 165, 82.6, 1.008),
    "a100-40": Gpu(40, 312, 19.5, 1.555),
    "l40s": Gpu(48, 362, 91.6, 0.864),
    "a100-80": Gpu(80, 312, 19.5, 2.039),  # SXM; the PCIe card has 1.935 TB/s
    "h100": Gpu(80, 989, 67, 3.35),  # SXM
    "h100-pcie": Gpu(80, 756, 51, 2.0),
    "h200": Gpu(141, 989, 67, 4.8),
    "b200": Gpu(180, 2250, 80, 8.0),  # HGX, 1,000 W
}


@dataclass(frozen=True)
class Shape:
    """A model as its config says it: what stays when neurons, experts or layers go."""

    dimensions: ModelDimensions  # of the dense model
    vocabulary: int
    lookup: int  # parameters of an input embedding that is no output layer too: they cost no FLOPs
    heads_width: int  # heads * head_dim; the mean of queries and values where these differ
    cached_numbers: int  # in the KV cache for a token in all layers
    itemsize: int  # bytes of a stored weight
    context: int | None  # tokens that the model can read; None: its config has no limit
    # whether the cache holds what keys and values of all heads are computed from
    latent: bool = False

    @property
    def params(self) -> int:
        """All parameters of the dense model."""
        return self.dimensions.params

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache for a token."""
        return self.cached_numbers * self.itemsize

    def of(self, model: ModelDimensions) -> Shape:
        """The shape of a pruned model, whose residual stream may be narrower, and its KV heads fewer."""
        dense = self.dimensions
        cached = (
            self.cached_numbers
            if self.latent
            else self.cached_numbers * model.kv_heads // dense.kv_heads
        )
        return replace(
            self,
            dimensions=model,
            lookup=self.lookup * model.hidden // dense.hidden,
            heads_width=self.heads_width * model.kv_heads // dense.kv_heads,
            cached_numbers=cached,
        )


def shape_of(path: str, revision: str | None = None) -> Shape:
    """A model's shape from its config.json alone; of a folder without a dtype there, from the weights' headers too."""
    folder = hub.locate(path, revision, ["config.json"])
    config = text_tower.read_config(folder)
    family = family_of(config)
    model = shapes.of_config(config, family, f"config.json of {path}")
    dimensions = dimensions_of(model)
    return Shape(
        dimensions=dimensions,
        vocabulary=model.config.vocab_size,
        lookup=0 if model.tied else model.config.vocab_size * model.config.hidden_size,
        heads_width=model.attention_width // (2 * dimensions.layers),
        cached_numbers=model.cached_numbers,
        itemsize=checkpoint.itemsize(folder),
        context=config.get("max_position_embeddings"),
        latent=hasattr(model.config, "kv_lora_rank"),
    )


def checkpoint_bytes(config: Config, shape: Shape) -> int:
    """The most that a run publishes: the model, and two of its size by each iteration and by the control.

    All but the last iteration's hold the optimizer's state.
    """
    iterations = config.schedule.iterations
    checkpoints = 1 + 2 * iterations + 2 * config.control
    return shape.params * (checkpoints * shape.itemsize + 2 * (iterations - 1) * OPTIMIZER_STATE)


def forward_flops(shape: Shape, model: ModelDimensions, tokens: float, context: float) -> float:
    """FLOPs of a forward pass of a pruned model over `tokens`, each looking back over half of `context` on average."""
    pruned = shape.of(model)
    weights = 2 * (model.active_params - pruned.lookup)
    # queries by keys, weights by values
    attention = 2 * model.layers * pruned.heads_width * context
    return tokens * (weights + attention)


def decode_seconds(
    shape: Shape, model: ModelDimensions, rows: float, itemsize: int, context: float, gpu: Gpu
) -> float:
    """Seconds to decode one token of every row: all weights in use and the cache are read once."""
    # As if each row's token were sent to experts at random.
    unused = (1 - model.experts_per_token / model.experts) ** rows if model.experts else 0.0
    read = model.params - unused * model.experts * model.params_per_expert
    cache = rows * context * shape.of(model).kv_bytes  # bytes
    reading = (read * itemsize + cache) / (gpu.bandwidth * TERA * gpu.decoded)
    # A CPU is no faster with many rows: it computes for longer than it reads.
    computing = forward_flops(shape, model, rows, context) / gpu.flops(
        "float32" if itemsize == 4 else "bfloat16"
    )
    return max(reading, computing) + model.layers * gpu.layer_seconds


def scoring_memory(shape: Shape, calibration: Calibration, repair: int) -> float:
    """Bytes on the GPU of a prune step: one layer, or embeddings and head; all hidden states once, a batch at work.

    Of a repair a second layer, three squares of the FFN width and a batch's activations twice, in float32.
    """
    model = shape.dimensions
    outside = model.params - model.layers * model.params_per_layer  # of the layers
    weights = max(model.params_per_layer, outside) * shape.itemsize
    hidden_states = (
        max(calibration.num_sequences, repair)
        * calibration.max_length
        * model.hidden
        * shape.itemsize
    )
    batch = activations(
        model.hidden, 1, calibration.batch_size * calibration.max_length, shape.itemsize, False
    )
    # Of one sequence, in float32: logits, their logarithms and the gradient.
    logits = 3 * 4.0 * calibration.max_length * shape.vocabulary
    squares = 0.0
    if repair:
        squares = (
            4.0
            * model.width
            * (3 * model.width + 2 * calibration.batch_size * calibration.max_length)
        )
        squares += model.params_per_layer * shape.itemsize
    return weights + hidden_states + max(batch, logits, squares) + CONTEXT


def answering_memory(shape: Shape, model: ModelDimensions, config: Config, gpus: int) -> float:
    """Bytes on each of `gpus` in an evaluation: weights, and the cache of a batch; vLLM divides both.

    With room for the longest answer to a benchmark or, where it writes answers of its own, to a training prompt.
    """
    evaluate, training = config.evaluate, config.training
    lengths = [tasks.answer_tokens(task) for task in evaluate.tasks]
    length = PROMPT_TOKENS + max(
        *lengths, training.max_new_tokens if training.answers == "self" else 0
    )
    memory = model.params * shape.itemsize + evaluate.batch_size * length * shape.of(model).kv_bytes
    return CONTEXT + (memory / gpus if evaluate.backend == "vllm" else memory)


def training_memory(shape: Shape, model: ModelDimensions, stage: RecoverStage, gpus: int) -> float:
    """Bytes on each of `gpus`: float32 weights, gradients and optimizer state, activations, logits, teacher."""
    # Weights, gradients and Adam's two averages, 4 bytes each; an adapter's are too small to count.
    memory = (16.0 if stage.lora is None else 4.0) * model.params
    if stage.sharding == "fsdp" and gpus > 1:
        # A layer at work and the next one, which is gathered meanwhile, and gradients that are being reduced.
        largest = max(model.params_per_layer, shape.vocabulary * model.hidden)
        memory = memory / gpus + 3 * largest * _itemsize(stage)
    memory += CONTEXT

    # What a batch needs; `tokens` are those of one forward pass on one GPU.
    rows = math.ceil(stage.batch_size / (stage.accumulation * gpus))
    tokens = rows * sequence_length(stage)
    memory += activations(
        model.hidden, model.layers, tokens, _itemsize(stage), stage.gradient_checkpointing
    )
    # In float32: logits and their gradient, and those of the teacher.
    memory += (3 if stage.method == "distil" else 2) * 4.0 * tokens * shape.vocabulary
    if stage.method == "distil":
        memory += shape.params * shape.itemsize  # the teacher
    if stage.method == "grpo":
        memory += tokens * shape.of(model).kv_bytes  # the cache while it generates
        if stage.beta:
            memory += 4.0 * model.params  # the reference model
    return memory


def activations(
    hidden: int, layers: int, tokens: float, itemsize: int, checkpointed: bool
) -> float:
    """Bytes kept for the backward pass of `tokens` tokens on one device."""
    # 34 bytes for each hidden value in a layer at 2 bytes a number.
    layer = 34 / 2 * itemsize * hidden * tokens
    if not checkpointed:
        return layers * layer
    # Only each layer's input is kept; one layer at a time is computed again.
    return layers * itemsize * hidden * tokens + layer


def sequence_length(stage: RecoverStage) -> int:
    """Tokens of the longest sequence that a stage trains on."""
    return (
        PROMPT_TOKENS + stage.max_completion_length if stage.method == "grpo" else stage.max_length
    )


def _itemsize(stage: RecoverStage) -> int:
    """Bytes of a number in a stage's forward and backward passes."""
    return 2 if stage.dtype == "bfloat16" else 4
