"""The command line on wrong input: a clear message, exit code 2, and nothing expensive started."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from gguf_files import needs_llama_cpp, pairs_tokenizer
from safetensors.torch import load_file, save_file
from tiny_models import build, save

from ptl.cli import app, arguments, configs
from ptl.config.run import Config, load_config
from ptl.errors import InputError
from ptl.export import gguf
from ptl.extras import UnusableError

ROOT = Path(__file__).parents[2]
TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"
PERPLEXITY = str(ROOT / "examples/smollm2/gsm8k_perplexity.yaml")
DATA = str(ROOT / "examples/tiny_reasoner/train.jsonl.gz")
CHECKPOINT = ROOT / "examples/tiny_reasoner/checkpoint"


def ptl(*arguments, **options):
    command = [sys.executable, "-m", "ptl", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture
def config(tmp_path):
    """Write tiny.yaml with changes given as dotted fields."""

    def write(**fields):
        raw = load_config(TINY).model_dump(mode="json")  # with the paths of its own folder
        for dotted, value in fields.items():
            *parents, last = dotted.split("__")
            section = raw
            for name in parents:
                section = section[name]
            section[last] = value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


def refused(path, said, tmp_path):
    """The run ends with code 2 and a message that says this, before MLflow's database or a run directory exist."""
    home = tmp_path / "home"
    done = ptl("run", path, "--home", home)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    return not home.exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"schedule__target": 0.9}, "schedule.target"),
        ({"schedule__target": 10_000_000}, "schedule.target: 1e+07 is no size below the model's own"),
        ({"prune__width_multiple": 128}, "prune.width_multiple=128"),
        ({"prune__criterion": "magic"}, "prune.criterion: 'magic'"),
        ({"model__path": "./nowhere"}, "nowhere"),
        ({"evaluate__tasks": [{"name": "no_such_task"}]}, "no_such_task"),
        ({"evaluate__tasks": [{"name": "./none.yaml"}]}, "none.yaml"),
        (
            {
                "evaluate__tasks": [{"name": PERPLEXITY, "metric": "word_perplexity"}],
                "gate": {"enabled": True},
            },
            f"gate.enabled: true, but evaluate.tasks.0 ({PERPLEXITY!r}) is judged by 'word_perplexity'",
        ),
        ({"training__sources": [{"source": "./none.jsonl"}]}, "/none.jsonl; give an existing"),
        ({"export": [{"format": "gguf", "type": "q9"}]}, "export.0: type='q9' is none of gguf's"),
        (
            {"training__sources": [{"source": DATA, "prompt": "{question} {hint}\n", "completion": "{answer}"}]},
            "lacks 'hint'",
        ),
    ],
)
@pytest.mark.slow
def test_a_wrong_config_is_refused_before_any_work(config, tmp_path, fields, said):
    assert refused(config(**fields), said, tmp_path)


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "validate"])
def test_a_checkpoint_that_llama_cpp_computes_differently_is_refused_if_it_is_to_be_exported(
    command, config, checkpoint, tmp_path
):
    settings = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(settings | {"hidden_act": "gelu"}))
    fields = {"model__path": str(checkpoint), "export": [{"format": "gguf", "type": "q8_0"}]}
    options = ["--home", tmp_path / "home"] if command == "run" else []
    done = ptl(command, config(**fields), *options)
    assert done.returncode == 2 and "llama.cpp would not compute what transformers does" in done.stderr
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(("multiple", "warned"), [("auto", True), (32, False)])
def test_a_width_that_an_export_cannot_have_is_warned_of(multiple, warned, config):
    """The checkpoint's own 192 can be divided by 32, the 80 that the plan ends with cannot."""
    fields = {"export": [{"format": "compressed-tensors", "type": "w4a16"}], "prune__width_multiple": multiple}
    done = ptl("validate", config(**fields))
    assert done.returncode == 0, done.stderr
    said = "the step of compressed-tensors-w4a16 will fail if the loop ends as planned: export: w4a16 has groups"
    assert (said in done.stderr) == ("intermediate_size=80" in done.stderr) == warned


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "validate"])
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused_if_it_is_to_be_exported(
    command, config, checkpoint, tmp_path
):
    pairs_tokenizer(checkpoint)
    fields = {"model__path": str(checkpoint), "export": [{"format": "gguf", "type": "q8_0"}]}
    options = ["--home", tmp_path / "home"] if command == "run" else []
    done = ptl(command, config(**fields), *options)
    assert done.returncode == 2 and "llama.cpp would not run this tokenizer" in done.stderr, done.stderr
    assert not (tmp_path / "home").exists()
    # vLLM reads every tokenizer that transformers has.
    fields["export"] = [{"format": "compressed-tensors", "type": "fp8"}]
    assert ptl("validate", config(**fields)).returncode == 0


