"""The base of every part of the config."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the config: unknown fields are errors, values do not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
