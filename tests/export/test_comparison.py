"""Tokens and logits of llama.cpp: those of transformers, or a refusal, before the loop too."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import SPACES, VOCABULARY, llama_tokenizer, needs_llama_cpp
from tiny_models import build, save
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ptl.errors import InputError
from ptl.export.comparison import TEXTS
from ptl.export.converter import UNKNOWN
from ptl.export.gguf import check, check_config, check_tokenizer, write_gguf
from ptl.model.llama_runtime import LlamaModel

pytestmark = [needs_llama_cpp, pytest.mark.usefixtures("converter_in_process")]
EXAMPLE = Path(__file__).parents[2] / "examples/tiny_reasoner"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA_3.replace(r"{1,3}", "")
PAIRS = r"\p{N}{2}|\p{L}{2}|.|\n"


def with_tokenizer(folder, pattern, normalizer=None):
    """A model with a byte-level BPE tokenizer that splits by this pattern and has merged what it could."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizer
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


def sequence(*steps):
    return normalizers.Sequence([*steps, SPACES])


# Of Llama 2's kind, for which the converter asks no hash: what llama.cpp does otherwise, and the first text it shows in
OTHERWISE = {
    "no-bos": ({"bos": False}, "different tokens for '' after '': [1] and []"),
    "no-prefix": ({"normalizer": normalizers.Replace(" ", "▁")}, "for 'Natalia"),
    "metaspace-never": (
        {"normalizer": None, "pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="never", split=False)},
        "for 'Natalia",
    ),
    "lowercase": ({"normalizer": sequence(normalizers.Lowercase())}, "for 'Natalia"),
    "nfkc": ({"normalizer": sequence(normalizers.NFKC())}, "for '2½"),
    "merge-order": ({"merges": (("o", "l"), ("s", "o"), ("▁", "a"))}, "for 'Natalia sold"),
}


def refused(convert, folder, reason):
    with pytest.raises(InputError, match="would not run this tokenizer as transformers does") as refusal:
        convert(folder)
    assert reason in str(refusal.value) and "serve this checkpoint with" in str(refusal.value)


@pytest.mark.parametrize("variant", OTHERWISE)
def test_other_tokens_of_a_sentencepiece_tokenizer_are_refused(variant, tmp_path):
    changes, reason = OTHERWISE[variant]
    words = VOCABULARY + ("merges" in changes)
    folder = save(build("llama", vocab_size=words), tmp_path / "model", tokenizer=False)
    llama_tokenizer(folder, **changes)
    for convert in (check_tokenizer, lambda src: write_gguf(src, tmp_path / "model.gguf")):
        refused(convert, folder, reason)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("template", ["", "{% for m in messages %}</s>{{ m['content'] }}{% endfor %}", "{{ x() }}"])
def test_rare_texts_are_noted_and_chats_compared(template, tmp_path):
    """A prefix for the first word only, as transformers gives Llama 2: what follows a special token has none."""
    folder = save(build("llama", vocab_size=VOCABULARY), tmp_path / "model", tokenizer=False)
    first = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    llama_tokenizer(folder, normalizer=None, pre_tokenizer=first)
    if template.startswith("{%"):
        (folder / "chat_template.jinja").write_text(template)
        refused(check_tokenizer, folder, "'</s>Tom has 12.'")
        return
    (folder / "chat_template.jinja").write_text(template)  # of which the last takes no question
    _, notes = check_tokenizer(folder)
    assert [re.search("tokens for ('.*') after", note)[1] for note in notes[:2]] == ["' 7 left'", "'so</s>7'"]


def test_characters_that_are_composed_are_noted(tmp_path):
    """NFC, as Qwen has it."""
    folder = with_tokenizer(tmp_path / "model", QWEN, normalizers.NFC())
    name, (note,) = check_tokenizer(folder)
    assert name and "different tokens for 'Zoe\u0308' after '" in note
    assert check_tokenizer(with_tokenizer(tmp_path / "other", QWEN)) == (name, [])


@pytest.mark.parametrize("kind", ["pairs", "words"])
def test_a_tokenizer_that_llama_cpp_cannot_have_is_refused(kind, tmp_path):
    folder = tmp_path / "model"
    if kind == "pairs":
        with_tokenizer(folder, PAIRS)
    else:
        save(build("llama"), folder)
    refused(check_tokenizer, folder, "different tokens for" if kind == "pairs" else "cannot find tokenizer merges")


def test_a_sentencepiece_tokenizer_without_bytes_is_refused(tmp_path):
    """llama.cpp would end the process at a character that has no token."""
    import sentencepiece

    text = tmp_path / "text"
    text.write_text("hello world this is a text about numbers\n" * 9)
    folder = save(build("llama"), tmp_path / "model")
    options = {"model_type": "bpe", "vocab_size": 32, "hard_vocab_limit": False, "minloglevel": 9}
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(folder / "tokenizer"), **options)
    refused(check_tokenizer, folder, "no tokens of bytes")


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
    assert done.stdout.startswith(f"{UNKNOWN} ") and "qwen2" in done.stdout.split()
    assert (tmp_path / "model.gguf").is_file()


