"""The forms of a checkpoint for other runtimes, behind one interface. FORMATS is where another runtime is added."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptl.config.export import Export
from ptl.config.run import Calibration, Evaluate
from ptl.errors import InputError
from ptl.extras import Check
from ptl.model import pretrained, text_tower
from ptl.units import listed

ALTERNATING_IN_VLLM = ("gpt_oss",)  # model types; vLLM 0.32 does not read their layer_types
REMOVE_LAYERS = ("layers", "neurons_then_layers", "auto")  # values of prune.target
Folders = Mapping[str, Path]  # of the dense and the final model, by name


@dataclass(frozen=True)
class Format:
    """What can be done with a form of a checkpoint."""

    # (checkpoint, type): raises InputError for what cannot be made, before anything expensive
    check: Callable[[Path, str], object]
    # (): raises UnusableError where what writes the form is not installed on this machine, or does not load
    check_installed: Callable[[], object]
    # (checkpoint, empty folder to fill, type, calibration, seed) -> notes for the user
    write: Callable[[Path, Path, str, Calibration, int], list[str]]
    # (folder, its checkpoint, settings, seed): a model of the harness, as language_models.language_model gives it
    language_model: Callable[[Path, Path, Evaluate, int], Any]
    # (checkpoints, their forms, settings, seed): rows of speed.measure_speed by name, `models`, for each checkpoint at
    # 16 bits and its form, `<name>_export`, and the `setting`; or the `reason` why it was not measured
    speed: Callable[[Folders, Folders, Evaluate, int], dict[str, Any]]


def check_exports(src: Path, forms: Iterable[Export]) -> None:
    """Raise InputError for the first form that cannot be made of a checkpoint, without writing any."""
    for form in forms:
        FORMATS[form.format].check(src, form.type)


def width_warnings(src: Path, forms: Iterable[Export], width: int) -> list[str]:
    """A warning of each form that could not be made of the checkpoint once it is pruned to this FFN width."""
    from ptl.export.compressed_tensors import check_compressed

    warnings = []
    # llama.cpp stores rows of other lengths in a larger type.
    for form in forms:
        if form.format == "compressed-tensors":
            try:
                check_compressed(src, form.type, width)
            except InputError as error:
                warnings.append(f"the step of {form.name} will fail if the loop ends as planned: {error}")
    return warnings


def check_tokenizer(src: Path, forms: Iterable[Export]) -> list[str]:
    """Raise InputError where GGUF is asked for and llama.cpp gives other tokens than the checkpoint's tokenizer.

    Returns warnings of rare texts for which it does. Takes seconds.
    """
    if all(form.format != "gguf" for form in forms):
        return []
    from ptl.export import gguf

    _, notes = gguf.check_tokenizer(src)
    return notes


def layer_warnings(src: Path, forms: Iterable[Export], target: str) -> list[str]:
    """Warnings of what runtimes may not have once layers are removed, as `prune.target` may do.

    Of `src` only config.json is read.
    """
    if target not in REMOVE_LAYERS:
        return []
    from ptl.export import llama_cpp

    config = text_tower.read_config(src)
    model_type = config["model_type"]
    layers = pretrained.config_with_defaults(config).num_hidden_layers
    names = [form.name for form in forms if form.format == "gguf"]
    rules = llama_cpp.layer_rules(model_type, layers)
    warnings = []
    if names and rules:
        warnings.append(
            f"prune.target={target} may remove layers, and llama.cpp's code for {model_type} has {listed(rules)}: "
            f"where this does not hold for the layers that are left, {listed(names)} cannot be made, which is known "
            "only after the loop: set prune.target=neurons, or export to compressed-tensors"
        )
    if model_type in ALTERNATING_IN_VLLM:
        warnings.append(
            f"prune.target={target} may remove layers, and vLLM gives every other layer of {model_type} a window, "
            "whatever its config says: it would compute another model, without an error: set prune.target=experts, or "
            "serve with transformers"
        )
    return warnings


def check_here(forms: Iterable[Export], src: Path | None) -> None:
    """Raise InputError for the first form that cannot be made on this machine, or of the checkpoint if there is one."""
    forms = list(forms)
    for check in installation_checks(forms):
        check()
    if src is not None:
        check_exports(src, forms)
        check_tokenizer(src, forms)


def installation_checks(forms: Iterable[Export]) -> list[Check]:
    """For each format a check that raises UnusableError where it cannot be made on this machine."""
    formats = dict.fromkeys(form.format for form in forms)  # each once, in order
    return [FORMATS[format].check_installed for format in formats]


def gguf_name(type: str) -> str:
    """The file that an export to GGUF has."""
    return f"model-{type}.gguf"


def _write_gguf(src: Path, dst: Path, type: str, _calibration: Calibration, _seed: int) -> list[str]:
    from ptl.export.gguf import write_gguf

    return write_gguf(src, dst / gguf_name(type), type)


def _gguf_file(folder: Path) -> Path:
    return next(folder.glob("*.gguf"))


def _gguf_model(folder: Path, src: Path, settings: Evaluate, _seed: int) -> Any:
    from ptl.evaluation.gguf import gguf_language_model

    return gguf_language_model(_gguf_file(folder), src, settings)


def _gguf_speed(checkpoints: Folders, made: Folders, settings: Evaluate, seed: int) -> dict[str, Any]:
    """In llama.cpp, each form beside its checkpoint at 16 bits."""
    from ptl.evaluation.gguf import gguf_speed
    from ptl.export.gguf import write_gguf

    if not settings.speed.repeats:
        return {"reason": "evaluate.speed.repeats is 0"}
    with tempfile.TemporaryDirectory(dir=made["final"].parent) as scratch:
        files = {}
        for name, src in checkpoints.items():
            files[name] = Path(scratch, f"{name}.gguf")
            write_gguf(src, files[name])
            files[f"{name}_export"] = _gguf_file(made[name])
        models = gguf_speed(files, settings.speed, seed)
    # The table has the first row of each model.
    batch = settings.speed.batch_sizes[0]
    at_once = "one answer at a time" if batch == 1 else f"{batch} answers at once"
    setting = (
        f"Tokens per second: llama.cpp, {at_once}, median of {settings.speed.repeats}; dense and final at 16 bits."
    )
    return {"models": models, "setting": setting}


def _check_gguf(src: Path, _type: str) -> None:
    from ptl.export.gguf import check_computed_alike

    check_computed_alike(src)


def _check_gguf_installed() -> None:
    from ptl.export.gguf import check_installed

    check_installed()


def _check_compressed(src: Path, type: str) -> None:
    from ptl.export.compressed_tensors import check_compressed

    check_compressed(src, type)


def _check_compressed_installed() -> None:
    from ptl.evaluation import quantized
    from ptl.export.compressed_tensors import interpreter

    interpreter()
    quantized.check_installed()


def _write_compressed(src: Path, dst: Path, type: str, calibration: Calibration, seed: int) -> list[str]:
    from ptl.export.compressed_tensors import write_calibrated

    return write_calibrated(src, dst, type, calibration, seed)


def _compressed_model(folder: Path, _src: Path, settings: Evaluate, seed: int) -> Any:
    from ptl.evaluation.quantized import quantized_model

    return quantized_model(folder, settings, seed)


def _compressed_speed(*_: Any) -> dict[str, Any]:
    return {"reason": "transformers unpacks the weights, so that its speed says nothing of vLLM's"}


FORMATS = {
    "gguf": Format(_check_gguf, _check_gguf_installed, _write_gguf, _gguf_model, _gguf_speed),
    "compressed-tensors": Format(
        _check_compressed,
        _check_compressed_installed,
        _write_compressed,
        _compressed_model,
        _compressed_speed,
    ),
}
