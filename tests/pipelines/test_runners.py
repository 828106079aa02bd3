"""The local runner on small pipelines of its own: tasks that share a definition keep their own outputs."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from checkout import TINY
from kfp import compiler, dsl
from kfp.dsl import Artifact, Input, Output
from whole_run import Run

from pipelines.prune_tune_loop.compact import compact
from pipelines.prune_tune_loop.runners import RunnerJob, _logged, run_subprocess
from ptl.config.run import Config
from ptl.errors import WorkError

pytestmark = pytest.mark.xdist_group("loop")  # whose worker has a server of forks


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


def job(folder, tasks, *steps):
    """A run of a pipeline whose tasks a function makes, one after the other."""
    path = folder / "pipeline.yaml"
    compiler.Compiler().compile(dsl.pipeline(name="small")(tasks), str(path))
    return RunnerJob(Config.model_construct(), path, folder, {}, "", steps)


def test_an_early_output_outlasts_later_tasks_of_the_same_kind(tmp_path):
    """The control takes the model of import-model, after other steps of its kind have written theirs.

    A path with the interpreter's name in it stays as it is, as of an installed package: lib/python3.11/site-packages.
    """
    folder = tmp_path / "python3"
    folder.mkdir()

    def small():
        early = write(text="/lib/python3.11")
        late = write(text="late").after(early)
        read(
            early=early.outputs["out"], late=late.outputs["out"], target=str(folder / "result.json")
        )

    made = job(folder, small, "write", "write-2", "read")
    compact(made.pipeline)
    assert (
        "comp-write:" in made.pipeline.read_text()
        and "comp-write-2" not in made.pipeline.read_text()
    )
    run_subprocess(made)
    assert json.loads((folder / "result.json").read_text()) == ["/lib/python3.11", "late"]


def test_nothing_temporary_is_left_by_a_run_nor_by_a_killed_one(tmp_path, monkeypatch):
    """KFP leaves its folders, and a killed step all that it has. It is the step's supervisor that is killed here."""

    def small():
        dies()

    def left():
        # multiprocessing removes the folder of its socket when this process ends.
        return [path.name for path in temporary.iterdir() if not path.name.startswith("pymp-")]

    killed, temporary = job(tmp_path, small, "dies"), tmp_path / "temporary"
    temporary.mkdir()
    # from here on the process runs from which steps fork, with files of its own
    with pytest.raises(WorkError):
        run_subprocess(killed)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with (
        monkeypatch.context() as command,
        pytest.raises(WorkError, match="left no reason, as when it is killed"),
    ):
        command.setattr("shutil.rmtree", lambda *_, **__: None)  # as if the command were killed
        run_subprocess(killed)
    assert len(left()) == 1
    with pytest.raises(WorkError, match="left no reason"):
        run_subprocess(killed)
    assert left() == []
    free = {str(tmp_path): 0}  # as if that disk were full
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: SimpleNamespace(free=free.get(str(path), 1 << 30))
    )
    with pytest.raises(WorkError, match=f"no space left while writing {tmp_path}"):
        run_subprocess(killed)


def test_the_terminal_shows_lines_of_progress_and_the_log_everything(tmp_path, capsys):
    log, printed = (
        tmp_path / "log.txt",
        "loading\nptl: prune-1: started\nan answer is ptl: 4\n  ptl: prune-1: done\n",
    )
    log.write_text("an earlier command\n")
    with _logged(log, False):
        for piece in (printed[:10], printed[10:15], printed[15:]):
            print(piece, end="")
    assert capsys.readouterr().out == "prune-1: started\nprune-1: done\n"
    assert log.read_text() == f"an earlier command\n{printed}"


def test_ctrl_c_while_the_process_that_tasks_are_forked_from_starts(tmp_path):
    run = Run(TINY, tmp_path)
    command = psutil.Process(run.process.pid)

    def imports():
        """Whether that process has loaded the first of torch's libraries."""
        processes = [
            child
            for child in command.children()
            if "multiprocessing.forkserver" in " ".join(child.cmdline())
        ]
        return any("torch" in file.path for process in processes for file in process.memory_maps())

    run.wait_for(imports)
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    run.end(128 + signal.SIGINT)
    assert "interrupted by SIGINT: run the same command again to resume" in run.output
    assert "Traceback" not in run.output, run.output


BAR = """
import sys
from ptl.steps import bars
if sys.argv[1:] == ["forked"]:
    import os, tqdm  # before the process knows its step
    os.environ.clear()
bars.name("answers")
from tqdm import tqdm
bar = tqdm(total=100, initial=10, desc="answering", smoothing=0)
bar.start_t -= 20
bar.update(10)
bar.close()
"""


@pytest.mark.parametrize("origin", ["started", "forked"])
def test_the_bars_of_libraries_are_lines_of_progress_of_their_step(tmp_path, capsys, origin):
    at_once = os.environ | {"TQDM_DELAY": "0", "TQDM_MININTERVAL": "0"}
    command = [sys.executable, "-c", BAR, origin]
    bar = subprocess.run(command, env=at_once, capture_output=True, text=True, check=True).stderr
    with _logged(tmp_path / "log.txt", False):
        print(bar, end="")
    # The next one after 30 s; its clock is that of a training's bar.
    assert capsys.readouterr().out == "answers: [#---------] 10% ? left, answering: 10 of 100\n"
    assert "answers: [##--------] 20% 2 min 40 s left, answering: 20 of 100\n" in bar
