"""How a chat model is served: its chat template, the template's variables, and where a thought ends."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator

from ptl.config.base import Section

Variable = bool | int | float | str
PROMPT_END = 16  # tokens at the end of a prompt, in which a template may begin a thought
LEADING_LINES = re.compile(r"\A\s*\n")  # empty ones


class Chat(Section):
    """Whether prompts are chats, by the tokenizer's chat template: the same in calibration, training and evaluation."""

    enabled: bool = False
    """write the prompts of rows and benchmarks as the user's turn of a chat; what follows is the model's answer"""
    template_kwargs: dict[str, Variable] = Field({})
    """variables of the chat template, for example `{enable_thinking: false}`, as the model will be served with"""
    thought: tuple[str, ...] = ("<think>", "</think>")
    """texts that begin and end a thought; only what follows it is graded, and a thought without an end is no answer"""

    @field_validator("thought")
    @classmethod
    def _has_two_ends(cls, value: Any) -> Any:
        if len(value) != 2 or not all(value):
            raise ValueError("must be two texts, such as [<think>, </think>]")
        return value

    def is_thinking(self, text: str) -> bool:
        """Whether a text ends within a thought: the prompt's end may have begun it."""
        begin, end = self.thought
        return text.rfind(begin) > text.rfind(end)

    def delimits(self, token: str) -> bool:
        """Whether a token is what begins or ends a thought, or a part of it."""
        return any(token in text for text in self.thought)

    def with_thought(self, thought: str, answer: str) -> str:
        """An answer after a thought that is given apart from it; empty: there is none."""
        begin, end = self.thought
        return f"{begin}\n{thought.strip()}\n{end}\n\n{answer}" if thought else answer

    def continued(self, prompt: str, answer: str) -> str:
        """An answer as it continues a prompt, which may have begun its thought, or ended it."""
        begin, end = self.thought
        if prompt.rstrip().endswith(end):
            return self.answer(answer)
        if not self.is_thinking(prompt):
            return answer
        return answer.removeprefix(begin).lstrip("\n") if end in answer else f"\n{end}\n\n{answer}"

    def answer(self, text: str) -> str:
        """What follows the thought in a text that the model has written; empty where the thought has no end.

        Without empty lines before it, and with the indentation of its first line: it may continue a program.
        """
        return "" if self.is_thinking(text) else LEADING_LINES.sub("", text.rpartition(self.thought[1])[2])


NO_CHAT = Chat()  # prompts as they are
