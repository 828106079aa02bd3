"""The part of the config for data: where rows come from, how they become text, and what recovery trains on."""

from __future__ import annotations

import re
from string import Formatter
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    PositiveFloat,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from ptl.config.base import Location, Positive, Section

Off = Literal["off", False]  # YAML 1.1 reads off as false, YAML 1.2 as a text
# a column, and keys or indices into its value
_COLUMN = re.compile(r"(?!\d+(?:\[|$))[^.\[\]{}]+(?:\[[^\[\]]+\])*")


def columns_of(template: str) -> list[str]:
    """The columns that a template names, with keys into them. Raises ValueError for what is no such template."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"is no template ({error}); a brace of the text itself is doubled: {{{{ or }}}}"
        ) from error
    columns = []
    for _, name, spec, conversion in parts:
        if name is None:  # the text after the last column
            continue
        if spec or conversion or not _COLUMN.fullmatch(name):
            raise ValueError(
                f"names {{{name}}}, which is no column; write {{column}}, or {{column[key]}} for a part of its value"
            )
        columns.append(name)
    return columns


def _valid_template(template: str) -> str:
    columns_of(template)
    return template


Template = Annotated[str, AfterValidator(_valid_template)]  # text with {column}s of a row


class DataSource(Section):
    """Rows of text, from a local or s3:// JSONL / Parquet file or from the hub, and how a row becomes a sequence."""

    # a file, or a dataset on the hub
    source: Location
    """.jsonl, .jsonl.gz or .parquet file (local or s3://), or a hub id"""
    revision: str | None = None
    """hub commit of the dataset; pin it so that a run can be repeated"""
    subset: str | None = None
    """configuration of the dataset on the hub, for example `main` of gsm8k"""
    split: str = "train"
    """split of the dataset on the hub"""
    # how its rows are read
    format: Literal["text", "prompt_completion", "messages"] = "prompt_completion"
    """what a row is: a text, a prompt with its completion, or a chat"""
    text: Template = "{text}"
    """template over a row's columns (format `text`)"""
    prompt: Template = "{prompt}"
    """template over a row's columns (format `prompt_completion`)"""
    completion: Template = "{completion}"
    """template over a row's columns (format `prompt_completion`)"""
    messages: str = "messages"
    """column with the chat (format `messages`)"""
    # beside others
    weight: PositiveFloat = 1.0
    """its share beside other sources: of the tokens of `training`, or of the sequences of `calibration`; in a
    repair its share of the sum, however few rows it has"""

    @property
    def prompts_only(self) -> Self:
        """The same rows without a completion, which the model itself writes: they need no column for it."""
        return self.model_copy(update={"completion": ""})


def _one_or_more(raw: Any) -> Any:
    return [raw] if isinstance(raw, dict | DataSource) else raw


SourceList = Annotated[tuple[DataSource, ...], Field(min_length=1)]
# A single source needs no list.
Sources = Annotated[
    SourceList, BeforeValidator(_one_or_more, json_schema_input_type=DataSource | SourceList)
]


class Reward(Section):
    """One part of the reward."""

    # the functions are in rewards.REWARDS
    name: Literal["final_answer", "math", "code", "format"]
    """how an answer is verified: its result as text, as mathematics, by tests, or only its format"""
    weight: PositiveFloat = 1.0
    """weight of this part in the sum"""
    # what an answer is compared with, by the method that is named
    answer: Template | None = None
    """the reference as a template over a row's columns, by default `{answer}`; for `code` Python that raises if the
    answer is wrong, by default `{test}`"""
    pattern: str = r"(?s).*(####|\\boxed\{)[^#]*"
    """regular expression that the whole answer must match, for `format`"""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return pattern

    @property
    def reference_template(self) -> str:
        """What an answer is compared with, as a template over a row's columns; empty for `format`."""
        if self.name == "format":
            return ""
        return self.answer or ("{test}" if self.name == "code" else "{answer}")


class Decontaminate(Section):
    """Leave out training rows and prompts that share 13 words in a row with a benchmark's item."""

    # the run's own benchmarks need no data here: import-model has written their items
    tasks: bool = True
    """compare with the items of `evaluate.tasks`, as import-model stored them"""
    against: tuple[DataSource, ...] = ()
    """more benchmarks; only the text of their items is used"""


class TrainingData(Section):
    """What recovery trains on: `sources`. The short forms are a single source, or a list of sources."""

    sources: SourceList
    """where the rows come from, mixed by `weight`"""
    decontaminate: Decontaminate = Decontaminate()
    """which rows are left out; `off`: none"""

    # answers of the dense model in the place of the rows' own; a source of format `text` has none, and stays
    answers: Literal["given", "self"] = "given"
    """`self`: train on what the dense model answers to the rows' prompts, as it is served"""
    num_prompts: Positive = 2000
    """answers `self`: prompts that it answers, divided among the sources by weight"""
    samples: Positive = 1
    """answers `self`: answers to each prompt, sampled as its generation_config.json says"""
    max_new_tokens: Positive = 1024
    """answers `self`: tokens of the longest answer"""
    keep: Literal["correct", "ended", "all"] = "correct"
    """answers `self`: those that `reward` finds correct; `ended`: also wrong ones; `all`: also those that were cut"""
    reward: Reward = Reward(name="math")
    """answers `self`: how an answer is verified"""

    @property
    def prompted(self) -> tuple[DataSource, ...]:
        """The sources that have prompts."""
        return tuple(source for source in self.sources if source.format != "text")

    @model_validator(mode="after")
    def _own_answers_have_prompts(self) -> Self:
        if self.answers == "self" and not self.prompted:
            raise ValueError(
                "answers=self needs a source with prompts (prompt_completion or messages): give one"
            )
        if self.answers == "self" and self.keep == "correct" and self.reward.name == "format":
            raise ValueError(
                "reward.name=format verifies no answer: use final_answer, math or code, or keep=ended"
            )
        return self

    @field_validator("decontaminate", mode="before", json_schema_input_type=Decontaminate | Off)
    @classmethod
    def _off_means_no_tasks(cls, value: Any) -> Any:
        # YAML 1.1 reads off as false
        if value is False or value == "off":
            return {"tasks": False}
        return value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The schema of the section or of one of its short forms, which only the validator below knows."""
        section = handler(core)
        fields = handler.resolve_ref_schema(section)["properties"]
        source = fields["sources"]["items"]
        # beside the fields of the one source
        single = dict(handler.resolve_ref_schema(source))
        single["title"] = "SingleSource"
        others = {name: field for name, field in fields.items() if name != "sources"}
        single["properties"] = single["properties"] | others
        return {"anyOf": [section, single, {"type": "array", "items": source, "minItems": 1}]}

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, raw: Any) -> Any:
        if isinstance(raw, list | tuple):
            return {"sources": raw}
        if not isinstance(raw, dict):
            return raw
        # Its own fields may be beside those of the one source.
        if "sources" in raw:
            return raw
        own = {name: value for name, value in raw.items() if name in cls.model_fields}
        return own | {"sources": [{name: value for name, value in raw.items() if name not in own}]}
