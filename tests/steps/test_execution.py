"""Steps that are not repeated, those whose files were damaged, and those taken over from another run."""

import dataclasses
import json
import os
import shutil
import uuid
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from checkout import EXAMPLE, TINY
from run_records import scores
from working import OpenedError, execute, fetch, run_locally

from ptl import processes
from ptl.config.data import DataSource
from ptl.config.recover import RecoverStage
from ptl.config.run import Evaluate, ModelSource, Task, check, load_config
from ptl.errors import InputError, WorkError
from ptl.evaluation.evaluate import read_items
from ptl.lineage import mlflow_client, tracking
from ptl.recovery.answers import AnswersReport
from ptl.steps import answers, call, evaluate, import_model, process, recover
from ptl.steps.call import Call, Output, key_of
from ptl.steps.step import Step, scratch
from ptl.storage import store
from ptl.storage.local_files import path_of
from ptl.storage.store import Pointer, Record

NOWHERE = Pointer("file:///x", "sha256:" + "c" * 64)


@pytest.fixture
def begin(tmp_path, mlflow_folder, monkeypatch):
    """Begin a pipeline run; returns its id and the experiment's name."""
    experiment = f"execution-{uuid.uuid4().hex[:8]}"

    def run(earlier=""):
        name = run_locally(monkeypatch, tmp_path, mlflow_folder)
        if earlier:  # as import-model does
            tracking.name_earlier_runs(Call("import-model", experiment).start(), earlier.split())
        return name, experiment

    return run


@pytest.fixture
def data(tmp_path):
    """A file that steps read."""
    (tmp_path / "train.jsonl").write_text("{}")
    return DataSource(source=str(tmp_path / "train.jsonl"))


class Work:
    """Fills the folder with `data`, and counts how often."""

    def __init__(self, data=b"weights"):
        self.data, self.done = data, 0

    def __call__(self, _src, dst, _run):
        self.done += 1
        (dst / "model.safetensors").write_bytes(self.data)
        return {"params": 1, "tokens": 8, "steps": 1}


def dies(*_):
    raise RuntimeError("it died")


def flip(pointer):
    path = path_of(pointer.uri) / "model.safetensors"
    path.write_bytes(b"W" + path.read_bytes()[1:])


def committed(step, name=None):
    run = step.start()
    return store.committed(run.root, run.run, name or step.step)


def test_a_damaged_checkpoint_names_its_step_and_file_and_the_next_command_makes_it_again(
    begin, monkeypatch
):
    run, experiment = begin()
    step, work = Call("prune-1", experiment), Work()
    pointer = execute(step, None, {}, work).pointer
    flip(pointer)
    with (
        monkeypatch.context() as cluster,
        pytest.raises(WorkError, match=r"file model\.safetensors"),
    ):
        cluster.delenv("PTL_RUN_ID")
        cluster.setenv("KFP_RUN_ID", run)
        fetch(step, pointer)  # there a finished step is not started again
    assert not committed(step).damaged
    with pytest.raises(
        WorkError, match=r"file model\.safetensors.*run the same command again.*checks step prune-1"
    ):
        fetch(step, pointer)
    assert committed(step).damaged
    # Other bytes never take the place of damaged ones, to which pointers lead.
    with pytest.raises(
        WorkError, match=r"prune-1: its files are damaged, and doing it again gave others.*--new"
    ):
        execute(step, None, {}, Work(b"others"))
    assert (path_of(pointer.uri) / "model.safetensors").read_bytes() == b"Weights"
    assert execute(step, None, {}, work).pointer == pointer and work.done == 2
    assert (fetch(step, pointer) / "model.safetensors").read_bytes() == b"weights"


def test_a_checkpoint_that_was_away_is_only_checked_and_one_that_is_gone_made_again(begin):
    step, work = Call("prune-1", begin()[1]), Work()
    folder = path_of(execute(step, None, {}, work).pointer.uri)
    for comes_back, done in ((True, 1), (False, 2)):
        pointer, away = committed(step).pointer, folder.rename(folder.with_name(f"away-{done}"))
        with pytest.raises(WorkError, match="is gone"):
            fetch(step, pointer)
        if comes_back:
            away.rename(folder)
        execute(step, None, {}, work)
        assert work.done == done and fetch(step, pointer).is_dir() and not committed(step).damaged


