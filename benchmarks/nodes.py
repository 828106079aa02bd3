"""The forecast of a recovery on several nodes of 8 H100, and of published trainings beside what was measured in them.

    python benchmarks/nodes.py

Three Markdown tables, for docs/performance.md. Nothing is trained or measured: the numbers are those of `ptl plan`, for
configs that prune next to nothing, so that the whole model is trained. Only sizes of models are needed, and are below.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from ptl.config.run import load_config  # noqa: E402
from ptl.preflight.forecast import forecast  # noqa: E402
from ptl.preflight.forecast_model import forward_flops, shape_of  # noqa: E402
from ptl.preflight.forecast_steps import StepForecast  # noqa: E402
from ptl.preflight.gpus import GIB, GPUS  # noqa: E402

TOKENS = 10**9
NODES = (1, 4, 16)


def _llama(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = False) -> dict:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }


MODELS = {
    "Llama 3.1 8B": _llama(4096, 14336, 32, 32, 8, 128256),
    "Llama 3.1 70B": _llama(8192, 28672, 80, 64, 8, 128256),
    "Llama 2 7B": _llama(4096, 11008, 32, 32, 32, 32000),
    "Llama 2 70B": _llama(8192, 28672, 80, 64, 8, 32000),
    # Two matrices of 4 x hidden in an FFN: as large as three of 8/3 x hidden.
    "MPT 13B": _llama(5120, 13653, 40, 40, 40, 50368, tied=True),
    "MPT 70B": _llama(8192, 21845, 80, 64, 64, 50368, tied=True),
    "Llama 3 15B": _llama(5120, 17920, 40, 40, 8, 128256),
    # A mixture: 22B of the parameters meet a token.
    "Qwen3 235B-A22B": {
        "model_type": "qwen3_moe",
        "hidden_size": 4096,
        "moe_intermediate_size": 1536,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "dtype": "bfloat16",
    },
}


@dataclass(frozen=True)
class Training:
    """How a model is trained, in bfloat16."""

    model: str
    nodes: int
    rows: int  # sequences of one forward pass on one GPU
    length: int  # tokens of a sequence
    recomputed: bool  # activations
    sharding: str = "fsdp"
    accumulation: int = 1
    gpu: str = "h100"
    per_node: int = 8
    network: float | None = None  # Gbit/s for each GPU


@dataclass(frozen=True)
class Published:
    """What somebody measured."""

    source: str
    tokens_per_second: int  # on each GPU
    training: Training


# Sources are in docs/performance.md.
PUBLISHED = [
    # With torch.compile, and without, as ptl trains.
    Published("torchtitan, compiled", 6667, Training("Llama 3.1 8B", 1, 2, 8192, False)),
    Published("torchtitan, compiled", 6514, Training("Llama 3.1 8B", 16, 2, 8192, False)),
    Published("torchtitan", 5762, Training("Llama 3.1 8B", 1, 2, 8192, False)),
    Published("torchtitan", 5605, Training("Llama 3.1 8B", 16, 2, 8192, False)),
    # 800 Gbit/s a node.
    Published("IBM and Meta", 7500, Training("Llama 2 7B", 12, 2, 4096, False, network=100)),
    Published("IBM and Meta", 800, Training("Llama 2 70B", 12, 2, 4096, True, network=100)),
    Published("llm-foundry", 4792, Training("MPT 13B", 1, 2, 2048, False)),
    Published("llm-foundry", 4800, Training("MPT 13B", 8, 2, 2048, False)),
    Published("llm-foundry", 882, Training("MPT 70B", 4, 2, 2048, True, accumulation=16)),
    Published("llm-foundry", 1039, Training("MPT 70B", 8, 8, 2048, True, accumulation=4)),
    Published("KempnerForge", 4426, Training("Llama 3 15B", 2, 4, 4096, True, accumulation=4, gpu="h200", per_node=4)),
]


def recovery(training: Training) -> tuple[StepForecast, float]:
    """The forecast of a recovery of TOKENS tokens, and its MFU."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODELS[training.model]))
        config = load_config(ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml", _settings(training, folder))
        run = forecast(config, training.gpu, training.per_node, training.nodes, training.network)
        shape = shape_of(folder)
    step = next(step for step in run.steps if step.step == "recover-1")
    # Of the model itself: what is computed again does not count.
    flops_per_token = 3 * forward_flops(shape, 1, training.length)
    mfu = step.tokens_per_second * flops_per_token / (step.gpus * GPUS[training.gpu].bf16)
    return step, mfu


def _settings(training: Training, folder: str) -> dict[str, Any]:
    passes = training.accumulation * training.nodes * training.per_node
    stage = {
        "dtype": "bfloat16",
        "loss": "all",
        "packing": True,
        "max_length": training.length,
        "batch_size": training.rows * passes,
        "accumulation": training.accumulation,
        "sharding": training.sharding,
        "gradient_checkpointing": training.recomputed,
    }
    experts = "num_experts" in MODELS[training.model]
    return {
        "model.path": folder,
        "prune.target": "experts" if experts else "neurons",
        "schedule.target": 1e-4,
        "schedule.iterations": 1,
        "schedule.recovery_tokens": TOKENS,
        "control": False,
        "recover": [stage],
    }


def print_forecast() -> None:
    """Hours of TOKENS tokens on NODES, with 2 sequences of 4,096 tokens on each GPU."""
    print("| model | nodes x GPUs | sharding | GiB per GPU | tokens/s | of each GPU | MFU | hours | GPU-hours |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|")
    for model in ("Llama 3.1 8B", "Llama 3.1 70B", "Qwen3 235B-A22B"):
        for nodes in NODES:
            step, mfu = recovery(Training(model, nodes, 2, 4096, True, "fsdp"))
            cells = [model, f"{nodes} x 8", "`fsdp`", f"{step.memory / GIB:.0f}"]
            if step.fits:
                rate = step.tokens_per_second
                cells += [f"{rate:,.0f}", f"{rate / step.gpus:,.0f}", f"{100 * mfu:.0f} %"]
                cells += [f"{step.hours:.1f}", f"{step.gpu_hours:.0f}"]
            else:
                cells += ["does not fit", "", "", "", ""]
            print("| " + " | ".join(cells) + " |")


def print_networks() -> None:
    """Tokens/s of each GPU on 16 nodes, by the network between them."""
    networks = (400, 200, 100, 50, 25, 12.5)
    print("| model | sharding | " + " | ".join(f"{network:g} Gbit/s" for network in networks) + " |")
    print("|---|---|" + "---:|" * len(networks))
    for model in ("Llama 3.1 8B", "Llama 3.1 70B", "Qwen3 235B-A22B"):
        cells = [model, "`fsdp`"]
        for network in networks:
            step, _ = recovery(Training(model, 16, 2, 4096, True, "fsdp", network=network))
            cells.append(f"{step.tokens_per_second / step.gpus:,.0f}")
        print("| " + " | ".join(cells) + " |")


def print_published() -> None:
    """The same for trainings that others have measured."""
    print("| measured by | model | nodes x GPUs | rows x tokens | recomputed here | measured | forecast | difference |")
    print("|---|---|---:|---:|---|---:|---:|---:|")
    for published in PUBLISHED:
        training = published.training
        step, _ = recovery(training)
        rate = step.tokens_per_second / step.gpus
        cells = [
            published.source,
            training.model,
            f"{training.nodes} x {training.per_node} {training.gpu}",
            f"{training.rows} x {training.length}",
            "yes" if training.recomputed else "no",
            f"{published.tokens_per_second:,}",
            f"{rate:,.0f}",
            f"{100 * (rate / published.tokens_per_second - 1):+.0f} %",
        ]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    print_forecast()
    print()
    print_networks()
    print()
    print_published()


if __name__ == "__main__":
    main()
