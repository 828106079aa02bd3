"""Where things are in the checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "pipelines/prune_tune_loop/configs"
SHIPPED = [*sorted(CONFIGS.glob("*.yaml")), ROOT / "examples/qwen-coder/config.yaml"]
TINY = CONFIGS / "tiny.yaml"
EXAMPLE = ROOT / "examples/tiny_reasoner"
DENSE = EXAMPLE / "checkpoint"
