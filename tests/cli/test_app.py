"""The command line on wrong input: a clear message, exit code 2, and nothing expensive started."""

import contextlib
import errno
import json
import re
import shutil
from pathlib import Path
from unittest import mock

import golden_messages
import huggingface_hub
import pytest
from checkout import DENSE, EXAMPLE, ROOT, TINY
from gguf_files import converter_in_process, needs_llama_cpp
from huggingface_hub import errors

from ptl.cli import app, arguments, configs
from ptl.cli.steps import _training_key
from ptl.config.chat import NO_CHAT
from ptl.config.run import Config, load_config
from ptl.errors import InputError
from ptl.export import compressed_tensors, formats, gguf
from ptl.extras import AbsentError, UnusableError

GGUF = [{"format": "gguf", "type": "q8_0"}]


def options(**fields):
    return [
        part
        for name, value in fields.items()
        for part in ("--set", f"{name.replace('__', '.')}={value}")
    ]


def test_messages(ptl, tmp_path, monkeypatch):
    """Each begins with the field or the file that is wrong; nothing is written, and no run begun."""
    import torch
    from safetensors.torch import load_file, save_file

    offline = mock.Mock(side_effect=errors.LocalEntryNotFoundError("no connection"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub, "dataset_info", offline)
    for name in ("pickled", "untokenized", "nan"):
        shutil.copytree(DENSE, name)
    Path("pickled/model.safetensors").rename("pickled/pytorch_model.bin")
    Path("untokenized/tokenizer.json").unlink()
    weights = load_file("nan/model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, "nan/model.safetensors", metadata={"format": "pt"})
    Path("empty.jsonl").touch()
    Path("damaged.jsonl").write_text('{"question": "1", "answer": "2"}\n{"question":\n')
    Path("asked.jsonl").write_text('{"messages": [{"role": "user", "content": "1+1?"}]}\n')
    Path("runs/other").mkdir(parents=True)
    Path("runs/other/config.yaml").write_text("name: other\n")

    def message(*words):
        code, printed = ptl(*words)
        return f"{code} {printed}"

    before = sorted(path for path in Path().rglob("*"))
    golden_messages.check("commands.txt", message, reasoner=DENSE, root=ROOT, folder=tmp_path)
    assert sorted(path for path in Path().rglob("*")) == before
    assert Path("runs/other/config.yaml").read_text() == "name: other\n"
    assert json.loads(ptl("validate", "--schema")[1]) == Config.model_json_schema()


def test_a_run_is_refused_before_any_work(ptl, monkeypatch):
    """Code 2 and a message, before MLflow's database or a run directory exist."""
    for uri, words, said in (
        (
            "",
            options(prune__target="neurons", prune__width_multiple=128),
            "prune.width_multiple=128",
        ),
        (
            "http://127.0.0.1:9",
            [],
            "MLFLOW_TRACKING_URI: MLflow at http://127.0.0.1:9 does not answer: connection refused; start the server",
        ),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        code, printed = ptl("run", TINY, *words)
        assert code == 2 and said in printed and "Traceback" not in printed, printed
        assert not Path(".ptl").exists()


def test_software_of_a_step_that_does_not_load_is_wrong_input_or_excused(monkeypatch, capsys):
    settings = load_config(TINY, {"export": GGUF})
    for excused, error, refused in (
        ((), AbsentError, True),  # a run needs what its exports are made with
        (AbsentError, AbsentError, False),  # where it is planned need not be where it runs
        (AbsentError, UnusableError, True),
        (UnusableError, UnusableError, False),  # in containers it does not matter
    ):
        for check in ("check_installed", "check"):
            monkeypatch.setattr(gguf, "check", lambda *_: ["a note"])
            monkeypatch.setattr(gguf, "check_installed", lambda: None)
            monkeypatch.setattr(gguf, check, mock.Mock(side_effect=error("no GLIBC_2.38")))
            with (
                pytest.raises(error, match=r"no GLIBC_2\.38")
                if refused
                else contextlib.nullcontext()
            ):
                configs.checked(settings, excused)
            assert capsys.readouterr().err.count("warning: not checked: no GLIBC_2.38") == (
                not refused
            )


def test_what_an_export_cannot_be_made_of_is_refused_and_notes_are_warnings(monkeypatch, capsys):
    monkeypatch.setattr(gguf, "check_installed", lambda: None)
    monkeypatch.setattr(
        formats, "check_exports", lambda folder, exports, *_: [f"{folder.name} {exports[0].type}"]
    )
    settings = load_config(TINY, {"export": GGUF})
    configs.checked(settings)
    assert "warning: checkpoint q8_0\n" in capsys.readouterr().err
    monkeypatch.setattr(
        formats, "check_exports", mock.Mock(side_effect=InputError("another model", field="export"))
    )
    with pytest.raises(InputError, match="another model"):
        configs.checked(settings, UnusableError)


def test_a_width_that_an_export_cannot_have_is_warned_of(ptl):
    """The checkpoint's own 192 can be divided by 32, the 80 that the plan ends with cannot."""
    export = json.dumps([{"format": "compressed-tensors", "type": "w4a16"}])
    for multiple, warned in (("auto", True), (32, False)):
        code, printed = ptl("plan", "tiny", *options(export=export, prune__width_multiple=multiple))
        said = "the step of compressed-tensors-w4a16 will fail if the loop ends as planned: export: w4a16 has groups"
        assert code == 0 and (said in printed) == warned, printed


@needs_llama_cpp
def test_bytes_and_notes_are_printed(ptl):
    with converter_in_process():
        code, printed = ptl("export", DENSE, "model.gguf", "--type", "q4_k_m")
    assert code == 0, printed
    assert f"wrote model.gguf: {Path('model.gguf').stat().st_size:,} bytes\n" in printed
    assert re.findall("^note: ([^ ]+)", printed, re.M) == ["llama.cpp", "q4_k_m"]


def test_the_configs_calibration_text_is_passed_on(ptl, monkeypatch):
    written = []

    def write(src, dst, *settings):
        written.append(settings)
        shutil.copytree(src, dst)

    monkeypatch.setattr(compressed_tensors, "write", write)
    said = ptl("export", DENSE, "out", "--to", "compressed-tensors", "--type", "int8", "-c", "tiny")
    assert written == [("int8", load_config(TINY).calibration, NO_CHAT, 0)]
    assert said == (0, f"wrote out: {(DENSE / 'model.safetensors').stat().st_size:,} bytes\n")


def test_a_recovery_by_hand_reads_the_benchmarks_items_itself(ptl):
    assert ptl("recover", DENSE, "out", "-c", TINY, "--tokens", "0")[0] == 2
    assert not Path("out").exists()
    task = f"{{name: {EXAMPLE / 'tiny_reasoner.yaml'}, limit: 64}}"
    sets = options(training__decontaminate="{tasks: true}", evaluate__tasks=f"[{task}]")
    _, printed = ptl("recover", DENSE, "out", "-c", TINY, "--tokens", "2000", *sets)
    assert "[----------] 0% 0 of 2,000 tokens\n" in printed and "{'" not in printed
    compared = json.loads(printed[printed.index('{\n "method"') :])["details"]["decontaminated"]
    assert (compared["benchmark_items"], compared["not_compared"]) == (64, [])
    assert compared["rows_compared"] > compared["rows_dropped"]


def test_training_is_resumed_only_for_the_same_source_settings_and_data(tmp_path):
    """A leftover of another source must not become this one's weights."""
    data = shutil.copyfile(EXAMPLE / "train.jsonl.gz", tmp_path / "train.jsonl.gz")
    checkpoint, teacher = (
        Path(shutil.copytree(DENSE, tmp_path / name)) for name in ("checkpoint", "teacher")
    )
    distil = {"recover": [{"method": "distil", "teacher": str(teacher)}]}

    def key(budget=1000, folder=checkpoint, items=None, **fields):
        settings = load_config(TINY, {"training.source": str(data)} | fields)
        return _training_key(folder, settings, budget, items)

    first = key()
    # a moved checkpoint is the same source
    assert first == key(folder=teacher) == key(**{"evaluate.batch_size": 1})
    others = [
        key(budget=2000),
        key(seed=1),
        key(**{"recover.0.learning_rate": 1e-5}),
        key(**distil),
    ]
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "t.jsonl").write_text("{}")
    others.append(key(items=tmp_path / "items"))
    data.write_bytes(data.read_bytes() + b"\0")
    others.append(key())
    (teacher / "model.safetensors").write_bytes(b"another teacher")
    others.append(key(**distil))
    (checkpoint / "model.safetensors").write_bytes(b"other weights")
    assert len({first, *others, key()}) == 9


def test_a_target_appears_whole_or_not_at_all_and_one_process_writes_it(tmp_path):
    dst, work = tmp_path / "dst", tmp_path / "dst.partial"
    with pytest.raises(RuntimeError), arguments.writing(dst) as out:
        (out / "model.safetensors").touch()
        out.with_name("training-1").mkdir()
        with pytest.raises(InputError, match="another process executes it"), arguments.writing(dst):
            raise AssertionError("two writers")
        raise RuntimeError("it died")
    assert not dst.exists() and (work / "training-1").is_dir() and not out.exists()
    out.mkdir()
    (out / "left").touch()  # as by kill -9
    with arguments.writing(dst) as out:
        (out / "model.safetensors").touch()
    assert [path.name for path in dst.iterdir()] == ["model.safetensors"] and not work.exists()
    with pytest.raises(RuntimeError), arguments.writing(tmp_path / "other"):
        raise RuntimeError("nothing to resume")
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_a_full_disk_or_an_unusable_path_is_one_line(monkeypatch, capsys):
    for number, code in ((errno.ENOSPC, 1), (errno.ENAMETOOLONG, 2)):
        monkeypatch.setattr(
            app, "app", mock.Mock(side_effect=OSError(number, "reason", "/data/model.safetensors"))
        )
        with pytest.raises(SystemExit) as ended:
            app.main()
        assert ended.value.code == code and "/data/model.safetensors" in capsys.readouterr().err


def test_a_shipped_config_is_given_by_its_name_and_compiled_with_the_paths_of_the_images(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert arguments.config_file("tiny") == TINY and arguments.shown(TINY) == "tiny"
    assert arguments.shown(arguments.config_file("own/tiny.yaml")) == "own/tiny.yaml"
    (tmp_path / "tiny").touch()  # a file of one's own comes first
    assert arguments.config_file("tiny") == Path("tiny")
    config = load_config(TINY, {"calibration.data.source": "rows.jsonl"})
    shipped = arguments.as_in_images(config, TINY)
    assert shipped.model.path == "examples/tiny_reasoner/checkpoint"
    assert shipped.calibration.data[0].source == str(tmp_path / "rows.jsonl")
    # A config of one's own keeps its files where they are.
    assert arguments.as_in_images(config, tmp_path / "own.yaml").model.path == config.model.path


def test_help_by_its_short_option_and_completion(ptl):
    assert ptl("-h") == ptl("--help") and ptl("plan", "-h")[0] == 0
    assert "--install-completion" in ptl("-h")[1]
