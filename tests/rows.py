"""Files of rows, and a tokenizer whose tokens can be read."""

import json
from typing import ClassVar

ASKED, ANSWERED = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
EOS = 0


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Letters:
    """A tokenizer of one token a character; some begin a text with BOS, and some end it with EOS."""

    eos_token_id = EOS
    added_tokens_decoder: ClassVar = {}

    def __init__(self, begin=(), end=()):
        self.begin, self.end = begin, end

    def __call__(self, text, add_special_tokens=True):
        ids = list(map(ord, text))
        return {"input_ids": [*self.begin, *ids, *self.end] if add_special_tokens else ids}

    def apply_chat_template(self, chat, add_generation_prompt, return_dict=False, tokenize=True):
        text = (
            "".join(f"{message['role'][0]}{message['content']};" for message in chat)
            + "a" * add_generation_prompt
        )
        return {"input_ids": list(map(ord, text))} if tokenize else text
