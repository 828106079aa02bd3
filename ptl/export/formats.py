"""Exports of a checkpoint for other runtimes, and the manifest by which KServe serves one.

Each format is a module of this package with these functions:

- check(checkpoint, type, whether its hidden size may be pruned): notes for the user; raises InputError for what cannot
  be made, before anything expensive
- check_installed(): raises UnusableError where what writes it is not installed on this machine, or does not load
- write(checkpoint, empty folder to fill, type, calibration, chat, seed): notes for the user
- language_model(folder, its checkpoint, settings, chat, seed): as language_models.language_model
- speed(checkpoints, their exports, settings, seed): rows of speed.measure_in_turns by name, `models`, for each
  checkpoint at 16 bits and its export, `<name>_export`, and the `setting`; or the `reason` why it was not measured
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from ptl.config.chat import Chat
from ptl.config.export import Export, ServedFormat
from ptl.config.run import Calibration, Evaluate
from ptl.errors import InputError
from ptl.evaluation.language_models import VLLM_FIELD
from ptl.evaluation.paired import Item
from ptl.model import pretrained, text_tower
from ptl.model.dimensions import ModelDimensions
from ptl.model.shapes import longrope_limit

REMOVE_LAYERS = ("layers", "neurons_then_layers")  # values of prune.target
# Families of which vLLM (0.33) takes the hidden size for that of all heads together, whatever head_dim says
SQUARE_IN_VLLM = ("qwen2", "qwen2_moe")
WEIGHTS = (".safetensors", ".gguf")  # files that count as a model's size, as in its evaluation
TEMPLATE = Path(__file__).with_name("templates") / "inference_service.yaml"


def module_of(format: str) -> Any:
    """The module of a format."""
    return import_module(f"ptl.export.{format.replace('-', '_')}")


def check_exports(
    src: Path, exports: Iterable[Export], ends: Sequence[ModelDimensions] = ()
) -> list[str]:
    """Raise InputError for the first export that cannot be made of a checkpoint, without writing any; else notes.

    `ends` are the sizes to which it may be pruned before.
    UnusableError where a format cannot be made on this machine. Takes about ten seconds for GGUF.
    """
    # Of GGUF no type makes a difference.
    distinct = {
        export.format if export.format == "gguf" else export.name: export for export in exports
    }
    narrow = any(end.hidden != end.heads * end.head_size for end in ends)
    notes = []
    for export in distinct.values():
        notes += module_of(export.format).check(src, export.type, narrow)
    return notes


def width_warnings(
    src: Path,
    exports: Iterable[Export],
    width: int,  # of the FFN
    hidden: int,  # dimensions of the residual stream
    heads: int,  # query heads
) -> list[str]:
    """A warning of each export that could not be made of the checkpoint once it is pruned to these sizes, or not small.

    Of `src` only config.json is read.
    """
    warnings = []
    for export in exports:
        if export.format == "gguf":
            warnings += module_of("gguf").hidden_warnings(src, export.type, hidden, heads)
            continue
        try:
            module_of(export.format).group_size(src, export.type, width, hidden, heads)
        except InputError as error:
            warnings.append(
                f"the step of {export.name} will fail if the loop ends as planned: {error}"
            )
    return warnings


def layer_warnings(src: Path, exports: Iterable[Export], target: str) -> list[str]:
    """A warning of GGUF where llama.cpp knows a layer's attention by its number and layers may go (`prune.target`).

    Of `src` only config.json is read.
    """
    if (
        target not in REMOVE_LAYERS
        or not pretrained.can_build()
        or all(export.format != "gguf" for export in exports)
    ):
        return []
    config = pretrained.config_with_defaults(text_tower.read_config(src))
    # Layers with different windows, or with and without rotary embeddings
    if len(set(getattr(config, "layer_types", None) or ())) < 2 and not getattr(
        config, "no_rope_layers", None
    ):
        return []
    return [
        f"prune.target={target} may remove layers, and llama.cpp may know the attention of a layer of "
        f"{config.model_type} by its number: whether GGUF can be made of the layers that are left is known only after "
        "the loop. Rehearse the run (--rehearse), set prune.target=neurons, or export to compressed-tensors"
    ]


def check_vllm(src: Path, target: str, backend: str) -> list[str]:
    """A warning where vLLM would fail or err after what `prune.target` may do; an InputError where it evaluates.

    Of `src` only config.json is read.
    """
    model_type = text_tower.read_config(src)["model_type"]
    if target == "width" and model_type in SQUARE_IN_VLLM:
        other = "neurons"
        problem = (
            f"vLLM ignores head_dim in the config of {model_type}, and cannot load it where prune.target=width leaves "
            "another hidden size than that of the heads together"
        )
    elif target in REMOVE_LAYERS and model_type == "gpt_oss":
        other = "experts"
        problem = (
            f"prune.target={target} may remove layers, and vLLM gives every other layer of gpt_oss a window, whatever "
            "its config says: it would compute another model, without an error"
        )
    else:
        return []
    if backend == "vllm":
        raise InputError(
            problem, field=VLLM_FIELD, remedy=f"set prune.target={other}, or backend: hf"
        )
    return [f"{problem}: set prune.target={other}, or serve with transformers"]


def context_notes(src: Path) -> list[str]:
    """What to serve a checkpoint with longrope with; of `src` only config.json is read."""
    limit = longrope_limit(text_tower.read_config(src))
    if limit is None:
        return []
    return [
        "longrope: llama.cpp and vLLM choose the factors by the size of their context, transformers by the length of "
        f"the text. Only up to {limit} tokens, in a context of no more, are the answers the same: serve with "
        f"--ctx-size {limit} --parallel 1 (llama-server) or --max-model-len {limit} (vLLM)"
    ]


def limited(settings: Evaluate, limit: int | None) -> Evaluate:
    """The evaluation of no more than `limit` items of each benchmark, the first of those that the run scores."""
    if limit is None:
        return settings
    tasks = tuple(
        task.model_copy(update={"limit": min(task.limit or limit, limit)})
        for task in settings.tasks
    )
    return settings.model_copy(update={"tasks": tasks})


def write_and_score(
    folders: Mapping[str, Path],  # checkpoints by name, `final` and perhaps `dense`
    exports: Mapping[str, Path],  # where the export of each is written
    export: Export,
    calibration: Calibration,
    settings: Evaluate,
    chat: Chat,
    seed: int,
) -> tuple[dict[str, Any], dict[str, list[Item]]]:
    """Write the export of each checkpoint and score it as `export` says; also returns the items of each.

    Returns `models` (by name: bytes of weights, and tasks as in scores.json), their `speed`, and `notes` for the user
    on the final model's export.
    """
    from ptl.evaluation.evaluate import score_tasks

    work = module_of(export.format)
    models, items = {}, {}
    notes: list[str] = []
    # Before hours of work on the first of them
    for src in folders.values():
        work.check(src, export.type)
    scored = limited(settings, export.limit)
    for name, src in folders.items():
        exports[name].mkdir(parents=True, exist_ok=True)
        notes = work.write(src, exports[name], export.type, calibration, chat, seed)
        tasks, items[name] = score_tasks(
            work.language_model(exports[name], src, scored, chat, seed), scored, seed
        )
        models[name] = {
            "bytes": sum(
                path.stat().st_size for path in exports[name].iterdir() if path.suffix in WEIGHTS
            ),
            "tasks": [asdict(task) for task in tasks],
        }
    speed = work.speed(folders, exports, settings, seed)
    # The notes of the last one, the final model
    return {
        "models": models,
        "speed": speed,
        "notes": [*notes, *context_notes(folders["final"])],
    }, items


def inference_service(name: str, uri: str, format: ServedFormat, gpus: int = 1) -> str:
    """The YAML of an InferenceService for a checkpoint on S3; a comment on top says what to adapt.

    `uri` is the folder, for gguf the file. KServe's Hugging Face runtime (vLLM) serves folders, llama-server a GGUF
    file. KServe wants a letter first in the name, and adds `-predictor`: it may have 53 characters.
    """
    from jinja2 import Environment

    what, path = (
        f"a checkpoint ({format}) by vLLM in KServe's Hugging Face runtime",
        "/openai/v1/chat/completions",
    )
    if format == "gguf":
        what, path = "a GGUF file by llama-server", "/v1/chat/completions"
    template = Environment(trim_blocks=True, keep_trailing_newline=True).from_string(
        TEMPLATE.read_text()
    )
    file = uri.rpartition("/")[2]
    return template.render(
        name=name, uri=uri, format=format, gpus=gpus, what=what, path=path, file=file
    )
