"""Tokens and logits of llama.cpp: those of transformers, or a refusal, before the loop too."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from checkout import EXAMPLE
from gguf_files import SPACES, VOCABULARY, llama_tokenizer, needs_llama_cpp
from tiny_models import build, nightly_but, save
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ptl.errors import InputError
from ptl.export.comparison import TEXTS
from ptl.export.gguf import check, check_config, check_tokenizer, write_gguf
from ptl.model.llama_runtime import LlamaModel

pytestmark = [needs_llama_cpp, pytest.mark.usefixtures("converter_in_process")]
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA_3 += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA_3.replace(r"{1,3}", "")
PAIRS = r"\p{N}{2}|\p{L}{2}|.|\n"


def with_tokenizer(folder, pattern, normalizer=None):
    """A model with a byte-level BPE tokenizer that splits by this pattern and has merged what it could."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizer
    splits = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([splits, bytes_of])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<pad>", "<s>", "</s>"]
    )
    core.train_from_iterator([*TEXTS, "123 456 789 1234 5678 123456 " * 9], trainer)
    save(build("llama", vocab_size=core.get_vocab_size()), folder, tokenizer=False)
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def test_the_tiny_reasoner_s_problems_have_the_same_tokens(tmp_path):
    notes = write_gguf(EXAMPLE / "checkpoint", tmp_path / "model.gguf")
    assert notes == ["llama.cpp drops characters for which the tokenizer has <|unk|>"]
    model = LlamaModel(tmp_path / "model.gguf", vocabulary_only=True)
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "checkpoint")
    for line in (EXAMPLE / "test.jsonl").read_text().splitlines()[::10]:
        problem = json.loads(line)
        text = f"{problem['question']}\n{problem['answer']}"
        assert model.tokens(text) == tokenizer(text).input_ids


def test_ends_of_answers_that_llama_cpp_does_not_know_are_noted(tmp_path):
    """The check of a tokenizer reads no weights."""
    folder = shutil.copytree(
        EXAMPLE / "checkpoint", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")
    )
    generation = json.loads((folder / "generation_config.json").read_text())
    for ends, noted in (([1, 97, 0], "97, 0"), (1, None)):
        (folder / "generation_config.json").write_text(
            json.dumps(generation | {"eos_token_id": ends})
        )
        _, (_, *notes) = check_tokenizer(folder)
        note = f"llama.cpp does not end answers at token {noted}, which generation_config.json has in eos_token_id"
        assert notes == ([note] if noted else [])


def test_a_tokenizer_of_one_s_own_gets_the_pre_tokenizer_that_splits_alike(tmp_path):
    folder = with_tokenizer(tmp_path / "model", LLAMA_3)
    assert write_gguf(folder, tmp_path / "model.gguf", "f16") == []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "It's 12345 + 67 = 12412?\n\nYES, WE'RE sure (about it).\n"
    check_tokenizer(folder)
    tokens = LlamaModel(tmp_path / "model.gguf", vocabulary_only=True).tokens(text)
    assert tokens == tokenizer(text).input_ids
    as_gpt_2 = LlamaModel(
        tmp_path / "model.gguf", vocabulary_only=True, pre_tokenizer="gpt-2"
    ).tokens(text)
    assert as_gpt_2 != tokens  # the first one that was tried


# Of Llama 2's kind, for which the converter asks no hash: what llama.cpp does otherwise, and the first text it shows in
LOWERCASE = normalizers.Sequence([normalizers.Lowercase(), SPACES])
OTHERWISE = {
    "no-bos": ({"bos": False}, "different tokens for '' after '': [1] and []"),
    "no-prefix": ({"normalizer": normalizers.Replace(" ", "▁")}, "for 'Natalia"),
    "lowercase": ({"normalizer": LOWERCASE}, "for 'Natalia"),
    "merge-order": ({"merges": (("o", "l"), ("s", "o"), ("▁", "a"))}, "for 'Natalia sold"),
}


def refused(convert, folder, reason):
    with pytest.raises(
        InputError, match="would not run this tokenizer as transformers does"
    ) as refusal:
        convert(folder)
    assert reason in str(refusal.value) and "serve this checkpoint with" in str(refusal.value)


@pytest.mark.parametrize("variant", OTHERWISE)
def test_other_tokens_of_a_sentencepiece_tokenizer_are_refused(variant, tmp_path):
    changes, reason = OTHERWISE[variant]
    words = VOCABULARY + ("merges" in changes)
    folder = save(build("llama", vocab_size=words), tmp_path / "model", tokenizer=False)
    llama_tokenizer(folder, **changes)
    refused(check_tokenizer, folder, reason)
    if variant == "no-bos":
        refused(lambda src: write_gguf(src, tmp_path / "model.gguf"), folder, reason)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_rare_texts_are_noted_and_chats_compared(tmp_path):
    """A prefix for the first word only, as transformers gives Llama 2: what follows a special token has none."""
    folder = save(build("llama", vocab_size=VOCABULARY), tmp_path / "model", tokenizer=False)
    first = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    llama_tokenizer(folder, normalizer=None, pre_tokenizer=first)
    (folder / "chat_template.jinja").write_text("{{ x() }}")  # it takes no question
    _, notes = check_tokenizer(folder)
    assert [re.search("tokens for ('.*') after", note)[1] for note in notes[:2]] == [
        "' 7 left'",
        "'so</s>7'",
    ]
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}</s>{{ m['content'] }}{% endfor %}"
    )
    refused(check_tokenizer, folder, "'</s>Tom has 12.'")


def test_characters_that_are_composed_are_noted_and_unknown_tokenizers_refused(tmp_path):
    # as Qwen has it
    name, (note,) = check_tokenizer(with_tokenizer(tmp_path / "model", QWEN, normalizers.NFC()))
    assert name and "different tokens for 'Zoe\u0308' after '" in note
    assert check_tokenizer(with_tokenizer(tmp_path / "other", QWEN)) == (name, [])
    refused(check_tokenizer, with_tokenizer(tmp_path / "pairs", PAIRS), "different tokens for")
    refused(
        check_tokenizer, save(build("llama"), tmp_path / "words"), "cannot find tokenizer merges"
    )


# ---- logits, of a small random model with a user's config


CONFIGS = yaml.safe_load(Path(__file__).with_name("llama_cpp.yaml").read_text())
SAME, OTHER = CONFIGS["same"], CONFIGS["other"]
QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 3,
    "head_dim": 128,
}


def config_only(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "case", nightly_but("mistral-without-a-window", "llama-3.1", "qwen3-30b-a3b", of=SAME)
)
def test_configs_that_llama_cpp_computes_alike_are_let_through(case, tmp_path):
    check_config(config_only(tmp_path / "model", SAME[case]))  # it raises where it refuses


@pytest.mark.parametrize(
    "case",
    nightly_but(
        "mistral-0.1", "gemma2-without-some-layers", "llama-with-gelu", "yarn-s-factor", of=OTHER
    ),
)
def test_a_config_that_llama_cpp_computes_otherwise_is_refused(case, tmp_path):
    with pytest.raises(InputError, match=r"\(model_type .*\): the logits differ by [\d.]+%"):
        check_config(config_only(tmp_path / "model", OTHER[case]))


def test_a_config_that_the_converter_does_not_take_is_refused(tmp_path):
    for config, reason in [
        (QWEN3 | {"attention_bias": True}, "cannot read .*wrong number of tensors"),
        (
            QWEN3 | {"architectures": None},
            "converter cannot write .*Failed to detect model architecture",
        ),
    ]:
        with pytest.raises(InputError, match=f"(?s){reason}"):
            check(config_only(tmp_path / "model", config))
