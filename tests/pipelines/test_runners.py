"""The local runner on a small pipeline of its own: tasks that share a definition keep their own outputs."""

import importlib.util
import json
import os
import tempfile
from types import SimpleNamespace

import pytest
from kfp import compiler, dsl
from kfp.dsl import Artifact, Input, Output

from pipelines.prune_tune_loop.compact import compact
from pipelines.prune_tune_loop.runners import IMPORTED, RunnerJob, run_subprocess
from ptl.config.run import Config
from ptl.errors import WorkError


@dsl.component(install_kfp_package=False)
def write(text: str, out: Output[Artifact]):
    from pathlib import Path

    Path(out.path).write_text(text)


@dsl.component(install_kfp_package=False)
def read(early: Input[Artifact], late: Input[Artifact], target: str):
    import json
    from pathlib import Path

    Path(target).write_text(json.dumps([Path(each.path).read_text() for each in (early, late)]))


@dsl.component(install_kfp_package=False)
def dies():
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("module", IMPORTED)
def test_the_modules_that_are_imported_once_exist(module):
    """The fork server passes over those that do not."""
    assert importlib.util.find_spec(module)


def test_a_killed_process_is_reported_as_such(tmp_path):
    """Not the one of the work, whose death its supervisor reports: the supervisor itself."""

    @dsl.pipeline
    def small():
        dies()

    path = tmp_path / "pipeline.yaml"
    compiler.Compiler().compile(small, str(path))
    with pytest.raises(WorkError, match=r"'dies'\. Its process left no reason, as when it is killed") as caught:
        run_subprocess(RunnerJob(Config.model_construct(), path, tmp_path, {}, "", ("dies",)))
    assert "\x1b" not in str(caught.value)


def test_a_path_with_the_interpreters_name_in_it_stays_as_it_is(tmp_path):
    """As the examples of an installed package have it: lib/python3.11/site-packages."""
    folder = tmp_path / "python3"
    folder.mkdir()

    @dsl.pipeline
    def small():
        one = write(text="/lib/python3.11")
        read(early=one.outputs["out"], late=one.outputs["out"], target=str(folder / "result.json"))

    path = tmp_path / "pipeline.yaml"
    compiler.Compiler().compile(small, str(path))
    run_subprocess(RunnerJob(Config.model_construct(), path, folder, {}, "", ("write", "read")))
    assert json.loads((folder / "result.json").read_text()) == ["/lib/python3.11"] * 2


def test_a_result_of_an_earlier_command_is_not_taken_for_one_of_this(tmp_path):
    """As in a run that is resumed for a form that is missing."""

    @dsl.pipeline
    def small():
        write(text="not the result")

    (tmp_path / "result.json").write_text("{}")
    path = tmp_path / "pipeline.yaml"
    compiler.Compiler().compile(small, str(path))
    with pytest.raises(WorkError, match="the steps ended without a result"):
        run_subprocess(RunnerJob(Config.model_construct(), path, tmp_path, {}, "", ("write",)))


def test_an_early_output_outlasts_later_tasks_of_the_same_kind(tmp_path):
    """The control takes the model of import-model, after other steps of its kind have written theirs."""

    @dsl.pipeline
    def small():
        early = write(text="early")
        late = write(text="late").after(early)
        read(early=early.outputs["out"], late=late.outputs["out"], target=str(tmp_path / "result.json"))

    path = tmp_path / "pipeline.yaml"
    compiler.Compiler().compile(small, str(path))
    compact(path)
    assert "comp-write:" in path.read_text() and "comp-write-2" not in path.read_text()
    run_subprocess(RunnerJob(Config.model_construct(), path, tmp_path, {}, "", ("write", "write-2", "read")))
    assert json.loads((tmp_path / "result.json").read_text()) == ["early", "late"]


def test_nothing_temporary_is_left_by_a_run_nor_by_a_killed_one(tmp_path, monkeypatch):
    """KFP leaves its folders, and a killed step all that it has."""

    @dsl.pipeline
    def small():
        dies()

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    path = tmp_path / "pipeline.yaml"
    compiler.Compiler().compile(small, str(path))
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # as if it were killed
    job = RunnerJob(Config.model_construct(), path, tmp_path / "run", {}, "", ("dies",))
    with pytest.raises(WorkError, match="left no reason"):
        run_subprocess(job)
    # multiprocessing removes the folder of its socket when this process ends.
    assert len([path for path in temporary.iterdir() if not path.name.startswith("pymp-")]) == 1
    monkeypatch.undo()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with pytest.raises(WorkError, match="left no reason"):
        run_subprocess(job)
    assert not [path for path in temporary.iterdir() if not path.name.startswith("pymp-")]
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(temporary)


def test_a_step_that_fails_on_a_full_disk_names_it(tmp_path, monkeypatch):
    @dsl.component(install_kfp_package=False)
    def fails():
        raise AttributeError("module has no attribute 'prune'")

    @dsl.pipeline
    def small():
        fails()

    path = tmp_path / "pipeline.yaml"
    compiler.Compiler().compile(small, str(path))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(WorkError, match=r"no space left while writing .*/ptl-command-[\w-]+: .* set TMPDIR to"):
        run_subprocess(RunnerJob(Config.model_construct(), path, tmp_path, {}, "", ("fails",)))
