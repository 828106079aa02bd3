"""Run directories: one command at a time, and what a crash has left of one is no obstacle."""

import json
from dataclasses import replace

import pytest
import yaml
from checkout import TINY

from ptl import processes
from ptl.config.run import Config, check, load_config
from ptl.errors import InputError, WorkError
from ptl.local import run_directory, runs
from ptl.local.run_directory import missing_exports, open_run, working


@pytest.fixture(scope="module")
def config():
    return load_config(TINY)


def changed(config, **fields):
    return check(Config, config.model_dump() | fields, "config")


def with_exports(config, *forms):
    return changed(config, export=[{"format": "gguf", **form} for form in forms])


def result(**failed):
    exports = [
        {"step": f"export-gguf-{type.replace('_', '-')}", "failed": reason}
        for type, reason in failed.items()
    ]
    return json.dumps({"exports": exports})


def test_a_run_is_executed_once_at_a_time(tmp_path, config):
    run, _ = open_run(tmp_path, config, False)
    with working(run, config):
        again, resumed = open_run(tmp_path, config, False)
        assert resumed and again.path == run.path
        with (
            pytest.raises(InputError, match=r"another process executes it .*--new"),
            working(again, config),
        ):
            raise AssertionError("two at once")
        assert yaml.safe_load((run.path / "config.yaml").read_text()) == config.model_dump(
            mode="json"
        )
    # Resources may differ, and images, whose tag is ptl's version; there is a link to the latest run.
    resources, images = (
        config.resources.model_dump() | {"retries": 5},
        config.images.model_dump() | {"tag": "0.0.1"},
    )
    more = changed(config, resources=resources, images=images)
    again, resumed = open_run(tmp_path, more, False)
    assert resumed and again.run_id == run.run_id
    with working(again, config):
        assert (tmp_path / "latest").resolve() == run.path
    # Each command gives the steps new attempts.
    variables = [runs.environment(command, {}) for command in (run, again)]
    assert [each["PTL_RUN_ID"] for each in variables] == [run.run_id, run.run_id]
    assert [each["PTL_LAUNCH"] for each in variables] == [
        run.launch,
        again.launch,
    ] and run.launch != again.launch


def test_the_newest_unfinished_run_is_resumed_and_others_of_its_name_are_known(tmp_path, config):
    other, longer = (changed(config, **field) for field in ({"seed": 1}, {"name": "tiny-more"}))
    begun = {
        "tiny-1": config,
        "tiny-2": config,
        "tiny-3": other,
        "tiny-4": other,
        "tiny-more-5": longer,
    }
    texts = {name: run_directory.dump(of_run).encode() for name, of_run in begun.items()}
    left = (b"name: \xff [", b"", b"name: [", b"- a list", b"name: ti")  # by a crash: no obstacle
    texts |= {f"tiny-{number}": text for number, text in enumerate(left, 6)}
    for name, text in texts.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_bytes(text)
    for finished, resumed, earlier in (
        (None, "tiny-2", ("tiny-4", "tiny-3")),
        ("tiny-4", "tiny-2", ("tiny-3",)),
        ("tiny-2", "tiny-1", ("tiny-3",)),
        ("tiny-1", None, ("tiny-3",)),
    ):
        if finished:
            (tmp_path / "runs" / finished / "result.json").write_text(result())
        run, again = open_run(tmp_path, config, False)
        assert (again, run.earlier) == (resumed is not None, earlier)
        assert run.run_id == resumed if again else run.run_id not in texts
    assert open_run(tmp_path, other, True)[0].earlier == ()  # it is to begin anew
    # Of finished runs the newest counts, which lacks no export here.
    (tmp_path / "runs/tiny-2/result.json").write_text(result(q8_0=""))
    assert not open_run(tmp_path, with_exports(config, {"type": "q8_0"}), False)[1]


def test_what_a_killed_command_left_ends_before_the_next_one_begins(tmp_path, config, monkeypatch):
    run, _ = open_run(tmp_path, config, False)
    monkeypatch.setattr(run_directory, "END_SECONDS", 0.1)
    left = processes.exclusive(run.scratch / "recover-1.lock", "the step of the killed command")
    left.__enter__()
    earlier = replace(run, launch="killed").lifeline
    earlier.touch()
    assert run_directory.step_error(run) is None
    for code, kind in ((2, InputError), (137, WorkError)):
        (run.path / "error.json").write_text(
            json.dumps({"step": "prune-1", "message": "away", "exit_code": code})
        )
        error = run_directory.step_error(run)
        assert str(error) == "prune-1: away" and type(error) is kind
    refusal = pytest.raises(InputError, match=r"step recover-1 of run .*process id \d+.*kill \d+")
    with refusal, working(run, config):
        raise AssertionError("two writers")
    # What does not end by itself, as a paused container, is ended before it is waited for.
    with working(
        run, config, lambda folder: left.__exit__(None, None, None) if folder == run.path else None
    ):
        assert (run.path / "config.yaml").is_file() and run.lifeline.exists()
        assert run_directory.step_error(run) is None
    assert not earlier.exists() and not run.lifeline.exists()


def test_a_run_that_lacks_an_export_is_resumed_though_it_has_a_result(tmp_path, config):
    one = with_exports(config, {"type": "q8_0"})
    more = with_exports(config, {"type": "q8_0"}, {"type": "q4_0", "limit": 200})
    run, _ = open_run(tmp_path, one, False)
    with working(run, one):
        pass

    def opened(config, fresh=False):
        again, resumed = open_run(tmp_path, config, fresh)
        assert (again.path == run.path) == resumed and again.earlier == ()
        return resumed

    # The export is not that of another run, and the run not one that is to be taken over.
    for written, missing in (
        ("", {}),
        ('{"exports": [', {}),  # damaged: it is written again
        (result(q8_0=""), {"export-gguf-q4-0": run_directory.NOT_TRIED}),
        (result(q8_0="", q4_0="no tokenizer"), {"export-gguf-q4-0": "no tokenizer"}),
    ):
        run.result.write_text(written)
        assert missing_exports(run.path, more) == missing
        assert opened(more) and not opened(more, fresh=True), written
    run.result.write_text(result(q8_0="", q4_0=""))
    assert missing_exports(run.path, more) == {} and not opened(more)
