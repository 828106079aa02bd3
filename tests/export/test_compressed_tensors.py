"""Quantized checkpoints: what is refused, what the script of the other Python gets, and its results where it exists."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import DENSE, EXAMPLE
from recovering import DATA
from tiny_models import build, save, word_calibration
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptl.config.chat import NO_CHAT
from ptl.config.run import Calibration, Evaluate, Speed, Task
from ptl.errors import InputError
from ptl.evaluation.evaluate import score_tasks
from ptl.evaluation.language_models import noted_hflm
from ptl.export import compressed_tensors, quantize
from ptl.export.compressed_tensors import PYTHON, check, group_size
from ptl.export.compressed_tensors import write as write_compressed
from ptl.model import checkpoint

# In place of a Python with llmcompressor: notes its arguments and its sequences, and copies the checkpoint without its
# tokenizer
MOCK = """#!/bin/sh
[ "$2" = -c ] && exit 0
echo "$@" >>"$0.log"
cat "$(dirname "$5")"/*.jsonl 2>/dev/null >"$0.rows"
mkdir "$5" && cp "$4/config.json" "$4/model.safetensors" "$5" && touch "$5/recipe.yaml"
echo '{}' >"$5/generation_config.json"
chmod 600 "$5/model.safetensors"
"""


@pytest.fixture
def mock_python(tmp_path, monkeypatch):
    """A mock of the Python that has llmcompressor; its arguments are in the file returned."""
    python = tmp_path / "python"
    python.write_text(MOCK)
    python.chmod(0o755)
    monkeypatch.setenv(PYTHON, str(python))
    return Path(f"{python}.log")


def model(tmp_path, **changes):
    """A model of which w4a16 can have groups of 32."""
    return save(
        build("llama", **{"hidden_size": 64, "intermediate_size": 96, **changes}),
        tmp_path / "model",
    )


@pytest.mark.parametrize("type", ["fp8", "int8", "w4a16"])
def test_the_script_gets_what_it_needs_and_its_result_is_completed(type, tmp_path, mock_python):
    scheme, size, rows = {
        "fp8": ("FP8_DYNAMIC", None, 0),
        "int8": ("W8A8", None, 8),
        "w4a16": ("W4A16", 32, 8),
    }[type]
    src, out = model(tmp_path), tmp_path / "out"
    write_compressed(src, out, type, word_calibration(tmp_path))
    assert mock_python.read_text().startswith(f"-I -u {quantize.__file__} {src} {tmp_path}/.out.")
    *_, partial, options = mock_python.read_text().split(maxsplit=5)
    sequences = str(Path(partial).with_name("sequences.jsonl")) if rows else None
    assert json.loads(options) == {"scheme": scheme, "group_size": size, "sequences": sequences}
    # The sequences that pruning calibrates with
    tokenizer = AutoTokenizer.from_pretrained(src)
    tokens = [
        json.loads(line)["input_ids"]
        for line in (tmp_path / "python.rows").read_text().splitlines()
    ]
    assert len(tokens) == rows and all(row[-1] == tokenizer.eos_token_id for row in tokens)
    assert all(tokenizer.decode(row).startswith("w") for row in tokens)
    # Tokenizer and generation config are those of the source.
    names = {path.name for path in out.iterdir()}
    assert (
        names == {path.name for path in src.iterdir()} >= {"tokenizer.json", "chat_template.jinja"}
    )
    assert all((out / name).read_bytes() == (src / name).read_bytes() for name in names)
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o644  # other users read it


def test_the_script_needs_nothing_of_ptl():
    """As the other Python starts it: without site-packages it can still be read."""
    code = f"import runpy; runpy.run_path({quantize.__file__!r})"
    assert subprocess.run([sys.executable, "-I", "-S", "-c", code]).returncode == 0


# ---- what is refused


def test_what_cannot_be_calibrated_is_refused_before_the_start(tmp_path, mock_python):
    texts = word_calibration(tmp_path)
    for changes, given, problem in [
        (
            {"intermediate_size": 80},
            texts,
            "is intermediate_size=80; .* or prune with prune.width_multiple: 128 ",
        ),
        ({"hidden_size": 48}, texts, "is hidden_size=48; take fp8 or int8, "),
        ({}, None, r"^--config: w4a16 needs text for calibration; give the run's config"),
    ]:
        with pytest.raises(InputError, match=problem):
            write_compressed(model(tmp_path, **changes), tmp_path / "out", "w4a16", given)
    assert not mock_python.exists()
    # Groups are as large as all widths allow.
    folder = model(tmp_path, hidden_size=128, intermediate_size=384, head_dim=32)
    assert [group_size(folder, "w4a16", width) for width in (None, 192, 96)] == [128, 64, 32]
    assert [
        group_size(folder, "w4a16", None, *narrow) for narrow in ((64, 4), (128, 2), (96, 1))
    ] == [64, 64, 32]
    with pytest.raises(
        InputError, match=r"is hidden_size=80; .*prune\.target=width hidden_size too"
    ):
        group_size(folder, "w4a16", None, 80, 4)


def test_of_experts_only_fp8_is_written(tmp_path):
    folder = save(build("qwen3_moe"), tmp_path / "model")
    assert check(folder, "fp8") == []
    with pytest.raises(
        InputError, match=r"int8 of a mixture of experts \(qwen3_moe\) cannot be loaded.*; take fp8"
    ):
        check(folder, "int8")
    with pytest.raises(
        InputError, match=r"model_type mixtral cannot be written: .*; serve the checkpoint"
    ):
        check(save(build("mixtral"), tmp_path / "mixtral"), "fp8")


def test_an_export_is_scored_by_transformers_also_where_the_run_has_vllm():
    settings = Evaluate(tasks=[Task(name="arc_easy")], backend="vllm", speed=Speed(repeats=0))
    model = compressed_tensors.language_model(DENSE, DENSE, settings, NO_CHAT, 0)
    assert isinstance(model, noted_hflm())


# ---- the real thing


@pytest.mark.nightly
@pytest.mark.parametrize("type", ["fp8", "int8", "w4a16"])
def test_the_quantized_reasoner_solves_its_task(type, tmp_path, llmcompressor, one_thread):
    out = tmp_path / "out"
    pytest.importorskip("compressed_tensors")
    write_compressed(
        DENSE, out, type, Calibration(data=DATA.sources[0], num_sequences=16, max_length=256)
    )
    sizes = [
        sum(path.stat().st_size for path in checkpoint.shards(folder)) for folder in (out, DENSE)
    ]
    assert sizes[0] < sizes[1] / 3  # from float32; the embeddings stay
    assert checkpoint.read_config(out)["quantization_config"]["ignore"] == ["lm_head"]

    task = Task(name=str(EXAMPLE / "tiny_reasoner.yaml"), limit=20)
    settings = Evaluate(tasks=[task], speed=Speed(repeats=0))
    (score,), items = score_tasks(
        compressed_tensors.language_model(out, DENSE, settings, NO_CHAT, 0), settings, seed=0
    )
    assert score.accuracy >= 0.9 and len(items) == 20


@pytest.mark.nightly
def test_transformers_reads_the_scales_of_quantized_experts(tmp_path, llmcompressor):
    pytest.importorskip("compressed_tensors")
    src = save(build("qwen3_moe"), tmp_path / "model")
    write_compressed(src, tmp_path / "out", "fp8")
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        .model.layers[0]
        .mlp.experts.state_dict()
        for folder in (src, tmp_path / "out")
    )
    for name, weights in before.items():
        error = float((after[name] - weights).norm() / weights.norm())
        assert 0.01 < error < 0.05  # three bits of mantissa