# ---- logits, of a small random model with a user's config


MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "max_position_embeddings": 32768}
LLAMA3 = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 131072} | {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
GEMMA2 = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "hidden_size": 3584} | {
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 42,
}
GEMMA2_27B = GEMMA2 | {"hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128, "query_pre_attn_scalar": 144}
GEMMA3 = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": 6}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
OLMO3 = {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], "sliding_window": 4096} | {
    "rope_scaling": YARN | {"factor": 8.0, "attention_factor": 1.2079441541679836},
}
EXAONE4 = {"model_type": "exaone4", "architectures": ["Exaone4ForCausalLM"], "num_hidden_layers": 64}
GEMMA = {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}
COHERE2 = {"model_type": "cohere2", "architectures": ["Cohere2ForCausalLM"]}
QWEN3_MOE = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True}
FEW = {"num_hidden_layers": 3}
WINDOWED = ["sliding_attention"] * 2 + ["full_attention"] * 30


SAME = {
    "mistral-without-a-window": MISTRAL | {"sliding_window": None},
    "mistral-with-a-window-as-long-as-its-context": MISTRAL | {"sliding_window": 32768},
    "llama-3.1": LLAMA3,
    "qwen2": QWEN2 | {"use_sliding_window": False, "sliding_window": 131072},
    "gemma2-27b": GEMMA2_27B | {"num_hidden_layers": 46},
    "gemma3": GEMMA3 | {"num_hidden_layers": 12},
    "olmo3-without-some-layers": OLMO3 | {"layer_types": WINDOWED},
    "exaone4-32b": EXAONE4,
    "qwen3-30b-a3b": QWEN3_MOE | {"head_dim": 128, "use_sliding_window": False, "sliding_window": 4096} | FEW,
}
OTHER = {
    "mistral-0.1": MISTRAL | {"sliding_window": 4096} | FEW,
    "mistral-s-default-window": MISTRAL | FEW,
    "gemma2-with-another-scale": GEMMA2 | {"query_pre_attn_scalar": 224} | FEW,
    "gemma2-27b-without-some-layers": GEMMA2_27B | {"num_hidden_layers": 44},
    "gemma2-without-some-layers": GEMMA2
    | {"num_hidden_layers": 3, "layer_types": ["sliding_attention", *["full_attention"] * 2]},
    "llama-with-gelu": LLAMA3 | {"hidden_act": "gelu"} | FEW,
    "qwen2-with-llama-s-rope": LLAMA3 | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]} | FEW,
    "yarn-s-factor": QWEN2 | {"rope_scaling": YARN | {"attention_factor": 1.5}} | FEW,
    "exaone4-32b-without-a-layer": EXAONE4 | {"num_hidden_layers": 63},
    "gemma-theta": GEMMA | {"rope_theta": 1e6} | FEW,
    "qwen3-moe-not-normalized": QWEN3_MOE | {"norm_topk_prob": False} | FEW,
}
NOT_CONVERTED = {
    "qwen3-with-biases": (QWEN3 | {"attention_bias": True} | FEW, "cannot read .*wrong number of tensors"),
    "cohere2-without-rotary-pct": (COHERE2 | FEW, "converter cannot write .*KeyError: 'rotary_pct'"),
    "no-class": (QWEN3 | {"architectures": None} | FEW, "converter cannot write .*Failed to detect model architecture"),
    "qwen3-moe-dense-layer": (
        QWEN3_MOE | {"mlp_only_layers": [2]} | FEW,
        "converter cannot write .*Can not map tensor",
    ),
}


def config_only(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", SAME)
def test_configs_that_llama_cpp_computes_alike_are_let_through(case, tmp_path):
    check_config(config_only(tmp_path / "model", SAME[case]))  # it raises where it refuses


@pytest.mark.parametrize("case", OTHER)
def test_a_config_that_llama_cpp_computes_otherwise_is_refused(case, tmp_path):
    with pytest.raises(InputError, match=r"\(model_type .*\): the logits differ by [\d.]+%"):
        check_config(config_only(tmp_path / "model", OTHER[case]))


@pytest.mark.parametrize("case", NOT_CONVERTED)
def test_a_config_that_the_converter_does_not_take_is_refused(case, tmp_path):
    config, reason = NOT_CONVERTED[case]
    with pytest.raises(InputError, match=f"(?s){reason}"):
        check(config_only(tmp_path / "model", config))