def test_validate_says_that_a_tokenizer_was_not_checked(config, checkpoint, tmp_path):
    """Without llama.cpp's packages, as on a machine that only submits."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['llama_cpp_py_sync'] = None\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    file = config(export=[{"format": "gguf", "type": "q8_0"}])
    done = ptl("validate", file, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: not checked: ") == 1 and "install 'prune-tune-loop[gguf]'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["validate", "run"])
def test_a_llama_cpp_that_the_system_cannot_load_is_wrong_input(command, config, tmp_path):
    """As with a glibc older than its library was built for."""
    pytest.importorskip("llama_cpp_py_sync")
    (tmp_path / "sitecustomize.py").write_text(
        'import cffi\ndef fail(*_):\n    raise OSError("version `GLIBC_2.38\' not found")\ncffi.FFI.dlopen = fail\n'
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    options = ["--home", tmp_path / "home"] if command == "run" else []
    done = ptl(command, config(export=[{"format": "gguf", "type": "q8_0"}]), *options, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "llama.cpp cannot be loaded here (" in done.stderr and "`GLIBC_2.38' not found" in done.stderr
    assert "PTL_LLAMA_CPP" in done.stderr and not (tmp_path / "home").exists()


@pytest.mark.parametrize("excused", [(), UnusableError])
def test_in_containers_it_does_not_matter_what_this_machine_can_load(excused, config, monkeypatch, capsys):
    def unloadable():
        raise UnusableError("no GLIBC_2.38")

    monkeypatch.setattr(gguf, "check_installed", unloadable)
    settings = load_config(config(export=[{"format": "gguf", "type": "q8_0"}]))
    with contextlib.nullcontext() if excused else pytest.raises(UnusableError):
        configs.checked(settings, excused)
    assert capsys.readouterr().err.count("not checked: no GLIBC_2.38") == len([excused] if excused else [])


@needs_llama_cpp
@pytest.mark.parametrize("command", ["validate", "plan"])
def test_layers_that_may_be_removed_from_a_pattern_are_warned_of(command, config, tmp_path):
    """A Gemma 3 of six layers, the last with full attention."""
    layer_types = [*["sliding_attention"] * 5, "full_attention"]
    fields = {"num_hidden_layers": 6, "layer_types": layer_types, "max_position_embeddings": 256, "vocab_size": 288}
    heads = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "query_pre_attn_scalar": 16}
    model = build("gemma3_text", **fields, **heads)
    folder = save(model, tmp_path / "model", tokenizer=False)
    for file in CHECKPOINT.glob("tokenizer*"):
        shutil.copy(file, folder)
    fields = {"model__path": str(folder), "schedule__target": 0.2, "prune__width_multiple": 1}
    fields["export"] = [{"format": "gguf", "type": "q8_0"}, {"format": "compressed-tensors", "type": "fp8"}]
    said = "may remove layers, and llama.cpp may know the attention of a layer of gemma3_text by its number"
    for target in ("layers", "neurons"):
        done = ptl(command, config(**fields, prune__target=target))
        assert done.returncode == 0, done.stderr
        printed = " ".join((done.stdout + done.stderr).split())
        assert (f"prune.target={target} {said}" in printed) == (target == "layers")
    assert "llama.cpp may know" not in printed


@pytest.mark.slow
def test_a_run_needs_what_its_exports_are_made_with(config, tmp_path, monkeypatch):
    path = config(export=[{"format": "compressed-tensors", "type": "fp8"}])
    monkeypatch.setenv("PTL_LLMCOMPRESSOR_PYTHON", "/no/such/python")
    assert refused(path, "PTL_LLMCOMPRESSOR_PYTHON: llmcompressor of /no/such/python cannot be loaded here", tmp_path)
    # Where the run is planned need not be where it runs.
    assert ptl("validate", path).returncode == 0


@pytest.mark.parametrize(
    ("text", "said"), [("", "is empty"), ('{"question": "1", "answer": "2"}\n{"question":\n', "line 2 is not JSON")]
)
@pytest.mark.slow
def test_a_bad_data_file_is_refused_with_its_line(config, tmp_path, text, said):
    data = tmp_path / "data.jsonl"
    data.write_text(text)
    assert refused(
        config(training__sources=[{"source": str(data), "prompt": "{question}", "completion": "{answer}"}]),
        said,
        tmp_path,
    )


@pytest.mark.slow
def test_only_pickled_weights_are_refused(config, checkpoint, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    assert refused(config(model__path=str(checkpoint)), "has only pickled weights (pytorch_model.bin)", tmp_path)


@pytest.mark.slow
def test_a_missing_tokenizer_is_refused(config, checkpoint, tmp_path):
    (checkpoint / "tokenizer.json").unlink()
    assert refused(config(model__path=str(checkpoint)), "has no tokenizer", tmp_path)


@pytest.mark.slow
def test_nan_in_the_weights_is_refused_by_the_first_step(config, checkpoint, tmp_path):
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    refused(config(model__path=str(checkpoint)), "tensor model.norm.weight", tmp_path)
    assert not list((tmp_path / "home" / "artifacts").glob("ptl/*/*/manifest.json"))


def test_a_directory_of_another_run_is_refused(config, tmp_path):
    other = tmp_path / "run"
    other.mkdir()
    (other / "config.yaml").write_text("name: other\n")
    done = ptl("run", config(), "--home", tmp_path / "home", "--run-dir", other)
    assert done.returncode == 2 and "holds no run that can be read" in done.stderr
    assert (other / "config.yaml").read_text() == "name: other\n"


def test_validate_prints_the_final_size_and_schema_the_fields():
    done = ptl("validate", TINY)
    assert done.returncode == 0, done.stderr
    assert "213,568 parameters become 127,552; " in done.stdout
    printed = json.loads(ptl("validate", "--schema").stdout)
    assert printed == Config.model_json_schema() and printed["additionalProperties"] is False


def test_a_bad_override_is_refused():
    for entry, said in [("seed", "must be NAME=VALUE"), ("seed=[1", "the value is not valid YAML")]:
        done = ptl("validate", TINY, "--set", entry)
        assert done.returncode == 2 and said in done.stderr


@pytest.mark.slow
def test_files_and_folders_that_are_not_there_are_named(tmp_path):
    for command in (
        ("prune", "./nowhere", tmp_path / "out", "-c", TINY),
        ("prune", CHECKPOINT, tmp_path / "out", "-c", TINY, "--target", "1.5"),
        ("recover", "./nowhere", tmp_path / "out", "-c", TINY),
        ("evaluate", "./nowhere", tmp_path / "out", "-c", TINY),
        ("export", "./nowhere", tmp_path / "out.gguf"),
        ("export", TINY.parents[3] / "examples/tiny_reasoner/checkpoint", tmp_path / "out.gguf", "--type", "q4"),
        ("export", "./nowhere", tmp_path / "out", "--to", "onnx"),
        ("export", "./nowhere", tmp_path / "out", "--to", "compressed-tensors"),
        ("export", "./nowhere", tmp_path / "out", "--to", "compressed-tensors", "--type", "int8"),
        ("export", "./nowhere", tmp_path / "out", "--to", "compressed-tensors", "--type", "fp8"),
        ("compile", TINY, "-o", tmp_path / "nowhere" / "p.yaml"),
        ("compile", TINY, "-o", tmp_path / "p.txt"),
    ):
        done = ptl(*command)
        assert done.returncode == 2 and "Traceback" not in done.stderr, (command, done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_recovery_by_hand_reads_the_benchmarks_items_itself(tmp_path):
    dense = TINY.parents[3] / "examples/tiny_reasoner/checkpoint"
    assert ptl("recover", dense, tmp_path / "out", "-c", TINY, "--tokens", "0").returncode == 2
    assert not (tmp_path / "out").exists()
    task = f"{{name: {dense.with_name('tiny_reasoner.yaml')}, limit: 64}}"
    sets = ("--set", "training.decontaminate={tasks: true}", "--set", f"evaluate.tasks=[{task}]")
    done = ptl("recover", dense, tmp_path / "out", "-c", TINY, "--tokens", "2000", *sets)
    assert done.stdout.startswith("[----------] 0% 0 of 2,000 tokens\n") and "{'" not in done.stdout
    told = json.loads(done.stdout[done.stdout.index('{\n "method"') :])["details"]["decontaminated"]
    assert (told["items"], told["not_compared"]) == (64, []) and told["rows"] > told["dropped"]


def test_fetch_refuses_what_is_no_finished_run(tmp_path):
    done = ptl("fetch", tmp_path, tmp_path / "out")
    assert done.returncode == 2 and "is no result.json of a run" in done.stderr


def test_training_is_resumed_only_for_the_same_source_settings_and_data(config, checkpoint, tmp_path):
    """A leftover of another source must not become this one's weights."""
    from ptl.cli.steps import _training_key
    from ptl.config.run import load_config

    def key(path, budget=1000, folder=checkpoint):
        return _training_key(folder, load_config(path), budget, None)

    source = ROOT / "examples/tiny_reasoner/train.jsonl.gz"
    data = shutil.copyfile(source, tmp_path / "train.jsonl.gz")
    sources = [{"source": str(data), "prompt": "{question}\n", "completion": "{answer}"}]
    first = key(config(training={"sources": sources}))
    moved = Path(shutil.copytree(checkpoint, tmp_path / "moved"))
    assert key(config(training={"sources": sources}), folder=moved) == first
    others = [key(config(training={"sources": sources}), 2000), key(config(training={"sources": sources}, seed=1))]
    data.write_bytes(data.read_bytes() + b"\0")
    others.append(key(config(training={"sources": sources})))
    teacher = Path(shutil.copytree(moved, tmp_path / "teacher"))
    distil = {"training": {"sources": sources}, "recover": [{"method": "distil", "teacher": str(teacher)}]}
    others.append(key(config(**distil)))
    (teacher / "model.safetensors").write_bytes(b"another teacher")
    others.append(key(config(**distil)))
    (checkpoint / "model.safetensors").write_bytes(b"other weights")
    others.append(key(config(training={"sources": sources})))
    assert len({first, *others}) == 7