def test_a_step_is_found_by_all_that_it_depends_on(begin, data):
    """Its checkpoint, its settings, and the content of the files that these name; in its own run or an earlier one."""
    step, work = Call("prune-1", begin()[1]), Work()

    def prune(named, parent=None, **changed):
        begin(earlier=named)
        return execute(step, parent, {"goal": 10, "data": data} | changed, work)

    first = prune("")
    earlier = os.environ["PTL_RUN_ID"]
    second = prune(f"unknown {earlier}")
    assert work.done == 1 and second.pointer.digest == first.pointer.digest
    assert second.pointer.uri != first.pointer.uri  # neither run needs the other
    run = mlflow_client.connect().get_run(second.pointer.run_id)
    assert run.data.tags["ptl.taken_over_from"] == earlier and run.info.status == "FINISHED"
    prune(earlier, goal=9)
    prune(earlier, parent=first.pointer)
    prune("")  # as with --new
    assert work.done == 4
    Path(data.source).write_text('{"corrected": 1}')
    prune(earlier)
    assert work.done == 5
    # The same bytes are the same file: in an image that was built again, and on another node.
    Path(data.source).unlink()
    Path(data.source).write_text("{}")
    os.utime(data.source, (1, 1))
    assert prune(earlier).key == first.key and work.done == 5


def test_the_newest_earlier_run_comes_first_and_damaged_files_are_not_taken_over(begin):
    old, experiment = begin()
    step = Call("recover-1", experiment)
    execute(step, None, {}, Work(b"old"))
    new, _ = begin()
    newest = execute(step, None, {}, Work(b"weights")).pointer
    for expected in (b"weights", b"old"):
        begin(earlier=f"{new} {old}")
        record = execute(step, None, {}, dies)
        assert (path_of(record.pointer.uri) / "model.safetensors").read_bytes() == expected
        flip(newest)


def test_scores_are_taken_over_and_verdicts_are_not(begin):
    """A verdict names checkpoints of its own run."""
    earlier, experiment = begin()
    model = execute(Call("import-model", experiment), None, {}, Work()).pointer
    metadata = {"scores": scores(9, 0.5, 1), "scores_key": "s", "verdict": {"decision": "baseline"}}
    metadata["accepted"] = dataclasses.asdict(model)
    ran = []

    def work(_src, dst, _run):
        ran.append((dst / "items.jsonl").write_text(""))
        return metadata

    for _ in range(2):
        execute(Call("evaluate-0", experiment), model, {}, work)
        begin(earlier=earlier)
    assert len(ran) == 2
    with Step(
        Call("evaluate-0", experiment, {}, {"model": model}), key={"gate": "another"}
    ) as step:
        assert (
            step.take_over("other") is None and step.take_over("s")["scores"] == metadata["scores"]
        )


def test_a_record_has_what_later_steps_and_the_report_need(begin):
    earlier, experiment = begin()
    made = execute(Call("import-model", experiment), None, {}, Work())
    assert (made.pointer.original_params, made.pointer.parent_digest) == (1, "")
    parent = dataclasses.replace(made.pointer, original_params=100, gate={"cap": 5})
    of_work = {"seconds": 500.0, "chosen": {"hidden": 4}}
    record = execute(
        Call("prune-2", experiment), parent, {}, lambda *given: Work()(*given) | of_work
    )
    pointer, metadata = record.pointer, record.metadata
    recovered = execute(Call("recover-2", experiment), pointer, {}, Work()).pointer
    assert parent.chosen == {} and recovered.chosen == pointer.chosen == {"hidden": 4}
    assert (pointer.params, pointer.original_params, pointer.parent_digest) == (
        1,
        100,
        parent.digest,
    )
    assert (pointer.gate, pointer.step) == ({"cap": 5}, "prune-2")
    assert (metadata["stage"], metadata["arm"], metadata["iteration"]) == ("prune", "loop", 2)
    assert metadata["seconds"] == 500 > metadata["whole_seconds"]  # with the libraries' imports
    run = mlflow_client.connect().get_run(pointer.run_id)
    assert [model.model_id for model in run.inputs.model_inputs] == [parent.model_id]
    begin(earlier=earlier)
    assert (
        execute(Call("prune-2", experiment), parent, {}, dies).metadata["started"]
        > metadata["started"]
    )


