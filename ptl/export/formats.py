"""Exports of a checkpoint for other runtimes, behind one record. FORMATS is where another format is added."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptl.config.export import Export
from ptl.config.run import Calibration, Evaluate
from ptl.errors import InputError
from ptl.evaluation.paired import Item
from ptl.extras import Check
from ptl.model import pretrained, text_tower
from ptl.model.config_fields import longrope_limit
from ptl.model.families import ConfigJson

REMOVE_LAYERS = ("layers", "neurons_then_layers")  # values of prune.target
WEIGHTS = (".safetensors", ".gguf")  # files that count as a model's size, as in its evaluation
Folders = Mapping[str, Path]  # of the dense and the final model, by name


@dataclass(frozen=True)
class Format:
    """What can be done with exports of one format."""

    # (checkpoint, type): notes for the user; raises InputError for what cannot be made, before anything expensive
    check: Callable[[Path, str], list[str]]
    # (): raises UnusableError where what writes the format is not installed on this machine, or does not load
    check_installed: Callable[[], object]
    # (checkpoint, empty folder to fill, type, calibration, seed) -> notes for the user
    write: Callable[[Path, Path, str, Calibration, int], list[str]]
    # (folder, its checkpoint, settings, seed): a model of the harness, as language_models.language_model gives it
    language_model: Callable[[Path, Path, Evaluate, int], Any]
    # (checkpoints, their exports, settings, seed): rows of speed.measure_speed by name, `models`, for each checkpoint
    # at 16 bits and its export, `<name>_export`, and the `setting`; or the `reason` why it was not measured
    speed: Callable[[Folders, Folders, Evaluate, int], dict[str, Any]]


def _gguf() -> Format:
    from ptl.export import gguf

    return Format(gguf.check, gguf.check_installed, gguf.write, gguf.language_model, gguf.speed)


def _compressed_tensors() -> Format:
    from ptl.export import compressed_tensors as work

    return Format(work.check, work.check_installed, work.write_compressed, work.language_model, work.speed)


FORMATS: dict[str, Callable[[], Format]] = {"gguf": _gguf, "compressed-tensors": _compressed_tensors}


def check_exports(src: Path, exports: Iterable[Export]) -> list[str]:
    """Raise InputError for the first export that cannot be made of a checkpoint, without writing any; else notes.

    UnusableError where a format cannot be made on this machine. Takes about ten seconds for GGUF.
    """
    by_format = {export.format: export for export in exports if export.format == "gguf"}  # no type makes a difference
    others = [export for export in exports if export.format not in by_format]
    checks = [FORMATS[export.format]().check(src, export.type) for export in (*others, *by_format.values())]
    return [note for notes in checks for note in notes]


def installation_checks(exports: Iterable[Export]) -> list[Check]:
    """For each format a check that raises UnusableError where it cannot be made on this machine."""
    return [FORMATS[format]().check_installed for format in dict.fromkeys(export.format for export in exports)]


def width_warnings(src: Path, exports: Iterable[Export], width: int) -> list[str]:
    """A warning of each export that could not be made of the checkpoint once it is pruned to this FFN width."""
    from ptl.export import compressed_tensors

    warnings = []
    for export in exports:
        if export.format == "compressed-tensors":  # llama.cpp stores rows of other lengths in a larger type
            try:
                compressed_tensors.group_size(src, export.type, width)
            except InputError as error:
                warnings.append(f"the step of {export.name} will fail if the loop ends as planned: {error}")
    return warnings


def layer_warnings(src: Path, exports: Iterable[Export], target: str) -> list[str]:
    """Warnings of runtimes that know a layer's attention by its number, if layers may be removed (`prune.target`).

    Of `src` only config.json is read.
    """
    if target not in REMOVE_LAYERS:
        return []
    content = text_tower.read_config(src)
    model_type = content["model_type"]
    warnings = []
    if any(export.format == "gguf" for export in exports) and _have_different_attention(content):
        warnings.append(
            f"prune.target={target} may remove layers, and llama.cpp may know the attention of a layer of {model_type} "
            "by its number: whether GGUF can be made of the layers that are left is known only after the loop. "
            "Rehearse the run (--rehearse), set prune.target=neurons, or export to compressed-tensors"
        )
    if model_type == "gpt_oss":
        warnings.append(
            f"prune.target={target} may remove layers, and vLLM gives every other layer of gpt_oss a window, whatever "
            "its config says: it would compute another model, without an error: set prune.target=experts, or serve "
            "with transformers"
        )
    return warnings


def _have_different_attention(content: ConfigJson) -> bool:
    """Whether a model's layers differ in their windows or rotary embeddings; false where transformers is absent."""
    if not pretrained.can_build():
        return False
    config = pretrained.config_with_defaults(content)
    kinds = set(getattr(config, "layer_types", None) or ())
    return len(kinds) > 1 or bool(getattr(config, "no_rope_layers", None))


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


@dataclass(frozen=True)
class ExportReport:
    """What was measured of an export."""

    models: dict[str, dict[str, Any]]  # by name, dense and final: bytes of weights, and tasks as in scores.json
    speed: dict[str, Any]  # of Format.speed; {"reason": ...} where it was not measured
    notes: list[str]  # for the user, on the final model's export


def limited(settings: Evaluate, limit: int | None) -> Evaluate:
    """The evaluation of no more than `limit` items of each benchmark, the first of those that the run scores."""
    if limit is None:
        return settings
    tasks = tuple(task.model_copy(update={"limit": min(task.limit or limit, limit)}) for task in settings.tasks)
    return settings.model_copy(update={"tasks": tasks})


def write_and_score(
    folders: Folders,  # checkpoints by name, `final` and perhaps `dense`
    exports: Folders,  # where the export of each is written
    export: Export,
    calibration: Calibration,
    settings: Evaluate,
    seed: int,
) -> tuple[ExportReport, dict[str, list[Item]]]:
    """Write the export of each checkpoint and score it as `export` says; also returns the items of each."""
    from ptl.evaluation.evaluate import score_tasks

    work = FORMATS[export.format]()
    models, items = {}, {}
    notes: list[str] = []
    # Before hours of work on the first of them
    for src in folders.values():
        work.check(src, export.type)
    scored = limited(settings, export.limit)
    for name, src in folders.items():
        exports[name].mkdir(parents=True, exist_ok=True)
        notes = work.write(src, exports[name], export.type, calibration, seed)
        tasks, items[name] = score_tasks(work.language_model(exports[name], src, scored, seed), scored, seed)
        models[name] = {
            "bytes": sum(path.stat().st_size for path in exports[name].iterdir() if path.suffix in WEIGHTS),
            "tasks": [asdict(task) for task in tasks],
        }
    speed = work.speed(folders, exports, settings, seed)
    # The notes of the last one, the final model
    return ExportReport(models, speed, [*notes, *context_notes(folders["final"])]), items
