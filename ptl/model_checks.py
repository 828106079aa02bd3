"""Whether a model can do what the config asks of it: tokenizer, positions, teacher. No weights are read.

`ptl validate` runs without transformers and takes less than a second: it looks at files. The steps ask transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ptl import bounded_json, checkpoint, hub, pretrained
from ptl.config import Calibration, DataSource, Distil, Evaluate, Grpo, NextToken, RecoverStage, TrainingData
from ptl.errors import InputError

JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json")
GENERATION = "generation_config.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
NO_EOS = "the tokenizer has no EOS token, so no answer could end; set eos_token and save it"


def load_tokenizer(folder: Path, field: str = pretrained.MODEL) -> Any:
    """The tokenizer of a checkpoint. Raises InputError where it cannot be read or has no EOS token."""
    try:
        tokenizer = pretrained.tokenizer(folder, field)
    except (InputError, ModuleNotFoundError):  # the latter: without transformers
        raise
    except Exception as error:  # transformers and tokenizers raise a dozen kinds; each means that it cannot be read
        raise _unreadable(folder, error) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{field}: {folder}: {NO_EOS}")
    return tokenizer


def check_settings(
    folder: Path,
    calibration: Calibration,
    training: TrainingData,
    evaluate: Evaluate,
    recover: Sequence[RecoverStage],
) -> None:
    """Raise InputError for what the model in `folder` cannot do of all that the config asks of it."""
    check_tokenizer(folder)
    check_generation_config(folder)
    check_positions(folder, {"calibration.max_length": calibration.max_length})
    if evaluate.max_length is not None:
        check_positions(folder, {"evaluate.max_length": evaluate.max_length})
    _check_each(folder, recover, None)
    sources: dict[str, DataSource] = {"calibration.data": calibration.data}
    sources |= {f"training.sources.{i}": source for i, source in enumerate(training.sources)}
    check_chat_template(folder, sources)


def check_tokenizer(folder: Path) -> None:
    """Raise InputError for a tokenizer that is not there, cannot be read or has no EOS token, as far as files say."""
    checkpoint.check_tokenizer(folder)
    files = _json_files(folder)
    core = folder / "tokenizer.json"
    if core.is_file() and find_spec("tokenizers") is not None:
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_file(str(core))
        except Exception as error:  # the library raises Exception itself
            raise _unreadable(folder, error) from error
    named = [files[name].get("eos_token") for name in ("tokenizer_config.json", "special_tokens_map.json")]
    # a few classes of transformers have an EOS token of their own
    if not any(named) and find_spec("transformers") is not None:
        load_tokenizer(folder)


def check_generation_config(folder: Path) -> None:
    """Raise InputError for a generation_config.json that is no JSON object: transformers reads it with the weights."""
    path = folder / GENERATION
    if path.is_file():
        checkpoint.json_object(path)


def check_positions(folder: Path, lengths: Mapping[str, int]) -> None:
    """Raise InputError for a config field whose sequences are longer than the model's context."""
    positions = checkpoint.read_config(folder).get("max_position_embeddings")
    for field, length in lengths.items():
        if isinstance(positions, int) and length > positions:
            raise InputError(
                f"{field}: {length} is more than the model's {positions} positions ({folder}); lower it to {positions}"
            )


def check_stages(folder: Path, stages: Sequence[RecoverStage], teacher: Path | None) -> None:
    """Raise InputError for a recovery that the model in `folder`, or a teacher that is known, cannot do.

    `teacher` is the run's original model; None: not known yet, or the model itself.
    """
    check_tokenizer(folder)
    _check_each(folder, stages, teacher)


def _check_each(folder: Path, stages: Sequence[RecoverStage], teacher: Path | None) -> None:
    for stage in stages:
        if isinstance(stage, NextToken):
            check_positions(folder, {"recover.max_length": stage.max_length})
        if isinstance(stage, Grpo):
            check_positions(folder, {"recover.max_completion_length": stage.max_completion_length})
        if isinstance(stage, Distil) and (stage.teacher or teacher):
            other = _teacher_files(stage.teacher) if stage.teacher else teacher
            assert other is not None
            check_positions(other, {"recover.max_length (for recover.teacher)": stage.max_length})
            check_teacher(folder, other, stage.teacher or str(other))


def check_teacher(folder: Path, teacher: Path, named: str) -> None:
    """Raise InputError for a teacher with another vocabulary, where both store it in tokenizer.json."""
    mine, theirs = _vocabulary(folder), _vocabulary(teacher)
    if mine and theirs:
        compare_vocabularies(mine, theirs, named)


def compare_vocabularies(mine: Mapping[str, int], theirs: Mapping[str, int], named: str) -> None:
    """Raise InputError where a token has not the same number for student and teacher."""
    if mine != theirs:
        differ = len(set(mine.items()) ^ set(theirs.items()))
        raise InputError(
            f"recover.teacher: {named} has another vocabulary ({len(theirs)} tokens, the student {len(mine)}; {differ} "
            "entries differ); distillation needs a teacher with the same tokenizer"
        )


def check_chat_template(folder: Path, sources: Mapping[str, DataSource]) -> None:
    """Raise InputError for chats without a template that renders them."""
    stored = _json_files(folder)["tokenizer_config.json"].get("chat_template")
    if stored or any((folder / name).is_file() for name in TEMPLATES):
        return
    for field, source in sources.items():
        if source.format == "messages":
            raise InputError(
                f"{field}.format: `messages` needs a chat template, and the tokenizer of {folder} has none; use "
                "another format, or a model with a template"
            )


def _json_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The tokenizer's JSON files by name; empty: not there."""
    found: dict[str, dict[str, Any]] = {}
    for name in JSON_FILES:
        path = folder / name
        try:
            found[name] = bounded_json.loads(path.read_bytes()) if path.is_file() else {}
        except ValueError as error:
            raise _unreadable(folder, f"{name}: {error}") from error
        if not isinstance(found[name], dict):
            raise _unreadable(folder, f"{name} holds no JSON object")
    return found


def _vocabulary(folder: Path) -> dict[str, int]:
    """Tokens and their numbers, from tokenizer.json; empty without one."""
    core = _json_files(folder)["tokenizer.json"]
    if not core:
        return {}
    try:
        vocabulary = core["model"].get("vocab", {})
        numbered = vocabulary if isinstance(vocabulary, dict) else {row[0]: i for i, row in enumerate(vocabulary)}
        return numbered | {token["content"]: token["id"] for token in core.get("added_tokens") or ()}
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise _unreadable(folder, f"tokenizer.json: {type(error).__name__}: {error}") from error


def _teacher_files(teacher: str) -> Path:
    """The folder of a teacher's config and tokenizer; of a hub id these alone are downloaded."""
    folder = hub.locate(teacher, None, hub.SMALL_FILES, field="recover.teacher")
    if not (folder / "config.json").is_file():
        raise InputError(f"recover.teacher: no config.json in {folder}; give the folder of a checkpoint, or a hub id")
    return folder


def _unreadable(folder: Path, why: object) -> InputError:
    return InputError(
        f"model.path: the tokenizer of {folder} cannot be read ({str(why)[:300]}); fetch the checkpoint again, or save "
        "a tokenizer beside the weights: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
    )