def test_a_file_that_changes_repeats_the_steps_that_read_it(begin, data):
    _, experiment = begin()
    recover, prune = Call("recover-1", experiment), Call("prune-1", experiment)
    trained, scored = Work(), Work()

    def both():
        return execute(recover, None, {"training": [data]}, trained), execute(
            prune, None, {}, scored
        )

    before = both()
    Path(data.source).write_text("{1}")
    # A repetition that is killed leaves no result of the old file.
    with pytest.raises(RuntimeError):
        execute(recover, None, {"training": [data]}, dies)
    assert committed(recover) is None
    trained.data = b"other weights"
    after = both()
    assert (trained.done, scored.done) == (2, 1) and after[1] == before[1]
    assert after[0].pointer.digest != before[0].pointer.digest
    # The new record is the step's, and a mere touch changes nothing.
    os.utime(data.source, (1, 1))
    assert (
        both() == after and trained.done == 2 and committed(recover).files.keys() == {data.source}
    )


def test_a_finished_run_and_one_of_another_version_are_not_changed(begin, data, monkeypatch):
    step, settings = Call("recover-1", begin()[1]), {"training": data}
    record = execute(step, None, settings, Work())
    with (
        monkeypatch.context() as newer,
        pytest.raises(InputError, match=r"done by ptl .*this is ptl 0\.0\.9; resume"),
    ):
        newer.setattr(call, "__version__", "0.0.9")
        execute(step, None, settings, Work())
    run = step.start()
    store.commit(run.root, run.run, "report", Record("report", record.pointer))
    Path(data.source).write_text("{1}")
    with pytest.raises(
        InputError, match=r"train\.jsonl has changed .*the run is finished; restore"
    ):
        execute(step, None, settings, Work())


def test_steps_of_one_kind_read_the_same_data(data, tmp_path):
    """On a cluster recover-1 is not started again: two iterations would train on two data sets."""

    def check_in(run, step, key, stage=None):
        run = SimpleNamespace(root=f"file://{tmp_path}/ptl", run=run, step=step)
        call.check_same_files(run, stage or Call(step, "e").stage, key)

    pairs = [("recover-1", "recover-2"), ("recover-1", "control-recover"), ("prune-1", "prune-3")]
    before = key_of("", {"training": data})
    Path(data.source).write_text("{1}")
    after = key_of("", {"training": data})
    for run, (first, later) in enumerate([*pairs, ("evaluate-0", "evaluate-1")]):
        store.commit(
            f"file://{tmp_path}/ptl",
            str(run),
            first,
            Record(before.digest, NOWHERE, files=before.files),
        )
        check_in(str(run), later, before)
        with pytest.raises(
            InputError, match=rf"train\.jsonl has changed since {first} was done.* start a new run"
        ):
            check_in(str(run), later, after)
        check_in(str(run), first, after)
        check_in(str(run), later, after, stage="import")


def test_a_file_counts_by_name_and_content_wherever_it_is(data, tmp_path, monkeypatch):
    """A run is resumed from another directory, and another checkout takes its steps over."""
    monkeypatch.chdir(tmp_path)
    here = Path(data.source).relative_to(tmp_path)

    def key(name):
        return key_of("", {"training": data.model_copy(update={"source": str(name)})})

    before = key(here)
    copy = tmp_path / "elsewhere" / here.name
    copy.parent.mkdir()
    shutil.copy(here, copy)
    monkeypatch.chdir(copy.parent)
    assert key(data.source) == before and key(copy.name).digest == before.digest
    copy.write_text("{1}")
    assert key(copy.name).digest != before.digest != key(shutil.copy(data.source, "b.jsonl")).digest
    assert list(key("ptl://general").files) == ["ptl://general"]  # is nowhere


