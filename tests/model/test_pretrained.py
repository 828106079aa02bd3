"""A checkpoint's own Python is never run, and nobody is asked whether it may be."""

import ast
import json
import shutil
from pathlib import Path

import pytest
from tiny_models import build, save

from ptl.config.recover import DataSource, RecoverStage, TrainingData
from ptl.config.run import Calibration, load_config
from ptl.config.schedule import Prune
from ptl.errors import InputError
from ptl.evaluation.evaluate import evaluate_checkpoint
from ptl.model import pretrained
from ptl.model.hub import import_checkpoint
from ptl.model.pretrained import load_tokenizer
from ptl.preflight.forecast import forecast
from ptl.pruning.prune import prune_checkpoint
from ptl.recovery.distillation import load_teacher
from ptl.recovery.job import RecoveryJob, StageBudget
from ptl.recovery.training import load

ROOT = Path(__file__).parents[2]
TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"
CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
REFUSED = ": .*(needs code of its own, which is never run|not supported)"


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch):
    """transformers asks by input() where it is not forbidden to run code."""

    def asked(prompt=""):
        raise AssertionError(f"asked on the terminal: {prompt}")

    monkeypatch.setattr("builtins.input", asked)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save(build("llama"), tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(params=["model", "tokenizer"])
def own_code(request, plain, tmp_path):
    """A checkpoint whose model or tokenizer is a class in a file beside it."""
    folder = tmp_path / "own"
    shutil.copytree(plain, folder)
    name = {"model": "config.json", "tokenizer": "tokenizer_config.json"}[request.param]
    content = json.loads((folder / name).read_text())
    if request.param == "model":
        classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        content |= {"model_type": "own", "auto_map": classes}
    else:
        content |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
        (folder / "tokenizer.json").unlink()
    (folder / name).write_text(json.dumps(content))
    (folder / "own.py").write_text(CODE)
    yield folder
    assert not (folder / "ran").exists()


def test_each_way_into_transformers_refuses(own_code):
    is_model = "own" in (own_code / "config.json").read_text()
    loads = [pretrained.config, pretrained.causal_lm] if is_model else [pretrained.tokenizer]
    for way in loads:
        with pytest.raises(InputError, match="needs code of its own, which is never run"):
            way(own_code)


def job(tmp_path):
    data = TrainingData(sources=[DataSource(source="x.jsonl", format="text")])
    return RecoveryJob(data, StageBudget(10, (), 1, True, 0), tmp_path / "scratch", lambda *_: None)


def test_every_command_refuses(own_code, plain, tmp_path):
    settings = load_config(TINY, {"model.path": str(own_code)})
    calibration = Calibration(data=DataSource(source="x.jsonl", format="text"), max_length=32)
    ways = [
        lambda: prune_checkpoint(own_code, tmp_path / "a", Prune(), calibration, unit="neurons", goal=20_000, seed=0),
        lambda: load_teacher(plain, RecoverStage(method="distil", teacher=str(own_code)), job(tmp_path)),
    ]
    ways += [lambda: evaluate_checkpoint(own_code, tmp_path / "b", settings.evaluate, seed=0)]
    if "own" in (own_code / "config.json").read_text():
        ways += [lambda: forecast(settings), lambda: load(own_code)]
    else:
        ways += [lambda: load_tokenizer(own_code)]
    for way in ways:
        with pytest.raises(InputError, match=REFUSED):
            way()


def test_a_known_family_that_names_code_too_is_loaded_without_it(plain, tmp_path):
    """Phi-3's checkpoints on the hub do so."""
    folder = tmp_path / "phi"
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    (folder / "own.py").write_text(CODE)
    assert pretrained.causal_lm(folder).num_parameters() == build("llama").num_parameters()
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "fields", [{"model_type": "no_such_type"}, {"eos_token_id": "a"}, {"id2label": 5}, {"num_labels": "x"}]
)
def test_a_config_that_transformers_refuses_is_wrong_input(plain, tmp_path, fields):
    folder = tmp_path / "broken"
    shutil.copytree(plain, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | fields))
    with pytest.raises(InputError, match=r"model\.path: transformers cannot read config\.json in .*broken"):
        pretrained.config(folder)
    if "model_type" not in fields:
        with pytest.raises(InputError, match=r"transformers cannot read"):
            import_checkpoint(str(folder), None, tmp_path / "out")


def test_no_other_module_loads_by_itself():
    """Each call of from_pretrained is in ptl/model/pretrained.py, but one of a script for another Python."""
    calls = {
        path.name
        for path in (ROOT / "ptl").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
    }
    assert calls == {"pretrained.py", "quantize.py"}
    script = (ROOT / "ptl/export/quantize.py").read_text()
    assert "trust_remote_code=False" in script and "use_safetensors=True" in script
    assert (ROOT / "ptl/evaluation/language_models.py").read_text().count("trust_remote_code=False") == 2
