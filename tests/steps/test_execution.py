"""Steps that are not repeated, those whose files were damaged, and those taken over from another run."""

import dataclasses
import os
import shutil
import uuid
from pathlib import Path

import pytest
from mlflow import MlflowClient
from run_records import scores
from working import execute, fetch

from ptl import processes
from ptl.config.recover import DataSource, RecoverStage
from ptl.config.run import Evaluate, ModelSource, check, load_config
from ptl.errors import InputError, WorkError
from ptl.evaluation.evaluate import read_items
from ptl.lineage import mlflow_client, run_status, tracking
from ptl.steps import call, evaluate, import_model, process, recover, table
from ptl.steps.call import Call, key_of
from ptl.steps.step import Step, scratch
from ptl.storage import store
from ptl.storage.local_files import path_of
from ptl.storage.store import Pointer, Record

TINY = Path(__file__).parents[2] / "pipelines/prune_tune_loop/configs/tiny.yaml"


@pytest.fixture
def begin(tmp_path, mlflow_folder, monkeypatch):
    """Begin a pipeline run, or continue one."""
    for name in ("KFP_RUN_ID", "PTL_RETRIES", "PTL_LAUNCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlflow_folder}/mlflow.db")
    monkeypatch.setenv("PTL_ARTIFACT_ROOT", f"file://{tmp_path}/artifacts")
    experiment = f"execution-{uuid.uuid4().hex[:8]}"

    def run(name=None, earlier=""):
        name = name or f"run-{uuid.uuid4().hex[:8]}"
        monkeypatch.setenv("PTL_RUN_ID", name)
        monkeypatch.setenv("PTL_SCRATCH", str(tmp_path / name))
        if earlier:  # as import-model does
            tracking.name_earlier_runs(Call("import-model", experiment).start(), earlier.split())
        return name, experiment

    return run


class Work:
    """Fills the folder with `data`, and counts how often."""

    def __init__(self, data=b"weights"):
        self.data, self.done = data, 0

    def __call__(self, _src, dst, _run):
        self.done += 1
        (dst / "model.safetensors").write_bytes(self.data)
        return {"params": 1, "tokens": 8, "steps": 1}


def flip(pointer):
    path = path_of(pointer.uri) / "model.safetensors"
    path.write_bytes(b"W" + path.read_bytes()[1:])


def test_a_damaged_checkpoint_names_its_step_and_file_and_the_next_command_makes_it_again(begin, capsys):
    step, work = Call("prune-1", begin()[1]), Work()
    before = execute(step, None, {}, work)
    pointer, run = before.pointer, step.start()
    flip(pointer)
    with pytest.raises(WorkError, match=r"file model\.safetensors.*run the same command again.*checks step prune-1"):
        fetch(step, pointer)
    assert store.committed(run.root, run.run, "prune-1").damaged
    assert execute(step, None, {}, work).pointer == pointer and work.done == 2
    assert "done again, since its files are damaged" in capsys.readouterr().out
    assert (fetch(step, pointer) / "model.safetensors").read_bytes() == b"weights"
    execute(step, None, {}, work)
    assert work.done == 2 and "taken as it is" in capsys.readouterr().out


def test_a_deleted_checkpoint_is_made_again_too(begin):
    step, work = Call("prune-1", begin()[1]), Work()
    pointer = execute(step, None, {}, work).pointer
    shutil.rmtree(path_of(pointer.uri))
    with pytest.raises(WorkError, match="is gone"):
        fetch(step, pointer)
    execute(step, None, {}, work)
    assert work.done == 2 and fetch(step, pointer).is_dir()


def test_a_checkpoint_that_could_not_be_fetched_for_a_while_is_only_checked(begin, capsys):
    step, work = Call("prune-1", begin()[1]), Work()
    record = execute(step, None, {}, work)
    folder = path_of(record.pointer.uri)
    away = folder.rename(folder.with_name("away"))
    with pytest.raises(WorkError):
        fetch(step, record.pointer)
    away.rename(folder)
    execute(step, None, {}, work)
    assert work.done == 1 and "its files were verified" in capsys.readouterr().out


