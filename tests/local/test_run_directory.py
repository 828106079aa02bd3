"""Run directories: one command at a time, and what a crash has left of one is no obstacle."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from ptl import processes
from ptl.config.run import Config, check, load_config
from ptl.errors import InputError, WorkError
from ptl.local import run_directory
from ptl.local.run_directory import RunDir, open_run, working

TINY = Path(__file__).parents[2] / "pipelines/prune_tune_loop/configs/tiny.yaml"


@pytest.fixture(scope="module")
def config():
    return load_config(TINY)


def test_a_run_is_executed_once_at_a_time(tmp_path, config):
    run, _ = open_run(tmp_path, config, None, False)
    with working(run, config):
        again, resumed = open_run(tmp_path, config, None, False)
        assert resumed and again.path == run.path
        with pytest.raises(InputError, match=r"another process executes it .*--new"), working(again, config):
            raise AssertionError("two at once")
    with working(again, config):
        assert (tmp_path / "latest").resolve() == run.path


def test_the_link_to_the_latest_run_names_the_run_that_it_points_to(tmp_path, config):
    run, _ = open_run(tmp_path, config, None, False)
    with working(run, config):
        pass
    again, resumed = open_run(tmp_path, config, tmp_path / "latest", False)
    assert resumed and again.run_id == run.run_id
    with working(again, config):
        assert (tmp_path / "latest").resolve() == run.path


def test_it_waits_for_steps_that_a_killed_command_left_and_names_one_that_does_not_end(tmp_path, config, monkeypatch):
    run, _ = open_run(tmp_path, config, None, False)
    monkeypatch.setattr(run_directory, "END_SECONDS", 0.1)
    refusal = pytest.raises(InputError, match=r"step recover-1 of run .*process id \d+.*kill \d+")
    left = processes.exclusive(run.scratch / "recover-1.lock", "the step of the killed command")
    with left, refusal, working(run, config):
        raise AssertionError("two writers")
    with working(run, config):
        pass


def test_what_does_not_end_by_itself_is_ended_before_it_is_waited_for(tmp_path, config, monkeypatch):
    """As a paused container of a killed command, which holds its step's lock."""
    run, _ = open_run(tmp_path, config, None, False)
    monkeypatch.setattr(run_directory, "END_SECONDS", 0.1)
    left = processes.exclusive(run.scratch / "recover-1.lock", "the step of the killed command")
    left.__enter__()
    with working(run, config, lambda folder: left.__exit__(None, None, None) if folder == run.path else None):
        assert (run.path / "config.yaml").is_file()


def test_a_lifeline_of_an_earlier_command_is_cut(tmp_path, config):
    run, _ = open_run(tmp_path, config, None, False)
    run.path.mkdir(parents=True)
    earlier = replace(run, launch="killed").lifeline
    earlier.touch()
    with working(run, config):
        assert not earlier.exists() and run.lifeline.exists()
    assert not run.lifeline.exists()


@pytest.mark.parametrize("left", ["", "name: [", "- a list", "name: ti"], ids=["empty", "no-yaml", "list", "truncated"])
def test_a_half_written_config_is_written_anew(left, tmp_path, config):
    chosen = tmp_path / "mine"
    chosen.mkdir()
    (chosen / "lock").touch()
    (chosen / "config.yaml").write_text(left)
    run, resumed = open_run(tmp_path, config, chosen, False)
    assert not resumed
    with working(run, config):
        assert yaml.safe_load((chosen / "config.yaml").read_text())["name"] == config.name


