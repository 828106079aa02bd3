"""How a chat model is served: its chat template, the template's variables, and where a thought ends."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator

from ptl.config.base import Section

Variable = bool | int | float | str
QUESTION = "(question)"  # as a user's turn, to find what a template writes after one
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

    def delimits(self, token: str) -> bool:
        """Whether a token is what begins or ends a thought, or a part of it."""
        return any(token in text for text in self.thought)

    def begun_thought(self, prompt: str, opening: str) -> str:
        """The thought at the end of a prompt: begun, begun and ended, or none (empty).

        `opening` is QUESTION as the chat template writes it. What follows QUESTION there is the template's own, and so
        is the end of a prompt that ends like that. Any other prompt, such as one with a tool's result or with the first
        words of the answer, has the thought as its last word or not at all.
        """
        begin, end = self.thought
        own = opening.rpartition(QUESTION)[2]
        text = own if prompt.endswith(own) else prompt
        last = text.rstrip()
        if last.endswith(end):
            return begin + end
        if last.endswith(begin):
            return begin + text[len(last) :]
        return ""

    def with_thought(self, thought: str, answer: str) -> str:
        """An answer after a thought that is given apart from it; empty: there is none."""
        begin, end = self.thought
        return f"{begin}\n{thought.strip()}\n{end}\n\n{answer}" if thought else answer

    def continued(self, begun: str, answer: str) -> str:
        """An answer as it continues a prompt that has `begun` a thought."""
        begin, end = self.thought
        if not begun:
            return answer
        if end in begun:
            return self.answer(answer)
        if answer.startswith(begun):
            return answer.removeprefix(begun)
        if answer.lstrip().startswith(begin):
            return answer.lstrip().removeprefix(begin).lstrip("\n")
        return answer if end in answer else f"\n{end}\n\n{answer}"

    def is_thinking(self, text: str) -> bool:
        """Whether an answer ends within its thought; the text begins with what its prompt has `begun`."""
        begin, end = self.thought
        return text.lstrip().startswith(begin) and end not in text

    def answer(self, text: str) -> str:
        """What follows the thought in an answer; empty where the thought has no end. The text is that of `is_thinking`.

        A thought begins where the answer begins, and ends at the first mark that ends one: what follows may mention
        such marks. Without empty lines before it, and with the indentation of its first line: it may continue a
        program.
        """
        begin, end = self.thought
        thought, mark, rest = text.partition(end)
        if text.lstrip().startswith(begin):
            return LEADING_LINES.sub("", rest)
        # A thought whose beginning is not there: a prompt had it.
        is_thought = mark and begin not in thought
        return LEADING_LINES.sub("", rest if is_thought else text)


NO_CHAT = Chat()  # prompts as they are