def test_files_are_part_of_the_key_by_their_content_and_an_imported_model_s_weights_by_their_time(
    tmp_path,
):
    names = ("config.json", "model.safetensors")
    for name in names:
        (tmp_path / name).write_bytes(b"content")
    teacher = {"recover": (RecoverStage(method="distil", teacher=str(tmp_path)),)}
    source = {"source": ModelSource(path=str(tmp_path))}
    before = key_of("sha256:parent", teacher), key_of("", source)
    assert [len(key.files) for key in before] == [2, 2]
    assert key_of("sha256:other", teacher).digest != before[0].digest
    for name, imported in zip(names, (True, False), strict=True):
        os.utime(tmp_path / name, (1, 1))
        assert key_of("sha256:parent", teacher) == before[0]
        assert (key_of("", source) == before[1]) == imported
    (tmp_path / names[1]).write_bytes(b"others!")
    assert key_of("sha256:parent", teacher).digest != before[0].digest


def test_a_module_in_a_subfolder_and_a_table_that_grading_code_reads_are_part_of_the_key(tmp_path):
    (tmp_path / "inner").mkdir()
    read = [
        tmp_path / "inner" / "grade.py",
        tmp_path / "inner" / "table.csv",
        tmp_path / "own.yaml",
    ]
    read[2].write_text(
        f"include: {EXAMPLE}/tiny_reasoner.yaml\ntask: own\nprocess_docs: !function inner.grade.ask\n"
    )
    digests = set()
    for path in read:
        for text in ("# before\n", "# after\n"):
            path.write_text(text + (path.read_text() if path.suffix == ".yaml" else ""))
            evaluate_settings = Evaluate(tasks=(Task(name=str(read[2])),), allow_code=True)
            digests.add(key_of("", {"evaluate": evaluate_settings}).digest)
    # The state after one file's change is the next one's before.
    assert len(digests) == 6


def test_a_loop_that_ends_earlier_than_before_leaves_no_later_results(begin):
    """Its later steps pass their input through: the report and `ptl gc` must not find what they did before."""
    step = Step(Call("evaluate-1", begin()[1]), key={})
    run = step.run = step.call.start()
    names = [f"{stage}-{i}" for i in (1, 2, 3) for stage in ("prune", "recover", "evaluate")]
    for name in names:
        store.commit(run.root, run.run, name, Record("k", NOWHERE))
    evaluate._withdraw_later(step, 3)
    assert [name for name in names if store.committed(run.root, run.run, name)] == names[:3]


def test_a_kill_at_any_moment_leaves_nothing_half_done(begin, monkeypatch):
    """Files, then the record, then MLflow: what was published is found, and what was not is done again."""
    _, experiment = begin()
    kill = mock.Mock(side_effect=KeyboardInterrupt)  # nothing that would handle an error runs
    moments = [(store, "publish", 2), (store, "commit", 2), (tracking, "finish", 1)]
    for number, (module, name, times) in enumerate(moments, 1):
        step, work = Call(f"prune-{number}", experiment), Work()
        with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
            killed.setattr(module, name, kill)
            execute(step, None, {}, work)
        assert (committed(step) is None) == (times == 2)
        record = execute(step, None, {}, work)
        assert work.done == times
        run = mlflow_client.connect().get_run(record.pointer.run_id)
        assert (
            run.info.status == "FINISHED"
            and run.data.metrics["params"] == 1
            and committed(step) == record
        )
        assert [output.model_id for output in run.outputs.model_outputs] == [
            record.pointer.model_id
        ]


def test_each_attempt_has_a_folder_of_its_own_and_none_is_left(begin):
    step, folders = Call("prune-1", begin()[1]), []

    def work(_src, dst, _run):
        folders.append(dst)
        # as a checkpoint that is not on this disk
        (scratch("cache") / "parent").mkdir(parents=True, exist_ok=True)
        (dst / f"attempt-{len(folders)}").touch()
        return {"params": 1} if len(folders) == 2 else dies()

    with pytest.raises(RuntimeError):
        execute(step, None, {}, work)
    pointer = execute(step, None, {}, work).pointer
    assert [path.name for path in path_of(pointer.uri).glob("attempt-*")] == ["attempt-2"]
    assert not any(folder.exists() for folder in (*folders, scratch("cache"), scratch("prune-1")))


