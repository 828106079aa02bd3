"""A model's own answers to the prompts of the training data, verified: what recoveries train on.

Self-data distillation (2410.09982) recovers pruned models on such answers; RESP (2512.02185) scores reasoning models on
them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ptl.config.chat import Chat
from ptl.config.dag import ANSWERS
from ptl.config.data import DataSource, Reward, TrainingData
from ptl.config.run import Evaluate
from ptl.data.chat_templates import by_template
from ptl.data.sequences import leaves_room, prompt_rows
from ptl.data.sources import TRUNCATED, SourceRow, answer_of, prompt_of
from ptl.errors import WorkError
from ptl.evaluation import generation, language_models
from ptl.log import say
from ptl.recovery.rewards import REWARDS

FILE = "answers.jsonl"


@dataclass(frozen=True)
class AnswersReport:
    """What was written, and how much of it is of use."""

    prompts: int
    written: int  # answers
    ended: int  # not truncated by the token limit
    kept: int  # of these: all, or those that are correct
    answer_tokens: float  # mean over what was written
    sampling: dict[str, Any]  # none: greedy


@dataclass(frozen=True)
class Answer:
    """One answer, with its thought."""

    row: SourceRow
    prompt: Any  # a text, or the turns of a chat
    text: str  # with a thought that the prompt has begun
    conclusion: str  # what follows the thought
    truncated: bool  # by the token limit
    ended: bool  # not truncated, and no thought without an end


def write_answers(
    src: Path,
    dst: Path,
    data: TrainingData,
    evaluate: Evaluate,
    chat: Chat,
    *,
    model: str,
    seed: int,
) -> AnswersReport:
    """Let the checkpoint in `src` answer prompts of `data`; write those to keep to dst/answers.jsonl.

    A line has prompt and completion, or in a chat `messages`; whether the limit truncated the answer, source and row of
    the prompt, number of the sample, seed, sampling, and `model`, the checkpoint's digest. Of `evaluate` the backend,
    batches and the context matter. Raises WorkError where nothing is left to train on.
    """
    lm = language_models.language_model(src, evaluate, chat, seed, thoughts=True)
    sampling = dict(lm.sampling) or (generation.PLAIN_SAMPLING if data.samples > 1 else {})
    num_ended = num_kept = num_tokens = 0
    dst.mkdir(parents=True, exist_ok=True)
    try:
        prompts = dict(_prompts(lm, data, chat, seed))
        with (dst / FILE).open("w", encoding="utf-8") as file:
            for sample in range(data.samples):
                own_seed = generation.seed_of_sample(seed, data.samples, sample)
                answers = list(_answers(lm, prompts, data.max_new_tokens, sampling, own_seed))
                ended = [answer for answer in answers if answer.ended]
                num_ended += len(ended)
                num_tokens += sum(note.tokens for note in lm.notes.values())
                kept = answers if data.keep == "all" else ended
                if data.keep == "correct":
                    kept = _correct(ended, data.reward)
                for answer in kept:
                    settings = {
                        "sample": sample,
                        "seed": seed,
                        "sampling": sampling,
                        "model": model,
                    }
                    file.write(json.dumps(_line(answer) | settings, ensure_ascii=False) + "\n")
                num_kept += len(kept)
                say(
                    ANSWERS,
                    f"sample {sample + 1} of {data.samples}: {len(kept):,} answers kept of {len(prompts):,}",
                )
    finally:
        lm.close()
    written = len(prompts) * data.samples
    if not num_kept:
        problem, remedy = f"none of {written:,} answers ended", "raise training.max_new_tokens"
        if num_ended:
            problem = f"of {written:,} answers {num_ended:,} ended, and none of them is correct"
            remedy = "correct training.reward, or set training.keep=ended"
        raise WorkError(problem, field="training.answers", remedy=remedy)
    cut = 1 - num_ended / written
    if data.keep != "all" and cut > generation.MANY_TRUNCATED:  # said before anything is pruned
        say(
            ANSWERS,
            f"warning: {cut:.0%} of the answers hit the limit of {data.max_new_tokens} tokens and are left out: what "
            "is trained on is short or easy; raise training.max_new_tokens and start again",
        )
    return AnswersReport(len(prompts), written, num_ended, num_kept, num_tokens / written, sampling)


def in_place_of(sources: Sequence[DataSource], folder: Path, chat: Chat) -> tuple[DataSource, ...]:
    """Sources with the answers in a folder in the place of those that have prompts; texts without prompts stay."""
    texts = [source for source in sources if source.format == "text"]
    weight = sum(source.weight for source in sources) - sum(source.weight for source in texts)
    format = "messages" if chat.enabled else "prompt_completion"
    return (DataSource(source=str(folder / FILE), format=format, weight=weight), *texts)


def _prompts(
    lm: Any, data: TrainingData, chat: Chat, seed: int
) -> Iterator[tuple[str, tuple[SourceRow, Any]]]:
    """As the model reads it, each prompt with its row: so many of each source as its weight says.

    Of a prompt that leaves too little room for an answer the harness would cut off the beginning.
    """
    total = sum(source.weight for source in data.prompted)
    fits = partial(
        leaves_room, tokenizer=lm.tokenizer, chat=chat, room=lm.max_length - data.max_new_tokens
    )
    for source in data.prompted:
        count = max(1, round(data.num_prompts * source.weight / total))
        for row in prompt_rows(source.prompts_only, seed=seed, skip=0, count=count, fits=fits):
            # a row without what it is compared with is found before hours of answers
            if data.keep == "correct":
                answer_of(data.reward.reference_template, row)
            prompt = text = prompt_of(row, chat)
            # by the harness a turn that the template refuses would be left out
            if not isinstance(prompt, str):
                text = by_template(lm.tokenizer, prompt, row, chat, tokenize=False)
            yield text, (row, prompt)


def _answers(
    lm: Any,
    prompts: dict[str, tuple[SourceRow, Any]],
    limit: int,  # tokens of an answer
    sampling: dict[str, Any],
    seed: int,
) -> Iterator[Answer]:
    """An answer to each prompt."""
    from lm_eval.api.instance import Instance

    lm.seed = seed
    options = {"until": [], "max_gen_toks": limit, "do_sample": bool(sampling), **sampling}
    requests = [
        Instance("generate_until", {}, (text, options), number)
        for number, text in enumerate(prompts)
    ]
    lm.start_notes()
    for (text, (row, prompt)), written in zip(
        prompts.items(), lm.generate_until(requests), strict=True
    ):
        yield _answer(
            row, prompt, lm.begun_thought(text), written, lm.notes[text].truncated, lm.chat
        )


def _answer(
    row: SourceRow, prompt: Any, begun: str, written: str, truncated: bool, chat: Chat
) -> Answer:
    """What the model has written after a prompt that has `begun` a thought."""
    if not chat.enabled:
        return Answer(row, prompt, written, written, truncated, not truncated)
    whole = begun + written
    text = whole if chat.is_thinking(begun) else written
    return Answer(
        row, prompt, text, chat.answer(whole), truncated, not (truncated or chat.is_thinking(whole))
    )


def _correct(answers: Sequence[Answer], reward: Reward) -> list[Answer]:
    """Of answers that have ended, those that the reward function finds correct by what follows the thought."""
    references = [answer_of(reward.reference_template, answer.row) for answer in answers]
    conclusions = [answer.conclusion for answer in answers]
    values = REWARDS[reward.name](conclusions, references, reward)
    return [answer for answer, value in zip(answers, values, strict=True) if value == 1.0]


def _line(answer: Answer) -> dict[str, Any]:
    source = {
        TRUNCATED: answer.truncated,
        "source": answer.row.source.source,
        "row": answer.row.number,
    }
    if isinstance(answer.prompt, str):
        return {"prompt": answer.prompt, "completion": answer.text, **source}
    return {"messages": [*answer.prompt, {"role": "assistant", "content": answer.text}], **source}
