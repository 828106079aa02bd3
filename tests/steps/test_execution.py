"""Steps that are not repeated, those whose files were damaged, and those taken over from another run."""

import dataclasses
import shutil
import uuid
from pathlib import Path

import pytest
from mlflow import MlflowClient
from run_records import scores

from ptl import processes
from ptl.config.run import Evaluate, check, load_config
from ptl.errors import InputError, WorkError
from ptl.evaluation.evaluate import read_items
from ptl.lineage import mlflow_client, progress, tracking
from ptl.steps import import_model, inputs, process, recover, table, takeover
from ptl.steps.call import Call, Step
from ptl.steps.execution import execute
from ptl.steps.inputs import fetch
from ptl.steps.machine import scratch
from ptl.storage.local_files import path_of
from ptl.storage.store import Pointer

TINY = Path(__file__).parents[2] / "pipelines/prune_tune_loop/configs/tiny.yaml"


@pytest.fixture
def begin(tmp_path, mlflow_folder, monkeypatch):
    """Begin a pipeline run, or continue one."""
    for name in ("KFP_RUN_ID", "PTL_RETRIES", "PTL_LAUNCH", takeover.EARLIER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlflow_folder}/mlflow.db")
    monkeypatch.setenv("PTL_ARTIFACT_ROOT", f"file://{tmp_path}/artifacts")
    experiment = f"execution-{uuid.uuid4().hex[:8]}"

    def run(name=None, earlier=""):
        name = name or f"run-{uuid.uuid4().hex[:8]}"
        monkeypatch.setenv("PTL_RUN_ID", name)
        monkeypatch.setenv("PTL_SCRATCH", str(tmp_path / name))
        monkeypatch.setenv(takeover.EARLIER, earlier)
        return name, experiment

    return run


class Work:
    """Fills the folder with `data`, and counts how often."""

    def __init__(self, data=b"weights"):
        self.data, self.done = data, 0

    def __call__(self, _src, dst, _run):
        self.done += 1
        (dst / "model.safetensors").write_bytes(self.data)
        return {"params": 1}


def flip(pointer):
    path = path_of(pointer["uri"]) / "model.safetensors"
    path.write_bytes(b"W" + path.read_bytes()[1:])


def test_a_damaged_checkpoint_names_its_step_and_file_and_the_next_command_makes_it_again(begin, capsys):
    step, work = Step("prune-1", begin()[1]), Work()
    before = execute(step, None, {}, work)
    pointer = Pointer(**before["pointer"])
    flip(before["pointer"])
    with pytest.raises(WorkError, match=r"file model\.safetensors.*run the same command again.*checks step prune-1"):
        fetch(pointer)
    assert execute(step, None, {}, work) == before and work.done == 2
    assert "done again, since its files are damaged" in capsys.readouterr().out
    assert (fetch(pointer) / "model.safetensors").read_bytes() == b"weights"
    execute(step, None, {}, work)
    assert work.done == 2 and "taken as it is" in capsys.readouterr().out


def test_a_deleted_checkpoint_is_made_again_too(begin):
    step, work = Step("prune-1", begin()[1]), Work()
    pointer = Pointer(**execute(step, None, {}, work)["pointer"])
    shutil.rmtree(path_of(pointer.uri))
    with pytest.raises(WorkError, match="is gone"):
        fetch(pointer)
    execute(step, None, {}, work)
    assert work.done == 2 and fetch(pointer).is_dir()


def test_a_checkpoint_that_could_not_be_fetched_for_a_while_is_only_checked(begin, capsys):
    step, work = Step("prune-1", begin()[1]), Work()
    record = execute(step, None, {}, work)
    folder = path_of(record["pointer"]["uri"])
    away = folder.rename(folder.with_name("away"))
    with pytest.raises(WorkError):
        fetch(Pointer(**record["pointer"]))
    away.rename(folder)
    execute(step, None, {}, work)
    assert work.done == 1 and "its files were verified" in capsys.readouterr().out


def test_other_bytes_never_take_the_place_of_damaged_ones(begin):
    step = Step("prune-1", begin()[1])
    record = execute(step, None, {}, Work())
    flip(record["pointer"])
    with pytest.raises(WorkError):
        fetch(Pointer(**record["pointer"]))
    with pytest.raises(WorkError, match=r"prune-1: its files are damaged, and doing it again gave others.*--new"):
        execute(step, None, {}, Work(b"others"))
    assert execute(step, None, {}, Work()) == record


