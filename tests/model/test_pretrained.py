"""A checkpoint's own Python is never run, and nobody is asked whether it may be."""

import shutil

import pytest
from checkout import ROOT, TINY
from tiny_models import build, change_config, save

from ptl.config.recover import RecoverStage
from ptl.config.run import Calibration, load_config
from ptl.config.schedule import Prune
from ptl.data.stages import check_stages
from ptl.errors import InputError
from ptl.evaluation.evaluate import evaluate_checkpoint
from ptl.model import checkpoint, pretrained
from ptl.preflight.forecast import forecast
from ptl.pruning.prune import prune_checkpoint
from ptl.recovery import training
from ptl.recovery.distillation import load_teacher
from ptl.recovery.job import RecoveryJob

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
CLASSES = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}


def ways(folder, plain, tmp_path):
    """All of ptl that loads a model or its tokenizer."""
    settings = load_config(TINY, {"model.path": str(folder)})
    source = {"source": "x.jsonl", "format": "text"}
    calibration, stage = (
        Calibration(data=source, max_length=32),
        RecoverStage(method="distil", teacher=str(folder), max_length=32),
    )
    job = RecoveryJob(data=None, budget=None, scratch=tmp_path, on_log=print)
    amounts = {"unit": "neurons", "goal": 20_000, "end": 20_000, "seed": 0}
    return {
        "prune": lambda: prune_checkpoint(folder, tmp_path / "a", Prune(), calibration, **amounts),
        # as a recovery does
        "teacher": lambda: (check_stages(plain, [stage], None), load_teacher(stage, job)),
        "evaluate": lambda: evaluate_checkpoint(folder, tmp_path / "b", settings.evaluate, seed=0),
        "forecast": lambda: forecast(settings),
        "recover": lambda: training.load(folder),
        "config": lambda: pretrained.config(folder),
        "model": lambda: pretrained.causal_lm(folder),
        "tokenizer": lambda: pretrained.load_tokenizer(folder),
    }


def test_a_model_of_its_own_code_is_refused_and_a_tokenizer_too(tmp_path, monkeypatch):
    # transformers asks where it is not forbidden to run code.
    monkeypatch.setattr(
        "builtins.input", lambda prompt="": pytest.fail(f"asked on the terminal: {prompt}")
    )
    plain = save(build("llama"), tmp_path / "plain")
    own = shutil.copytree(plain, tmp_path / "own")
    (own / "own.py").write_text(CODE)
    change_config(own, model_type="own", auto_map=CLASSES)
    for name, way in ways(own, plain, tmp_path).items():
        with pytest.raises(
            InputError, match=r"(needs code of its own, which is never run|not supported)"
        ):
            way()
            pytest.fail(f"{name} loaded it")
    (own / "model.safetensors").rename(own / "pytorch_model.bin")
    change_config(own, model_type="llama", auto_map=None)
    with pytest.raises(InputError, match="has only pickled weights"):
        check_stages(plain, [RecoverStage(method="distil", teacher=str(own), max_length=32)], None)
    (own / "pytorch_model.bin").rename(own / "model.safetensors")
    change_config(own, model_type="own", auto_map=CLASSES)
    # A known family that names code too, as Phi-3's checkpoints on the hub do, is loaded without it.
    change_config(own, model_type="llama")
    assert pretrained.causal_lm(own).num_parameters() == build("llama").num_parameters()

    config = checkpoint.json_object(own / "tokenizer_config.json")
    classes = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]},
    }
    checkpoint.write_json(own / "tokenizer_config.json", config | classes)
    (own / "tokenizer.json").unlink()
    of_tokenizer = ways(own, plain, tmp_path)
    for name in ("prune", "teacher", "evaluate", "tokenizer"):
        with pytest.raises(InputError, match="needs code of its own, which is never run"):
            of_tokenizer[name]()
    assert not (own / "ran").exists()


def test_a_token_without_an_embedding_is_named(tmp_path):
    folder = save(build("llama"), tmp_path / "padded")
    tokenizer = pretrained.load_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # and the embeddings as they were
    tokenizer.save_pretrained(folder)
    rows = checkpoint.read_config(folder)["vocab_size"]
    said = (
        f"pad_token is token {len(tokenizer) - 1}, and the model has embeddings for {rows} tokens; "
    )
    with pytest.raises(InputError, match=said):
        pretrained.load_tokenizer(folder)


def test_what_loads_in_other_processes_forbids_code_and_pickles():
    for file, calls in (("export/quantize.py", 1), ("evaluation/language_models.py", 2)):
        assert (ROOT / "ptl" / file).read_text().count("trust_remote_code=False") == calls, file
    assert "use_safetensors=True" in (ROOT / "ptl/export/quantize.py").read_text()