def test_a_directory_that_a_command_has_only_locked_is_taken(tmp_path, config):
    chosen = tmp_path / "mine"
    chosen.mkdir()
    (chosen / "lock").touch()
    run, resumed = open_run(tmp_path, config, chosen, False)
    assert run.path == chosen and not resumed
    (chosen / "lock").unlink()
    (chosen / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds no run"):
        open_run(tmp_path, config, chosen, False)


def test_a_damaged_run_of_this_name_does_not_stop_new_ones(tmp_path, config):
    damaged = tmp_path / "runs" / f"{config.name}-20200101-000000-aaaa"
    damaged.mkdir(parents=True)
    (damaged / "config.yaml").write_bytes(b"name: \xff [")
    run, resumed = open_run(tmp_path, config, None, False)
    assert not resumed and run.path != damaged


@pytest.mark.parametrize("failed", ["", "no tokenizer"], ids=["made", "failed"])
def test_a_run_without_one_of_its_forms_is_resumed_though_it_has_a_result(failed, tmp_path, config):
    config = with_exports(config, {"type": "q8_0"}, {"type": "q4_0"})
    run, _ = open_run(tmp_path, config, None, False)
    with working(run, config):
        run.result.write_text(result(q8_0="", q4_0=failed))
    assert run_directory.missing_exports(run.path, config) == ({"export-gguf-q4-0": failed} if failed else {})
    again, resumed = open_run(tmp_path, config, None, False)
    assert resumed == bool(failed) and (again.path == run.path) == bool(failed)
    # The form itself may be corrected in its run.
    _, resumed = open_run(tmp_path, with_exports(config, {"type": "q8_0"}, {"type": "q4_0", "limit": 5}), None, False)
    assert resumed == bool(failed)


def test_a_damaged_result_does_not_stop_new_runs_and_is_written_again(tmp_path, config):
    run, _ = open_run(tmp_path, config, None, False)
    with working(run, config):
        run.result.write_text('{"exports": [')
    again, resumed = open_run(tmp_path, config, None, False)
    assert resumed and again.path == run.path and run_directory.missing_exports(run.path, config) == {}


def result(**failed):
    exports = [{"step": f"export-gguf-{type.replace('_', '-')}", "failed": reason} for type, reason in failed.items()]
    return json.dumps({"exports": exports})


def with_exports(config, *forms):
    return check(Config, config.model_dump() | {"export": [{"format": "gguf", **form} for form in forms]}, "config")


def test_an_export_is_added_to_the_run_that_lacks_it(tmp_path, config):
    run, _ = open_run(tmp_path, with_exports(config, {"type": "q8_0"}), None, False)
    with working(run, with_exports(config, {"type": "q8_0"})):
        pass
    more = with_exports(config, {"type": "q8_0"}, {"type": "q4_0", "limit": 200})
    again, resumed = open_run(tmp_path, more, None, False)
    assert resumed and (again.path, again.earlier) == (run.path, ())

    run.result.write_text(result(q8_0=""))
    assert not open_run(tmp_path, more, None, True)[1]
    again, resumed = open_run(tmp_path, more, None, False)
    assert resumed and (again.path, again.earlier) == (run.path, ())
    with working(again, more):
        pass
    # The step did not come to its end.
    assert run_directory.missing_exports(run.path, more) == {"export-gguf-q4-0": run_directory.NOT_TRIED}
    third, resumed = open_run(tmp_path, more, None, False)
    assert resumed and third.path == run.path
    # Of two finished runs the newest counts.
    run.result.write_text(result(q8_0="", q4_0=""))
    assert not open_run(tmp_path, more, None, False)[1]


def test_another_run_says_in_what_it_differs(tmp_path, config):
    run, _ = open_run(tmp_path, config, None, False)
    with working(run, config):
        pass
    run.result.write_text(result())
    other = check(Config, with_exports(config, {"type": "q8_0"}).model_dump() | {"seed": 1}, "config")
    with pytest.raises(InputError, match=r"differs from this config in seed;"):
        open_run(tmp_path, other, run.path, False)


def test_a_failure_that_was_left_is_read(tmp_path, config):
    run = RunDir(tmp_path, tmp_path)
    assert run_directory.step_error(run) is None
    (tmp_path / "error.json").write_text(json.dumps({"step": "prune-1", "message": "away", "exit_code": 1}))
    error = run_directory.step_error(run)
    assert str(error) == "prune-1: away" and isinstance(error, WorkError)


@pytest.mark.parametrize("name", ["my run", "..", "x" * 129], ids=["space", "parent", "long"])
def test_a_directory_whose_name_cannot_name_a_run_is_refused_before_any_work(tmp_path, config, name):
    with pytest.raises(InputError, match=r"--run-dir: .* must be"):
        open_run(tmp_path, config, tmp_path / name, False)