def test_other_bytes_never_take_the_place_of_damaged_ones(begin):
    step = Call("prune-1", begin()[1])
    record = execute(step, None, {}, Work())
    flip(record.pointer)
    with pytest.raises(WorkError):
        fetch(step, record.pointer)
    with pytest.raises(WorkError, match=r"prune-1: its files are damaged, and doing it again gave others.*--new"):
        execute(step, None, {}, Work(b"others"))
    assert execute(step, None, {}, Work()).pointer == record.pointer


def test_a_step_with_the_same_inputs_and_settings_is_taken_over(begin, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("{}")

    def prune(work, **changed):
        return execute(step, None, {"goal": 10, "data": DataSource(source=str(data))} | changed, work)

    earlier, experiment = begin()
    step, work = Call("prune-1", experiment), Work()
    first = prune(work)
    begin(earlier=f"unknown {earlier}")
    second = prune(work)
    assert work.done == 1 and f"taken over from run {earlier}" in capsys.readouterr().out
    assert second.pointer.digest == first.pointer.digest
    assert second.pointer.uri != first.pointer.uri  # neither run needs the other
    run = mlflow_client.connect().get_run(second.pointer.run_id)
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
    # The same bytes are the same file: in an image that was built again, and on another node.
    begin(earlier=earlier)
    data.unlink()
    data.write_text("{}")
    os.utime(data, (1, 1))
    assert prune(work).key == first.key and work.done == 4


def test_a_file_that_changes_repeats_the_steps_that_read_it(begin, tmp_path, capsys):
    data, other = (DataSource(source=str(tmp_path / name)) for name in ("train.jsonl", "benchmark.jsonl"))
    for source in (data, other):
        Path(source.source).write_text("{}")
    _, experiment = begin()
    recover, prune = Call("recover-1", experiment), Call("prune-1", experiment)
    trained, scored = Work(), Work()

    def both():
        return execute(recover, None, {"training": [data]}, trained), execute(prune, None, {"data": other}, scored)

    before = both()
    Path(data.source).write_text("{1}")
    trained.data = b"other weights"
    after = both()
    assert (trained.done, scored.done) == (2, 1) and after[1] == before[1]
    assert after[0].pointer.digest != before[0].pointer.digest
    said = capsys.readouterr().out
    assert f"recover-1: {data.source} has changed since it was done: it is done again" in said
    assert str(other.source) not in said
    # The new record is the step's, and a mere touch changes nothing.
    os.utime(data.source, (1, 1))
    assert both() == after and trained.done == 2


def test_a_killed_repetition_leaves_no_result_of_the_old_file(begin, tmp_path):
    data = DataSource(source=str(tmp_path / "train.jsonl"))
    Path(data.source).write_text("{}")
    step = Call("recover-1", begin()[1])

    def dies(*_):
        raise RuntimeError("killed")

    execute(step, None, {"training": data}, Work())
    Path(data.source).write_text("{1}")
    with pytest.raises(RuntimeError):
        execute(step, None, {"training": data}, dies)
    run = step.start()
    assert store.committed(run.root, run.run, "recover-1") is None
    execute(step, None, {"training": data}, work := Work())
    assert work.done == 1 and store.committed(run.root, run.run, "recover-1").files.keys() == {data.source}


def test_a_finished_run_and_one_of_another_version_are_not_changed(begin, tmp_path, monkeypatch):
    data = DataSource(source=str(tmp_path / "train.jsonl"))
    Path(data.source).write_text("{}")
    step, settings = Call("recover-1", begin()[1]), {"training": data}
    record = execute(step, None, settings, Work())
    with monkeypatch.context() as newer:
        newer.setattr(call, "__version__", "0.0.9")
        with pytest.raises(InputError, match=r"recover-1 of run .*done by ptl .*this is ptl 0\.0\.9; resume the run"):
            execute(step, None, settings, Work())
    run = step.start()
    store.commit(run.root, run.run, "report", Record("report", record.pointer))
    Path(data.source).write_text("{1}")
    with pytest.raises(InputError, match=r"train\.jsonl has changed .*the run is finished; restore"):
        execute(step, None, settings, Work())
    Path(data.source).write_text("{}")
    assert execute(step, None, settings, Work()) == record


def test_steps_of_one_kind_read_the_same_data(begin, tmp_path):
    """On a cluster recover-1 is not started again: two iterations would train on two data sets."""
    data = DataSource(source=str(tmp_path / "train.jsonl"))
    Path(data.source).write_text("{}")
    _, experiment = begin()
    execute(Call("recover-1", experiment), None, {"training": data}, Work())
    Path(data.source).write_text("{1}")
    for step in ("recover-2", "control-recover"):
        with pytest.raises(InputError, match=r"train\.jsonl has changed since recover-1 was done.* start a new run"):
            execute(Call(step, experiment), None, {"training": data}, Work())
    execute(Call("prune-1", experiment), None, {"calibration": data}, Work())


def test_a_model_that_is_replaced_is_imported_again(begin, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    step, work = Call("import-model", begin()[1]), Work()
    first = execute(step, None, {"source": ModelSource(path=str(model))}, work)
    os.utime(model / "model.safetensors", (1, 1))
    again = execute(step, None, {"source": ModelSource(path=str(model))}, work)
    # Not by its content, which takes long: the same bytes have the same digest, so that nothing else is repeated.
    assert work.done == 2 and again.pointer.digest == first.pointer.digest
    assert f"{model}/model.safetensors has changed" in capsys.readouterr().out


def test_what_a_step_has_fetched_goes_when_it_is_committed(begin, s3, monkeypatch):
    monkeypatch.setenv("PTL_ARTIFACT_ROOT", s3.root.removesuffix("/ptl"))
    _, experiment = begin()
    parent = execute(Call("prune-1", experiment), None, {}, Work()).pointer

    def work(src, dst, _run):
        assert list(scratch("cache").iterdir()) and (src / "model.safetensors").read_bytes() == b"weights"
        return Work()(src, dst, _run)

    execute(Call("recover-1", experiment), parent, {}, work)
    assert not scratch("cache").exists()


def test_a_coordinator_takes_over_before_it_starts_nodes(begin, monkeypatch):
    earlier, experiment = begin()
    call = Call("recover-1", experiment)
    execute(call, None, {}, Work())
    monkeypatch.setattr("ptl.steps.step.is_coordinator", lambda: True)
    begin(earlier=earlier)
    with Step(call, key={}) as step:
        assert step.record is not None
    begin()
    with Step(call, key={}) as step:
        assert step.record is None
    assert (
        "ptl.attempt" not in mlflow_client.connect().get_run(step.run.run_id).data.tags
    )  # it may follow an earlier one


def test_a_teacher_s_files_are_part_of_the_key(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    stages = {"recover": (RecoverStage(method="distil", teacher=str(tmp_path)),)}
    before = key_of("sha256:parent", stages)
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert key_of("sha256:parent", stages) == before and len(before.files) == 1
    (tmp_path / "model.safetensors").write_bytes(b"others!")
    assert key_of("sha256:parent", stages).digest != before.digest


def test_a_loop_that_ends_earlier_than_before_leaves_no_later_results(begin):
    """Its later steps pass their input through: the report and `ptl gc` must not find what they did before."""
    _, experiment = begin()
    for name in ("prune-1", "prune-2", "prune-3"):
        execute(Call(name, experiment), None, {}, Work())
    step = Step(Call("evaluate-1", experiment), key={})
    run = step.run = step.call.start()
    evaluate._withdraw_later(step, 3)
    assert [bool(store.committed(run.root, run.run, f"prune-{i}")) for i in (1, 2, 3)] == [True, False, False]


def test_what_cannot_be_taken_over_is_done(begin, capsys):
    earlier, experiment = begin()
    step, work = Call("prune-1", experiment), Work()
    flip(execute(step, None, {}, work).pointer)
    begin(earlier=earlier)
    record = execute(step, None, {}, work)
    said = capsys.readouterr().out
    assert work.done == 2 and f"not taken over from run {earlier}: " in said and "same command" not in said
    assert (fetch(step, record.pointer) / "model.safetensors").read_bytes() == b"weights"


def test_a_watcher_reads_the_verdict_as_soon_as_an_evaluation_has_finished(begin, monkeypatch):
    """Else `evaluate-0: accuracy 0.998` is announced without it."""
    run, experiment = begin()
    execute(Call("import-model", experiment), None, {}, Work())
    model = execute(Call("prune-1", experiment), None, {}, Work()).pointer
    seen, finish = [], MlflowClient.set_terminated

    def finished(client, run_id, *status):
        finish(client, run_id, *status)
        seen.append(run_status.read(run).steps["evaluate-1"])

    def work(_src, dst, _run):
        (dst / "items.jsonl").write_text("")
        verdict = {"decision": "accepted"}
        return {"scores": scores(9, 0.5, 1), "verdict": verdict, "accepted": dataclasses.asdict(model)}

    monkeypatch.setattr(MlflowClient, "set_terminated", finished)
    execute(Call("evaluate-1", experiment), model, {}, work)
    assert [(step.status, step.accuracy, step.verdict) for step in seen] == [("FINISHED", "0.500", "accepted")]


def test_each_attempt_has_a_folder_of_its_own(begin):
    step, folders = Call("prune-1", begin()[1]), []

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
    assert [path.name for path in fetch(step, record.pointer).glob("half*")] == ["half"]


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
    step = Call("import-model", experiment)

    def work(*_):
        raise ValueError("no answer from https://user:secret@proxy/x")

    with pytest.raises(ValueError, match="no answer"):
        execute(step, None, {}, work)
    assert tracking.error_of(step.start()) == "ValueError: no answer from https://***@proxy/x"

    monkeypatch.setattr(process, "work", lambda _call: work())
    monkeypatch.setattr(processes, "die_with", lambda _parent: None)
    (tmp_path / "call.json").write_text("{}")
    with pytest.raises(SystemExit, match="1"):
        process.main(tmp_path / "call.json", 0)
    assert "secret" not in (tmp_path / "failure.json").read_text()


def test_a_recovery_finds_the_benchmarks_items_by_the_run_and_depends_on_them(begin, monkeypatch, capsys):
    """Other items are another training: it is neither resumed nor taken over."""

    class Stop(Exception):
        pass

    keys = []

    def fetch_nothing(step, _pointer):
        keys.append(step.key.digest)
        raise Stop

    config = load_config(TINY).model_dump(mode="json")
    model = Pointer("file:///pruned", "sha256:" + "c" * 64, params=9, original_params=9)
    settings = {name: config["schedule"][name] for name in ("iterations", "recovery_tokens", "tokens")}
    settings |= {"recover": config["recover"], "seed": 0}
    for limit, tasks in ((8, True), (8, True), (9, True), (9, False)):
        _, experiment = begin()
        if tasks:
            run = Call("import-model", experiment).start()
            evaluate = check(Evaluate, {"tasks": [config["evaluate"]["tasks"][0] | {"limit": limit}]}, "evaluate")
            for _ in range(2):  # the second finds the record
                import_model._commit_items(run, evaluate, 0)
            assert capsys.readouterr().out.count(f"{limit} items of benchmarks") == 1
            items = store.committed(run.root, run.run, "items").pointer
            assert len(read_items(store.fetch(items, scratch("cache")))) == limit
        data = config["training"] | {"decontaminate": {"tasks": tasks}}
        with monkeypatch.context() as patched, pytest.raises(Stop):
            patched.setattr(Step, "fetch", fetch_nothing)
            recover.recover(Call("recover-1", experiment, settings | {"training": data}, {"model": model}))
    assert keys[0] == keys[1] and len(set(keys)) == 3
