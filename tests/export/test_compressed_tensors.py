"""Quantized checkpoints: what is refused, what the script of the other Python gets, and its results where it exists."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import build, save, word_calibration
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptl.config.recover import DataSource
from ptl.config.run import Calibration, Evaluate, Speed, Task
from ptl.errors import InputError, WorkError
from ptl.evaluation.evaluate import score_tasks
from ptl.evaluation.language_models import tensor_parallel
from ptl.export import compressed_tensors, quantize
from ptl.export.compressed_tensors import (
    PYTHON,
    check,
    group_size,
    interpreter,
)
from ptl.export.compressed_tensors import write as write_compressed
from ptl.extras import AbsentError
from ptl.model import checkpoint

ROOT = Path(__file__).parents[2]
REASONER = ROOT / "examples/tiny_reasoner/checkpoint"
COLUMNS = {"prompt": "{question}\n", "completion": "{answer}"}
# In place of a Python with llmcompressor: notes its arguments, and copies the checkpoint without its tokenizer
MOCK = """#!/bin/sh
[ "$2" = -c ] && exit 0
echo "$@" >>"$0.log"
[ -n "$FAIL" ] && { seq 99; exit 3; }
mkdir "$5" && cp "$4/config.json" "$4/model.safetensors" "$5" && touch "$5/recipe.yaml" && echo quantized
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
    return save(build("llama", **{"hidden_size": 64, "intermediate_size": 96, **changes}), tmp_path / "model")


@pytest.mark.parametrize(
    ("type", "options"),
    [
        ("fp8", {"scheme": "FP8_DYNAMIC", "group_size": None, "sequences": None}),
        ("int8", {"scheme": "W8A8", "group_size": None, "sequences": "sequences.jsonl"}),
        ("w4a16", {"scheme": "W4A16", "group_size": 32, "sequences": "sequences.jsonl"}),
    ],
)
def test_the_script_gets_scheme_groups_and_sequences(type, options, tmp_path, mock_python):
    write_compressed(model(tmp_path), tmp_path / "out", type, word_calibration(tmp_path))
    assert mock_python.read_text().startswith(f"-I -u {quantize.__file__} {tmp_path / 'model'} {tmp_path}/.out.")
    *_, checkpoint_folder, passed = mock_python.read_text().split(maxsplit=5)
    if options["sequences"]:
        options = options | {"sequences": checkpoint_folder.removesuffix("checkpoint") + options["sequences"]}
    assert json.loads(passed) == options


def test_tokenizer_and_generation_config_are_those_of_the_source(tmp_path, mock_python, capfd):
    src = model(tmp_path)
    write_compressed(src, tmp_path / "out", "fp8")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in src.iterdir()} >= {"tokenizer.json", "chat_template.jinja"}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (src / name).read_bytes()
    assert capfd.readouterr().out == "quantized\n"


def test_the_weights_can_be_read_by_other_users(tmp_path, mock_python):
    write_compressed(model(tmp_path), tmp_path / "out", "fp8")
    assert (tmp_path / "out/model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_script_that_fails_is_reported_with_its_last_lines_and_leaves_nothing(tmp_path, mock_python, monkeypatch):
    monkeypatch.setenv("FAIL", "yes")
    with pytest.raises(WorkError, match=r"^export: llmcompressor ended with 3: 80\n81\n[\s\S]*\n99$"):
        write_compressed(model(tmp_path), tmp_path / "out", "fp8")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "python", "python.log"}


def test_the_script_needs_nothing_of_ptl():
    """As the other Python starts it: without site-packages it can still be read."""
    code = f"import runpy; runpy.run_path({quantize.__file__!r})"
    assert subprocess.run([sys.executable, "-I", "-S", "-c", code]).returncode == 0


# ---- what is refused


def test_types_that_are_calibrated_need_text(tmp_path, mock_python):
    with pytest.raises(InputError, match=r"^--config: int8 needs text for calibration; give the run's config"):
        write_compressed(model(tmp_path), tmp_path / "out", "int8")
    assert not mock_python.exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"intermediate_size": 80},
            "is intermediate_size=80; take fp8 or int8, or for intermediate_size prune with prune.width_multiple: 128",
        ),
        ({"hidden_size": 48}, "is hidden_size=48; take fp8 or int8, "),
    ],
)
def test_widths_without_groups_are_refused_before_the_start(changes, problem, tmp_path, mock_python):
    with pytest.raises(InputError, match=f"groups of 128, 64, 32 weights, and no multiple of 32 {problem}"):
        write_compressed(model(tmp_path, **changes), tmp_path / "out", "w4a16", word_calibration(tmp_path))
    assert not mock_python.exists()