def test_a_step_with_the_same_inputs_and_settings_is_taken_over(begin, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("{}")

    def prune(work, **changed):
        settings = {"goal": 10, "source": str(data)} | changed
        return execute(step, None, settings, work, content_key=takeover.key("sha256:parent", settings))

    earlier, experiment = begin()
    step, work = Step("prune-1", experiment), Work()
    first = prune(work)
    begin(earlier=f"unknown {earlier}")
    second = prune(work)
    assert work.done == 1 and f"taken over from run {earlier}" in capsys.readouterr().out
    assert second["pointer"]["digest"] == first["pointer"]["digest"]
    assert second["pointer"]["uri"] != first["pointer"]["uri"]  # neither run needs the other
    run = mlflow_client.connect().get_run(second["pointer"]["run_id"])
    assert run.data.tags["ptl.taken_over_from"] == earlier and run.info.status == "FINISHED"
    begin(earlier=earlier)
    prune(work, goal=9)
    assert work.done == 2
    begin()
    prune(work)  # as with --new: no earlier run is named
    assert work.done == 3
    begin(earlier=earlier)
    data.write_text('{"corrected": 1}')
    prune(work)
    assert work.done == 4


def test_what_cannot_be_taken_over_is_done(begin, capsys):
    earlier, experiment = begin()
    step, work = Step("prune-1", experiment), Work()
    flip(execute(step, None, {}, work, content_key="key")["pointer"])
    begin(earlier=earlier)
    record = execute(step, None, {}, work, content_key="key")
    said = capsys.readouterr().out
    assert work.done == 2 and f"not taken over from run {earlier}: " in said and "same command" not in said
    assert (fetch(Pointer(**record["pointer"])) / "model.safetensors").read_bytes() == b"weights"


def test_a_watcher_reads_the_verdict_as_soon_as_an_evaluation_has_finished(begin, monkeypatch):
    """Else `evaluate-0: accuracy 0.998` is announced without it."""
    run, experiment = begin()
    execute(Step("import-model", experiment), None, {}, Work())
    model = Pointer(**execute(Step("prune-1", experiment), None, {}, Work())["pointer"])
    seen, finish = [], MlflowClient.set_terminated

    def finished(client, run_id, *status):
        finish(client, run_id, *status)
        seen.append(progress.read(run).steps["evaluate-1"])

    def work(_src, dst, _run):
        (dst / "items.jsonl").write_text("")
        verdict = {"decision": "accepted"}
        return {"scores": scores(9, 0.5, 1), "verdict": verdict, "accepted": dataclasses.asdict(model)}

    monkeypatch.setattr(MlflowClient, "set_terminated", finished)
    execute(Step("evaluate-1", experiment), model, {}, work)
    assert [(step.status, step.accuracy, step.verdict) for step in seen] == [("FINISHED", 0.5, "accepted")]


def test_each_attempt_has_a_folder_of_its_own(begin):
    step, folders = Step("prune-1", begin()[1]), []

    def dies(_src, dst, _run):
        folders.append(dst)
        (dst / "half").touch()
        if len(folders) == 1:
            raise RuntimeError("it died")
        return {"params": 1}

    with pytest.raises(RuntimeError):
        execute(step, None, {}, dies)
    record = execute(step, None, {}, dies)
    assert folders[0] != folders[1] and not folders[0].exists()
    assert [path.name for path in fetch(Pointer(**record["pointer"])).glob("half*")] == ["half"]


def test_a_step_that_another_process_works_on_is_refused(begin, monkeypatch):
    begin()
    monkeypatch.setattr(process, "WAIT", 0)
    monkeypatch.setitem(table.STEPS, "prune", lambda call: pytest.fail("two writers"))
    call = {"settings": {"step": "prune-1", "experiment": "e"}, "inputs": {}, "outputs": {}}
    refusal = pytest.raises(InputError, match=r"step prune-1: another process executes it \(process id \d+\)")
    with processes.exclusive(scratch("prune-1.lock"), "the orphan"), refusal:
        process.work(call)
    monkeypatch.setitem(table.STEPS, "prune", lambda call: None)
    assert process.work(call) == {}


def test_the_reason_of_a_failure_shows_no_login(begin, monkeypatch, tmp_path):
    _run, experiment = begin()
    step = Step("import-model", experiment)

    def work(*_):
        raise ValueError("no answer from https://user:secret@proxy/x")

    with pytest.raises(ValueError, match="no answer"):
        execute(step, None, {}, work)
    assert tracking.error_of(step.start()) == "ValueError: no answer from https://***@proxy/x"

    monkeypatch.setattr(process, "work", lambda _call: work())
    monkeypatch.setattr(processes, "die_with", lambda _parent: None)
    (tmp_path / "call.json").write_text("{}")
    with pytest.raises(ValueError, match="no answer"):
        process.main(tmp_path / "call.json", 0)
    assert "secret" not in (tmp_path / "failure.json").read_text()


def test_a_recovery_finds_the_benchmarks_items_by_the_run_and_depends_on_them(begin, monkeypatch, capsys):
    """Other items are another training: it is neither resumed nor taken over."""

    class Stop(Exception):
        pass

    keys = []

    def execute_nothing(*_, content_key, **__):
        keys.append(content_key)
        raise Stop

    monkeypatch.setattr(recover, "execute", execute_nothing)
    config = load_config(TINY).model_dump(mode="json")
    model = Pointer("file:///pruned", "sha256:" + "c" * 64, params=9, original_params=9)
    settings = {name: config["schedule"][name] for name in ("iterations", "recovery_tokens", "tokens")}
    settings |= {"recover": config["recover"], "seed": 0}
    for limit, tasks in ((8, True), (8, True), (9, True), (9, False)):
        _, experiment = begin()
        if tasks:
            run = Step("import-model", experiment).start()
            evaluate = check(Evaluate, {"tasks": [config["evaluate"]["tasks"][0] | {"limit": limit}]}, "evaluate")
            for _ in range(2):  # the second finds the record
                import_model._commit_items(run, evaluate, 0)
            assert capsys.readouterr().out.count(f"{limit} items of benchmarks") == 1
            assert len(read_items(fetch(inputs.benchmark_items(run)))) == limit
        data = config["training"] | {"decontaminate": {"tasks": tasks}}
        with pytest.raises(Stop):
            recover.recover(Call(Step("recover-1", experiment), settings | {"training": data}, {"model": model}, {}))
    assert keys[0] == keys[1] and len(set(keys)) == 3