def test_a_coordinator_takes_over_before_it_starts_nodes_and_then_only_their_result(
    begin, monkeypatch
):
    earlier, experiment = begin()
    execute(Call("recover-1", experiment), None, {}, Work())
    monkeypatch.setattr("ptl.steps.step.is_coordinator", lambda: True)
    for named in (earlier, ""):
        begin(earlier=named)
        with Step(Call("recover-1", experiment), key={}) as step:
            assert (step.record is not None) == bool(named)
    with pytest.raises(InputError, match="recover-1: its nodes have ended without a result"):
        step.take_result_of_nodes()


def test_the_reason_of_a_failure_shows_no_login(begin, monkeypatch, tmp_path):
    step = Call("import-model", begin()[1])
    work = mock.Mock(side_effect=ValueError("no answer from https://user:secret@proxy/x"))
    with pytest.raises(ValueError, match="no answer"):
        execute(step, None, {}, work)
    assert tracking.error_of(step.start()) == "ValueError: no answer from https://***@proxy/x"
    monkeypatch.setattr(process, "work", work)
    monkeypatch.setattr(processes, "die_with", lambda _parent: None)
    (tmp_path / "call.json").write_text("{}")
    (tmp_path / "failure.json").write_text(" " * 500)  # as the supervisor does
    with pytest.raises(SystemExit, match="1"):
        process.main(tmp_path / "call.json", 0)
    left = (tmp_path / "failure.json").read_text()
    # On a disk that is full since then there is room for it.
    assert "no answer" in json.loads(left)["reason"] and "secret" not in left and len(left) == 500


def test_a_recovery_finds_items_and_own_answers_by_the_run_and_depends_on_them(begin, monkeypatch):
    """Others are another training: it is neither resumed nor taken over."""
    keys = []

    def opened(step, _pointer):
        keys.append(step.key.digest)
        raise OpenedError

    config = load_config(
        TINY, {"training.decontaminate": {}, "training.answers": "self"}
    ).model_dump(mode="json")
    for limit, own in ((8, "a"), (8, "a"), (9, "a"), (8, "b")):
        _, experiment = begin()
        evaluate = check(
            Evaluate, {"tasks": [config["evaluate"]["tasks"][0] | {"limit": limit}]}, "evaluate"
        )
        run = Call("import-model", experiment).start()
        import_model._commit_items(run, evaluate, 0)
        items = store.committed(run.root, run.run, "items").pointer
        assert len(read_items(store.fetch(items, scratch("cache")))) == limit
        answered = Record(
            "key", Pointer("file:///answers", f"sha256:{own * 64}"), {"stage": "answers"}
        )
        store.commit(run.root, run.run, "answers", answered)
        with monkeypatch.context() as patched, pytest.raises(OpenedError):
            patched.setattr(Step, "fetch", opened)
            recover.recover(
                Call("recover-1", experiment, config | config["schedule"], {"model": NOWHERE})
            )
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_the_dense_model_answers_once_in_a_run(begin, monkeypatch, tmp_path):
    experiment, asked = begin()[1], []

    def write_answers(_src, dst, *_, model, **__):
        asked.append(model)
        (dst / "answers.jsonl").write_text(f"of {model}")
        return AnswersReport(9, 9, 9, 8, 50.0, {})

    monkeypatch.setattr("ptl.recovery.answers.write_answers", write_answers)
    monkeypatch.setattr(Step, "fetch_model", lambda _step: Path())
    config = load_config(TINY, {"training.answers": "self"}).model_dump(mode="json")
    for attempt in "ab":
        step = Call(
            "answers",
            experiment,
            config,
            {"model": NOWHERE},
            {"metrics": Output(tmp_path / attempt)},
        )
        answers.answers(step)
        assert committed(step).metadata["kept"] == step.outputs["metrics"].metadata["kept"] == 8
    assert asked == [NOWHERE.digest]