def test_a_target_appears_whole_or_not_at_all_and_one_process_writes_it(tmp_path):
    from ptl.cli.arguments import writing

    dst, work = tmp_path / "dst", tmp_path / "dst.partial"
    with pytest.raises(RuntimeError), writing(dst) as out:
        (out / "model.safetensors").touch()
        out.with_name("training-1").mkdir()
        with pytest.raises(InputError, match="another process executes it"), writing(dst):
            raise AssertionError("two writers")
        raise RuntimeError("it died")
    assert not dst.exists() and (work / "training-1").is_dir() and not out.exists()
    out.mkdir()
    (out / "left").touch()  # as by kill -9
    with writing(dst) as out:
        (out / "model.safetensors").touch()
    assert [path.name for path in dst.iterdir()] == ["model.safetensors"] and not work.exists()


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device", "/data/model.safetensors")

    monkeypatch.setattr(app, "app", full)
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 1
    assert "no space left while writing /data/model.safetensors" in capsys.readouterr().err


def test_a_config_is_given_by_its_path_or_by_the_name_of_a_shipped_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "qwen2.5-7b"):
        file = arguments.config_file(name)
        assert file == TINY.with_name(f"{name}.yaml") and arguments.shown(file) == name
    assert arguments.shown(arguments.config_file("own/tiny.yaml")) == "own/tiny.yaml"
    with pytest.raises(InputError, match=r"no file tinny, and no shipped config of this name; .* one of gemma2-9b, "):
        arguments.config_file("tinny")
    (tmp_path / "tiny").touch()  # a file of one's own comes first
    assert arguments.config_file("tiny") == Path("tiny")


def test_a_shipped_config_is_compiled_with_the_paths_of_the_images(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = load_config(TINY, {"calibration.data.source": "rows.jsonl"})
    assert arguments.as_in_images(config, TINY).model.path == "examples/tiny_reasoner/checkpoint"
    assert arguments.as_in_images(config, TINY).calibration.data.source == str(tmp_path / "rows.jsonl")
    # A config of one's own keeps its files where they are.
    assert arguments.as_in_images(config, tmp_path / "own.yaml").model.path == config.model.path