@pytest.mark.parametrize(("hidden", "width", "size"), [(128, 384, 128), (128, 192, 64), (64, 96, 32)])
def test_groups_are_as_large_as_all_widths_allow(hidden, width, size, tmp_path):
    folder = model(tmp_path, hidden_size=hidden, intermediate_size=width, head_dim=hidden // 4)
    assert group_size(folder, "w4a16") == size


def test_of_experts_only_fp8_is_written(tmp_path):
    folder = save(build("qwen3_moe"), tmp_path / "model")
    assert check(folder, "fp8") == []
    with pytest.raises(InputError, match=r"int8 of a mixture of experts \(qwen3_moe\) cannot be loaded.*; take fp8"):
        check(folder, "int8")


@pytest.mark.parametrize(
    ("variant", "reason"), [("internlm3", "transformers does not have it"), ("mixtral", "saves its experts by names")]
)
def test_families_that_cannot_be_written_are_refused(variant, reason, tmp_path):
    with pytest.raises(InputError, match=f"model_type {variant} cannot be written: .*{reason}.*; serve the checkpoint"):
        check(save(build(variant), tmp_path / "model"), "fp8")


# ---- which Python


def test_a_python_without_llmcompressor_is_named(monkeypatch):
    monkeypatch.setenv(PYTHON, "/no/such/python")
    with pytest.raises(
        InputError, match=rf"^{PYTHON}: .* cannot be loaded here \(FileNotFoundError.*make llmcompressor"
    ):
        interpreter()


def test_without_a_python_of_its_own_this_one_is_tried(tmp_path, monkeypatch):
    monkeypatch.delenv(PYTHON, raising=False)
    monkeypatch.setattr(compressed_tensors, "OWN_PYTHON", tmp_path / "none")
    commands = []
    monkeypatch.setattr(compressed_tensors.extras, "check_loads", lambda _, command, **__: commands.append(command))
    assert interpreter() == Path(sys.executable) and commands[0][0] == sys.executable
    monkeypatch.undo()
    monkeypatch.delenv(PYTHON, raising=False)
    monkeypatch.setattr(compressed_tensors, "OWN_PYTHON", tmp_path / "none")
    with pytest.raises(AbsentError, match=r"^export: .*No module named 'llmcompressor'\); run `make llmcompressor`"):
        interpreter()


# ---- what is loaded


def quantized_copy(folder):
    """The reasoner with the mark of a quantized checkpoint."""
    shutil.copytree(REASONER, folder)
    config = json.loads((folder / "config.json").read_text())
    mark = {"quantization_config": {"quant_method": "compressed-tensors"}}
    (folder / "config.json").write_text(json.dumps(config | mark))
    return folder


def test_vllm_divides_quantized_weights_over_as_many_gpus(tmp_path):
    assert tensor_parallel(quantized_copy(tmp_path / "model"), 4) == tensor_parallel(REASONER, 4) == 4


# ---- sequences, and the real thing


def test_sequences_are_the_tokens_that_pruning_calibrates_with(tmp_path, mock_python):
    src = model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(src)
    mock_python.with_suffix("").write_text(
        MOCK.replace("&& echo", f"&& cp $(dirname $5)/*.jsonl {tmp_path}/rows && echo")
    )
    write_compressed(src, tmp_path / "out", "int8", word_calibration(tmp_path))
    rows = [json.loads(line)["input_ids"] for line in (tmp_path / "rows").read_text().splitlines()]
    assert len(rows) == 8 and all(row[-1] == tokenizer.eos_token_id for row in rows)
    assert tokenizer.decode(rows[0]).startswith("w")


@pytest.fixture(scope="module")
def reads_compressed():
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")


@pytest.mark.slow
@pytest.mark.parametrize("type", ["fp8", "int8", "w4a16"])
def test_the_quantized_reasoner_solves_its_task(type, tmp_path, llmcompressor, reads_compressed, one_thread):
    source = DataSource(
        source=str(ROOT / "examples/tiny_reasoner/train.jsonl.gz"), format="prompt_completion", **COLUMNS
    )
    texts = Calibration(data=source, num_sequences=16, max_length=256)
    out = tmp_path / "out"
    write_compressed(REASONER, out, type, texts)
    sizes = [sum(path.stat().st_size for path in checkpoint.shards(folder)) for folder in (out, REASONER)]
    assert sizes[0] < sizes[1] / 3  # from float32; the embeddings stay
    assert checkpoint.read_config(out)["quantization_config"]["ignore"] == ["lm_head"]

    task = Task(name=str(ROOT / "examples/tiny_reasoner/tiny_reasoner.yaml"), limit=20)
    settings = Evaluate(tasks=[task], speed=Speed(repeats=0))
    (score,), items = score_tasks(compressed_tensors.language_model(out, REASONER, settings, 0), settings, seed=0)
    assert score.accuracy >= 0.9 and len(items) == 20


@pytest.mark.slow
def test_transformers_reads_the_scales_of_quantized_experts(tmp_path, llmcompressor, reads_compressed):
    src = save(build("qwen3_moe"), tmp_path / "model")
    write_compressed(src, tmp_path / "out", "fp8")
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto").model.layers[0].mlp.experts.state_dict()
        for folder in (src, tmp_path / "out")
    )
    for name, weights in before.items():
        error = float((after[name] - weights).norm() / weights.norm())
        assert 0.01 < error < 0.05  # three bits of mantissa
