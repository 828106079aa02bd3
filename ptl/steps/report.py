"""The report step: the pages of a run and its result.json, from the records of all steps."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from ptl.config import dag
from ptl.config.flat_settings import flat_settings
from ptl.config.run import Config, check
from ptl.evaluation import gate
from ptl.lineage import tracking
from ptl.lineage.run_status import StepRun
from ptl.log import say
from ptl.report import run_page
from ptl.steps import aliases, serving, versions
from ptl.steps.call import Call, Metadata
from ptl.steps.inputs import fetch_items
from ptl.steps.iterations import schedule_settings
from ptl.steps.machine import scratch
from ptl.steps.reporting import begin, noting_errors
from ptl.storage import local_files, store
from ptl.storage.store import Record

SECTIONS = ("seed", "prune", "calibration", "recover", "training", "evaluate", "gate")  # run parameters


def report(call: Call) -> None:
    """Write the run's pages and result.json from the records of its steps; name the best and smallest version.

    Unlike other steps it works again whenever it is started: a repeated step may have changed what the pages say.
    """
    from ptl.report.render import write_report

    # Nothing is published: the pages go to MLflow and to Kubeflow as they are.
    run = call.step.start()
    with noting_errors(run):
        begin(run)
        config = check(Config, _run_config(call.settings), "settings")
        records = _records(run, config)
        folder = scratch(call.step.name) / "report"
        settings = _report_settings(call, run, config)
        result = write_report(records, settings, folder)
        final = call.inputs["final"]
        serving.write_manifests(final, records, config, folder)
        tracking.log_report(run, sorted(folder.iterdir()))
        # import-model was not given all of the config.
        run_page.describe(run, flat_settings(config.model_dump(mode="json")))
        run_page.log_result(run, run_page.result_metrics(result), run_page.first_lines(result))
        # Name the best and the smallest version in MLflow's registry.
        for sentence in aliases.set_aliases(run, records, call.settings["registered_model"], config.gate):
            say(call.step.name, sentence)
        versions.describe(run, records, call.settings["registered_model"])
        versions.register_exports(run, records, final, call.settings["registered_model"])
        _copy_pages(call, folder)
        _commit_and_finish(call, run, result)
        shutil.rmtree(scratch("cache"), ignore_errors=True)  # what it has fetched


def _run_config(settings: Metadata) -> Metadata:
    """The config of the run: the compiled one, with the run's own parameters."""
    # Kubeflow lets a user change the parameters of a compiled pipeline for each run.
    config = settings["settings"]
    return {
        **config,
        **{section: settings[section] for section in SECTIONS},
        "model": {"path": settings["model"], "revision": settings["revision"] or None},
        "schedule": config["schedule"] | schedule_settings(settings),
    }


def _records(run: StepRun, config: Config) -> dict[str, Record]:
    """The records of the steps that were committed; that of an evaluation with its items."""
    records = {}
    for node in dag.nodes(config):
        if dag.stage_of(node.name) in ("doctor", "report"):
            continue
        record = store.committed(run.root, run.run, node.name)
        # Of a step that passed its input through, or of a control that failed, there is none.
        if record is None:
            continue
        # The report compares iterations item by item.
        if record["metadata"]["stage"] == "evaluate":
            record["metadata"]["items"] = fetch_items(record)
        records[node.name] = record
    return records


def _report_settings(call: Call, run: StepRun, config: Config) -> Metadata:
    """What the pages show beside the records: the config, where MLflow has the run, and why a control failed."""
    # A control that failed has passed its input on, with the reason in its gate's state.
    control = call.inputs.get("control")
    return {
        **config.model_dump(mode="json"),
        **tracking.links(run),
        "control_failed": gate.State.load(control.gate).reason if control else "",
        "exports_failed": tracking.errors_of(run, [dag.export_step(form) for form in config.export]),
    }


def _copy_pages(call: Call, folder: Path) -> None:
    """The pages as Kubeflow's artifacts and, from a local runner, in the run's directory."""
    shutil.copyfile(folder / "report.html", call.outputs["html"].path)
    shutil.copyfile(folder / "report.md", call.outputs["markdown"].path)
    run_directory = os.environ.get("PTL_RUN_DIR")
    if run_directory:
        # result.json last: where it is, all other files are.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "result.json"):
            local_files.replace(Path(run_directory, path.name), path.read_bytes())


def _commit_and_finish(call: Call, run: StepRun, result: Any) -> None:
    """Record that the run has ended, in the store and in MLflow."""
    final = call.inputs["final"]
    # What the pages say may differ after a retry; that all steps had ended, which the record says, does not.
    record = {"key": "report", "pointer": dataclasses.asdict(final), "metadata": {"stage": "report"}}
    store.commit(run.root, run.run, call.step.name, record)
    tracking.finish(
        run,
        params={},
        metrics={name: result["final"][name] for name in ("share_removed", "params")},
        inputs=[final.model_id],  # MLflow shows the way to the final model
        output=None,
        step=0,
    )
