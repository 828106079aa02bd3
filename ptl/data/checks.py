"""Checks before anything is scored or trained: of local data files, and of what the model can do with the config.

Also of how much a recovery trains: tokens for each removed parameter, and passes over the rows. The paper has 0.1
tokens for each parameter that it removes: 160M for 1.57B of 8B. SmolLM2-135M with 0.0024 to 0.0035 more than doubled
the perplexity of other text (docs/results.md, "A pretrained model with few tokens").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptl.config.chat import Chat
from ptl.config.data import DataSource, Reward, TrainingData, columns_of
from ptl.config.recover import RecoverStage
from ptl.config.run import Calibration, Config, Evaluate
from ptl.data import chat_templates
from ptl.data.sequences import check_chat, no_row_left, tokenize
from ptl.data.sources import (
    GENERAL,
    TRUNCATED,
    answer_of,
    check_rows,
    local_file,
    numbered_rows,
    prompt_of,
    texts,
)
from ptl.errors import InputError
from ptl.model import checkpoint, hub, pretrained, shapes
from ptl.units import listed

TEACHER = "recover.teacher"
PER_PARAMETER = 0.1  # tokens for each removed parameter: the paper's
LEAST = PER_PARAMETER / 10  # below which is warned
# over the rows, after which repetition helps little (Muennighoff et al. 2023, 2305.16264)
PASSES = 4
CHARACTERS = 4  # of a token, roughly
SAMPLE = 200  # rows whose length is measured


def check_data(
    calibration: Calibration,
    training: TrainingData,
    recover: Sequence[RecoverStage],
    *,
    hub_rows: bool = False,
) -> None:
    """Read data once, that of the hub only with `hub_rows`: it must exist, parse, and have what the templates name.

    Chats must end with an answer where it is scored or trained on; reinforcement learning needs the prompts alone.
    """
    for field, source, answers in _read(calibration, training, recover):
        check_rows(source, answers=answers, field=field, hub_rows=hub_rows)


def _read(
    calibration: Calibration, training: TrainingData, recover: Sequence[RecoverStage]
) -> Iterator[tuple[str, DataSource, bool]]:
    """Each source once, with its field, and whether its answers are read: the calibration data is often trained on."""
    seen = set()
    for field, source in named_sources(calibration, training, recover).items():
        is_scored, is_trained_on = (
            field.startswith("calibration.data"),
            field.startswith("training.sources"),
        )
        # The dense model writes them.
        own = (is_scored and calibration.answers == "self") or (
            is_trained_on and training.answers == "self"
        )
        answers = not own and (
            is_scored or (is_trained_on and any(stage.method != "grpo" for stage in recover))
        )
        its = source.prompts_only if own or field.endswith("prompts") else source
        if (its, answers) not in seen:
            seen.add((its, answers))
            yield field, its, answers


def named_sources(
    calibration: Calibration, training: TrainingData, recover: Sequence[RecoverStage]
) -> dict[str, DataSource]:
    """All sources that a config names, by their fields."""
    field = "calibration.data.{}" if len(calibration.data) > 1 else "calibration.data"
    sources = {field.format(i): source for i, source in enumerate(calibration.data)}
    sources |= {f"training.sources.{i}": source for i, source in enumerate(training.sources)}
    sources |= {
        f"training.decontaminate.against.{i}": s
        for i, s in enumerate(training.decontaminate.against)
    }
    stages = enumerate(recover)
    return sources | {f"recover.{i}.prompts": s.prompts for i, s in stages if s.prompts}


def column_warnings(
    calibration: Calibration, training: TrainingData, recover: Sequence[RecoverStage]
) -> Iterator[str]:
    """Columns with text in the first rows of files that no template names: an `input` is easily forgotten."""
    stages = [stage for stage in recover if stage.method == "grpo"]
    rewards = [training.reward, *(reward for stage in stages for reward in stage.rewards)]
    references = [reward.reference_template for reward in rewards]
    seen = set()
    for field, source in named_sources(calibration, training, recover).items():
        if (
            source in seen
            or source.source == GENERAL
            or "against" in field
            or local_file(source, field) is None
        ):
            continue
        seen.add(source)
        rows = [row.columns for row in itertools.islice(numbered_rows(source, field), SAMPLE)]
        if sentence := unused_columns(source, rows, field, references):
            yield sentence


def unused_columns(
    source: DataSource,
    rows: Sequence[Mapping[str, Any]],
    field: str,
    references: Sequence[str] = (),
) -> str:
    """A sentence about columns of rows that hold something and are in no template; empty where there are none."""
    templates = {
        "text": [source.text],
        "prompt_completion": [source.prompt, source.completion],
        "messages": [],
    }[source.format]
    names = [name for template in (*templates, *references) for name in columns_of(template)]
    used = {name.partition("[")[0] for name in names}
    used.add(TRUNCATED)
    if source.format == "messages":
        used.add(source.messages)
    # In the order of the file.
    filled = dict.fromkeys(
        name for row in rows for name, value in row.items() if value not in (None, "", [], {})
    )
    unused = [name for name in filled if name not in used]
    if not unused:
        return ""
    remedy = "name what the model needs in a template, as {column}"
    if source.format == "messages":
        remedy = "write what the model needs into the turns"
    return f"{field}: no template reads {listed(unused)} of {Path(source.source).name}: {remedy}"


def check_own_answers(training: TrainingData) -> None:
    """Check that local prompts which the dense model is to answer have what the answers are verified by."""
    if training.answers == "self" and training.keep == "correct":
        for source in training.prompted:
            _check_prompts(source.prompts_only, [training.reward], "training.sources")


def check_rewards(stages: Sequence[RecoverStage], training: TrainingData) -> None:
    """Check local prompts of reinforcement learning, and that they have what the rewards compare with."""
    for i, stage in enumerate(stages):
        if stage.method == "grpo":
            field = f"recover.{i}.prompts" if stage.prompts else "training.sources.0"
            _check_prompts(stage.prompt_source(training), stage.rewards, field)


def _check_prompts(source: DataSource, rewards: Sequence[Reward], field: str) -> None:
    """Read the rows of a local file; data on the hub is read by the step that needs it."""
    if local_file(source, field) is None:
        return
    for row in numbered_rows(source, field):
        prompt_of(row)
        for reward in rewards:
            answer_of(reward.reference_template, row)


def check_settings(
    folder: Path,
    calibration: Calibration,
    training: TrainingData,
    evaluate: Evaluate,
    recover: Sequence[RecoverStage],
    chat: Chat,
) -> None:
    """Raise InputError for what the model in `folder` cannot do of all that the config asks of it; reads no weights."""
    tokenizer = pretrained.load_tokenizer(folder)
    checkpoint.generation_config(folder)  # transformers reads it with the weights
    # What is not set follows the model.
    lengths = {"calibration.max_length": calibration.max_length}
    if evaluate.max_length is not None:
        lengths["evaluate.max_length"] = evaluate.max_length
    if training.answers == "self":
        longest = training.max_new_tokens
        lengths["training.max_new_tokens and a prompt"] = longest + 1
        if evaluate.max_length is not None and longest >= evaluate.max_length:
            raise InputError(
                f"{longest} leaves no room for a prompt in evaluate.max_length={evaluate.max_length}",
                field="training.max_new_tokens",
                remedy="lower it, or raise evaluate.max_length",
            )
    lengths |= {
        f"evaluate.tasks ({task.name}: max_new_tokens) and a prompt": task.max_new_tokens + 1
        for task in evaluate.tasks
        if task.max_new_tokens
    }
    shapes.check_positions(folder, lengths)
    check_stages(folder, recover, teacher=None)
    chat_templates.check(tokenizer, chat)
    if any(stage.method == "grpo" for stage in recover):
        chat_templates.check_thoughts(tokenizer, chat)
    for field, source, answers in _read(calibration, training, recover):
        if source.format != "messages" or "against" in field:
            continue
        if not tokenizer.chat_template:
            raise InputError(
                f"`messages` needs a chat template, and the tokenizer of {folder} has none",
                field=f"{field}.format",
                remedy="use another format, or a model with a template",
            )
        for row in numbered_rows(source, field) if local_file(source, field) else ():
            check_chat(row, tokenizer, chat, answers=answers)
    max_lengths = [stage.max_length for stage in recover if stage.method != "grpo"]
    if max_lengths and training.answers != "self":
        for i, source in enumerate(training.sources):
            if local_file(source, f"training.sources.{i}"):
                rows = numbered_rows(source, f"training.sources.{i}")
                tokenized = (tokenize(row, tokenizer, min(max_lengths), chat) for row in rows)
                if not any(tokens.is_useful for tokens in tokenized):  # up to the first one
                    raise no_row_left(source, min(max_lengths))


def check_stages(folder: Path, stages: Sequence[RecoverStage], teacher: Path | None) -> None:
    """Raise InputError for lengths and teachers that the model in `folder` cannot have, before the first stage trains.

    `teacher` is the run's original model; None: not known yet, or the model itself.
    """
    tokenizer = pretrained.load_tokenizer(folder)
    for stage in stages:
        length = "max_completion_length" if stage.method == "grpo" else "max_length"
        shapes.check_positions(folder, {f"recover.{length}": getattr(stage, length)})
        # transformers (5.24) gives its attention's masks no positions, and only these separate packed texts.
        if stage.packing and checkpoint.read_config(folder)["model_type"] == "gpt_oss":
            problem = "true, and in gpt_oss packed texts would attend to each other"
            raise InputError(problem, field="recover.packing", remedy="set it to false")
        if stage.method != "distil":
            continue
        # A teacher reads the same sequences, and numbers tokens in the same way; of a hub id only small files are read.
        own, name = teacher, stage.teacher
        if name:
            own = hub.locate(name, None, hub.SMALL_FILES, field=TEACHER)
        if own is not None:
            if not (own / "config.json").is_file():
                raise InputError(
                    f"no config.json in {own}",
                    field=TEACHER,
                    remedy="give the folder of a checkpoint, or a hub id",
                )
            # Of a run's model they are checked; of a hub id they are not here yet.
            if name and Path(name).is_dir():
                checkpoint.shards(own)
            vocabulary, of_teacher = (
                tokenizer.get_vocab(),
                pretrained.load_tokenizer(own, TEACHER).get_vocab(),
            )
            shapes.check_positions(
                own, {"recover.max_length (for recover.teacher)": stage.max_length}
            )
            # An entry is a token with its number; a token that has moved counts on both sides.
            different = vocabulary.items() ^ of_teacher.items()
            if different:
                raise InputError(
                    f"{name or own} has another vocabulary ({len(of_teacher)} tokens, the student {len(vocabulary)}; "
                    f"{len(different)} entries differ)",
                    field=TEACHER,
                    remedy="distillation needs a teacher with the same tokenizer",
                )


@dataclass(frozen=True)
class Amount:
    """The tokens of a recovery beside what was removed and what there is to read."""

    tokens: int
    removed: int  # parameters
    passes: float | None  # over the source that is read most often; None: not known

    @property
    def sentence(self) -> str:
        """Both ratios in words; empty where nothing is trained on text, or nothing was removed."""
        if not self.tokens or self.removed <= 0:
            return ""
        passes = (
            "" if self.passes is None else f", about {_digits(self.passes)} passes over the rows"
        )
        return f"{self.tokens:,} recovery tokens: {_digits(self.tokens / self.removed)} per removed parameter{passes}"

    def warnings(self, least: float = LEAST) -> list[str]:
        """A sentence for fewer than `least` tokens for each removed parameter, and for more than PASSES passes."""
        if not self.sentence:
            return []
        problems = []
        # Both are estimates: half a pass more is no problem.
        if float(f"{self.tokens / self.removed:.1g}") < least:
            problems.append(
                f"the paper has {PER_PARAMETER} per removed parameter, and a model with 0.0035 was far worse on other "
                "text (docs/results.md): lower schedule.target, or give more tokens and rows"
            )
        if self.passes is not None and round(self.passes) > PASSES:
            problems.append(
                f"more than {PASSES} passes help little: give more rows, or lower schedule.recovery_tokens"
            )
        return [f"{self.sentence}; {problem}" for problem in problems]


def planned_amount(config: Config, removed: int) -> Amount:
    """What a config gives to a removal of so many parameters; rows are those of files on this machine."""
    lengths = [stage.max_length for stage in config.recover if stage.method != "grpo"]
    if not lengths:  # reinforcement learning alone
        return Amount(0, removed, None)
    tokens, sources = config.schedule.recovery_tokens, config.training.sources
    if config.training.answers == "self":  # they are not written yet
        return Amount(tokens, removed, None)
    weights = sum(source.weight for source in sources)
    passes = []
    for i, source in enumerate(sources):
        there = tokens_of(source, max(lengths), f"training.sources.{i}")
        if there:
            passes.append(tokens * source.weight / weights / there)
    return Amount(tokens, removed, max(passes, default=None))


def tokens_of(source: DataSource, max_length: int, field: str) -> float:
    """Tokens of a file's rows, roughly, of which no more than max_length are read of each; 0 for other sources."""
    if source.source != GENERAL and not Path(source.source).is_file():
        return 0.0
    rows = numbered_rows(source, field)
    sample = [
        min(sum(map(len, texts(row))) / CHARACTERS, max_length)
        for row in itertools.islice(rows, SAMPLE)
    ]
    count = len(sample) + sum(1 for _ in rows)
    return count * sum(sample) / len(sample)


def _digits(value: float) -> str:
    """Two digits that count: 0.0042, 5.8, 10,000."""
    return f"{float(f'{value:.2g}'):,.6g}"
