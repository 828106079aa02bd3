"""Tokenizers whose hash llama.cpp's converter does not know: the same tokens, or a refusal."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import llama_tokenizer, needs_llama_cpp
from tiny_models import build, save
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ptl.errors import InputError
from ptl.export.gguf import check_tokenizer, write_gguf
from ptl.export.pre_tokenizers import TEXTS
from ptl.model.llama_runtime import LlamaModel

pytestmark = [needs_llama_cpp, pytest.mark.usefixtures("converter_in_process")]
EXAMPLE = Path(__file__).parents[2] / "examples/tiny_reasoner"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PAIRS = r"\p{N}{2}|\p{L}{2}|.|\n"


def with_tokenizer(folder, pattern):
    """A model with a byte-level BPE tokenizer that splits by this pattern and has merged what it could."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<pad>", "<s>", "</s>"])
    core.train_from_iterator([*TEXTS, "123 456 789 1234 5678 123456 " * 9], trainer)
    save(build("llama", vocab_size=core.get_vocab_size()), folder, tokenizer=False)
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def test_the_tiny_reasoner_s_problems_have_the_same_tokens(tmp_path):
    notes = write_gguf(EXAMPLE / "checkpoint", tmp_path / "model.gguf")
    assert notes == ["llama.cpp drops characters for which the tokenizer has <|unk|>"]
    model = LlamaModel(tmp_path / "model.gguf", vocabulary_only=True)
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "checkpoint")
    for line in (EXAMPLE / "test.jsonl").read_text().splitlines():
        problem = json.loads(line)
        text = f"{problem['question']}\n{problem['answer']}"
        assert model.tokens(text) == tokenizer(text).input_ids


@pytest.mark.parametrize(("ends", "noted"), [([1, 97], 97), (0, 0)])
def test_ends_of_answers_that_llama_cpp_does_not_know_are_noted(ends, noted, tmp_path):
    folder = shutil.copytree(EXAMPLE / "checkpoint", tmp_path / "model")
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": ends}))
    *_, note = write_gguf(folder, tmp_path / "model.gguf")
    assert note == f"llama.cpp does not end answers at token {noted}, which generation_config.json has in eos_token_id"


def test_a_tokenizer_of_one_s_own_gets_the_pre_tokenizer_that_splits_alike(tmp_path):
    folder = with_tokenizer(tmp_path / "model", LLAMA_3)
    assert write_gguf(folder, tmp_path / "model.gguf", "f16") == []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "It's 12345 + 67 = 12412?\n\nYES, WE'RE sure (about it).\n"
    check_tokenizer(folder)
    tokens = LlamaModel(tmp_path / "model.gguf", vocabulary_only=True).tokens(text)
    assert tokens == tokenizer(text).input_ids
    as_gpt_2 = LlamaModel(tmp_path / "model.gguf", vocabulary_only=True, pre_tokenizer="gpt-2").tokens(text)
    assert as_gpt_2 != tokens  # the first one that was tried


@pytest.mark.parametrize("kind", ["pairs", "words"])
def test_a_tokenizer_that_llama_cpp_cannot_have_is_refused(kind, tmp_path):
    folder = tmp_path / "model"
    if kind == "pairs":
        with_tokenizer(folder, PAIRS)
    else:
        save(build("llama"), folder)
    for convert in (check_tokenizer, lambda src: write_gguf(src, tmp_path / "model.gguf")):
        with pytest.raises(InputError, match=r"no pre-tokenizer that gives the tokens of .*; serve this"):
            convert(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_check_of_a_tokenizer_reads_no_weights(tmp_path):
    without_weights = shutil.ignore_patterns("*.safetensors")
    folder = shutil.copytree(EXAMPLE / "checkpoint", tmp_path / "model", ignore=without_weights)
    check_tokenizer(folder)  # it raises where it refuses
    llama_tokenizer(folder)  # of a kind that the converter knows without a hash
    check_tokenizer(folder)
    assert not any(folder.glob("*.safetensors"))


def test_a_name_is_asked_for_only_where_the_converter_does_not_know_the_tokenizer(tmp_path):
    """In a process of its own, as for a user."""
    command = [sys.executable, "-m", "ptl.export.converter", "smollm", str(EXAMPLE / "checkpoint")]
    command += ["--outfile", str(tmp_path / "model.gguf"), "--vocab-only"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "a tokenizer that the converter does not know\n"
    assert (tmp_path / "model.gguf").is_file()
