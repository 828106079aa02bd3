"""Quantized weights for vLLM and transformers: compressed-tensors, through llmcompressor."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

from ptl import extras, processes
from ptl.config.chat import NO_CHAT, Chat
from ptl.config.run import Calibration, Evaluate
from ptl.data import sequences as data
from ptl.errors import InputError, WorkError
from ptl.evaluation import language_models
from ptl.export import quantize
from ptl.model import checkpoint, pretrained, shapes, text_tower
from ptl.model.families import family_of

PYTHON = "PTL_LLMCOMPRESSOR_PYTHON"  # environment variable: a Python that has llmcompressor
OWN_PYTHON = Path(__file__).parents[2] / ".venv-llmcompressor/bin/python"  # of `make llmcompressor`
INSTALL = (
    f"run `make llmcompressor` in a checkout, set {PYTHON} to a Python with `pip install llmcompressor`, or use "
    "`--runner docker`"
)
# By type: the preset of compressed-tensors
SCHEMES = {"fp8": "FP8_DYNAMIC", "int8": "W8A8", "w4a16": "W4A16"}
CALIBRATED = ("int8", "w4a16")  # by GPTQ
# By model_type: why not even fp8 is written, as seen with llmcompressor 0.14 and transformers 5.17
REFUSED = {
    "internlm3": "llmcompressor's transformers does not have it",
    "mixtral": "llmcompressor saves its experts by names that neither transformers nor vLLM reads",
    **dict.fromkeys(
        ("qwen2_moe", "deepseek_v3", "glm4_moe", "gpt_oss"),
        "this mixture of experts has not been tried",
    ),
}
# Weights of a row that share a scale in w4a16; vLLM's kernels know these
GROUP_SIZES = (128, 64, 32)
LAST_LINES = 20  # of the output, in an error


def check_installed() -> None:
    """Raise InputError where llmcompressor, or what transformers loads its checkpoints with, is not installed."""
    interpreter()
    extras.need_all(["evaluate"], "export")


def check(src: Path, type: str, _narrow: bool = False) -> list[str]:
    """Raise InputError where this type of `src` could not be written or evaluated; no notes.

    Of a multimodal checkpoint the text model counts, which the import takes out.
    """
    family = family_of(text_tower.read_config(src))
    shapes.of_checkpoint(src, family)
    if family.model_type in REFUSED:
        raise InputError(
            f"model_type {family.model_type} cannot be written: {REFUSED[family.model_type]}",
            field="export",
            remedy="serve the checkpoint as it is",
        )
    if family.experts and type in CALIBRATED:
        raise InputError(
            f"{type} of a mixture of experts ({family.model_type}) cannot be loaded by transformers, which would be "
            "needed to evaluate it",
            field="export",
            remedy="take fp8",
        )
    group_size(src, type)
    return []


def group_size(
    src: Path,
    type: str,
    width: int | None = None,  # of the FFN
    hidden: int | None = None,
    heads: int | None = None,  # query heads
) -> int | None:
    """The largest size of groups by which the rows of every linear layer can be divided; None: the type has none.

    With other sizes it is as if `src` had been pruned to them. Raises InputError where there is no size of groups.
    """
    if type != "w4a16":
        return None
    content = text_tower.read_config(src)
    model = shapes.of_config(content, family_of(content), str(src / "config.json"))
    of_heads = model.layers()[0]["self_attn.o_proj.weight"].shape[1]
    of_head = of_heads // model.config.num_attention_heads
    rows = {
        "hidden_size": hidden or model.config.hidden_size,
        "num_attention_heads * head_dim": heads * of_head if heads else of_heads,
        "intermediate_size": width or model.config.intermediate_size,
    }
    for size in GROUP_SIZES:
        if all(length % size == 0 for length in rows.values()):
            return size
    smallest = GROUP_SIZES[-1]
    named = ", ".join(f"{name}={length}" for name, length in rows.items() if length % smallest)
    raise InputError(
        f"w4a16 has groups of {', '.join(map(str, GROUP_SIZES))} weights, and no multiple of {smallest} is {named}",
        field="export",
        # Heads keep their size.
        remedy=f"take fp8 or int8, or prune with prune.width_multiple: {GROUP_SIZES[0]} (intermediate_size; with "
        "prune.target=width hidden_size too)",
    )


def write(
    src: Path,
    dst: Path,
    type: str,
    calibration: Calibration | None = None,  # int8 and w4a16 need it
    chat: Chat = NO_CHAT,
    seed: int = 0,
) -> list[str]:
    """Write `src` with quantized weights to the folder `dst`, which must not exist or be empty; no notes.

    int8 and w4a16 see the sequences that pruning calibrates with. llmcompressor's output goes to ours. Raises
    InputError before it starts for what cannot be written or has no text, and without a Python that has
    llmcompressor; WorkError with the last lines of its output when it fails.
    """
    family_of(checkpoint.read_config(src))  # refuses a multimodal model, which is imported first
    check(src, type)
    python = interpreter()
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}.", dir=dst.parent) as scratch:
        partial = Path(scratch) / "checkpoint"
        options = {"scheme": SCHEMES[type], "group_size": group_size(src, type), "sequences": None}
        if type in CALIBRATED:
            if calibration is None:
                raise InputError(
                    f"{type} needs text for calibration",
                    field="--config",
                    remedy="give the run's config, or take fp8",
                )
            # The sequences that pruning calibrates with: both environments then have the same tokens.
            rows = data.calibration_rows(calibration, pretrained.load_tokenizer(src), seed, chat)
            sequences = Path(scratch) / "sequences.jsonl"
            sequences.write_text(
                "".join(json.dumps({"input_ids": tokens.ids}) + "\n" for tokens in rows)
            )
            options["sequences"] = str(sequences)
        _run(
            [
                str(python),
                "-I",
                "-u",
                quantize.__file__,
                str(src),
                str(partial),
                json.dumps(options),
            ]
        )
        for path in checkpoint.shards(partial):
            path.chmod(0o644)  # safetensors writes 0600, which another UID cannot read
        # config.json says what was done; this file has YAML tags that name Python objects.
        (partial / "recipe.yaml").unlink()
        # In place of what an older transformers has saved
        checkpoint.copy_companions(src, partial)
        partial.rename(dst)
    return []


def interpreter() -> Path:
    """A Python that has llmcompressor, which ptl's own environment cannot hold. Raises InputError where none is."""
    setting = os.environ.get(PYTHON)
    python = setting or (OWN_PYTHON if OWN_PYTHON.is_file() else sys.executable)
    extras.check_loads(
        f"llmcompressor of {python}",
        (str(python), "-I", "-c", "import llmcompressor"),
        field=PYTHON if setting else "export",
        remedy=INSTALL,
    )
    return Path(python)


def _run(command: list[str]) -> None:
    """Run a command to its end, its output into ours. Raises WorkError with the last lines where it fails."""
    # Bars would be a line for each step; both libraries' logs name the layers.
    environment = {**os.environ, "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    last_lines: deque[str] = deque(maxlen=LAST_LINES)

    def follow(line: str) -> None:
        print(line, end="", flush=True)
        last_lines.append(line)

    exit_code = processes.followed(command, environment, follow)
    if exit_code:
        raise WorkError(
            f"llmcompressor ended with {exit_code}: {''.join(last_lines).strip()}", field="export"
        )


def language_model(folder: Path, _src: Path, settings: Evaluate, chat: Chat, seed: int) -> Any:
    """The harness's model for an export.

    transformers expands the weights when it loads them or before the first token, so that neither its speed nor its
    memory is that of the runtime. The image of this step has no vLLM.
    """
    settings = settings.model_copy(update={"backend": "hf"})
    return language_models.language_model(folder, settings, chat, seed)


def speed(*_: Any) -> dict[str, Any]:
    """Not measured, as `ptl.export.formats` says."""
    return {"reason": "transformers unpacks the weights, so that its speed says nothing of vLLM's"}
