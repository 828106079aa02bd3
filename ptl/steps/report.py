"""The report step: the pages of a run and its result.json, from the records of all steps."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ptl.config import dag
from ptl.config.export import ServedFormat, gguf_name
from ptl.config.parameters import run_config
from ptl.config.run import Config
from ptl.evaluation import gate
from ptl.export import formats
from ptl.lineage import mlflow_objects, run_page, tracking
from ptl.log import say
from ptl.report.result import Result
from ptl.report.words import first_line
from ptl.steps.call import Call, Metadata
from ptl.steps.records import score_tags
from ptl.steps.step import Step, scratch
from ptl.storage import local_files, store
from ptl.storage.store import Pointer, Record

SERVICE_NAME = 53  # characters that KServe leaves


def report(call: Call) -> None:
    """Write the run's pages and result.json from the records of its steps; register its exports and name its verdict.

    Unlike other steps it works again whenever it is started: a repeated step may have changed what the pages say.
    """
    from ptl.report.build import build
    from ptl.report.render import render

    with Step(call, key=None) as step:
        config = run_config(call.settings)
        settings = config.model_dump(mode="json")
        final = call.inputs["final"]
        records = _records(step, config, final)
        # A control that failed has passed its input on, with the reason in its gate's state.
        control = call.inputs.get("control")
        result = build(
            records,
            settings,
            **tracking.links(step.run),
            control_failed=gate.State(**control.gate).reason if control else "",
            exports_failed=tracking.errors_of(
                step.run, [dag.export_step(export) for export in config.export]
            ),
        )
        render(result, step.folder)
        write_manifests(final, records, config, step.folder)
        # Nothing is published: the pages go to MLflow and to Kubeflow as they are.
        tracking.log_report(step.run, sorted(step.folder.iterdir()))
        run_page.log_result(step.run, result.metrics(), first_line(result))
        run_page.link_final_model(step.run, final.model_id)
        if call.settings["registered_model"]:
            _register_exports(step, records, final)
            _set_alias(step, records, final, result)
        # As Kubeflow's artifacts and, from a local runner, in the run's directory.
        shutil.copyfile(step.folder / "report.html", call.outputs["html"].path)
        shutil.copyfile(step.folder / "report.md", call.outputs["markdown"].path)
        # What the pages say may differ after a retry; that all steps had ended, which the record says, does not.
        store.commit(
            step.run.root, step.run.run, step.run.step, Record("report", final, {"stage": "report"})
        )
        tracking.finish(
            step.run,
            params={},
            metrics={"share_removed": result.final.share_removed, "params": result.final.params},
            inputs=[final.model_id],  # MLflow shows the way to the final model
            output=None,
            step=0,
        )
        run_directory = os.environ.get("PTL_RUN_DIR")
        if run_directory:
            # After all else, and result.json last: where it is, the run is finished.
            for path in sorted(step.folder.iterdir(), key=lambda path: path.name == "result.json"):
                local_files.replace(Path(run_directory, path.name), path.read_bytes())
        shutil.rmtree(scratch("cache"), ignore_errors=True)  # what it has fetched


def _records(step: Step, config: Config, final: Pointer) -> dict[str, Record]:
    """The records of the steps that were committed; evaluations of the compared models with their items."""
    records = {}
    for node in dag.nodes(config):
        if dag.stage_of(node.name) in ("doctor", "report"):
            continue
        record = step.find(node.name)
        # Of a step that passed its input through, or of a control that failed, there is none.
        if record is None:
            continue
        if record.metadata["stage"] == "evaluate":
            compared = record.metadata["iteration"] == 0 or record.metadata["arm"] == "control"
            if compared or record.metadata["checkpoint"]["digest"] == final.digest:
                record.metadata["items"] = step.fetch_items(record)
        records[node.name] = record
    return records


def _scores(records: dict[str, Record], checkpoint: Pointer) -> Metadata | None:
    """The scores of the loop's evaluation of a checkpoint; None where it has none."""
    for record in records.values():
        metadata = record.metadata
        if (
            metadata["stage"] == "evaluate"
            and metadata["checkpoint"]["digest"] == checkpoint.digest
        ):
            return dict(metadata["scores"])
    return None


def _exports(records: dict[str, Record]) -> list[Record]:
    return [record for record in records.values() if record.metadata["stage"] == "export"]


def write_manifests(
    final: Pointer, records: dict[str, Record], config: Config, folder: Path
) -> None:
    """An InferenceService for the final checkpoint, if the loop has scored it, and for each export.

    Only of files on S3: a cluster cannot download from a disk.
    """
    served: list[tuple[str, ServedFormat, str]] = []
    if _scores(records, final):
        served.append(("", "transformers", final.uri))
    for record in _exports(records):
        form, uri = record.metadata["export"], record.pointer.uri
        file = f"/{gguf_name(form['type'])}" if form["format"] == "gguf" else ""
        served.append((f"-{form['name']}", form["format"], uri + file))
    for suffix, format, uri in served:
        if uri.startswith("s3://"):
            gpus = 1 if format != "gguf" else int(bool(config.resources.accelerator))
            manifest = formats.inference_service(
                _service_name(config.name, suffix), uri, format, gpus
            )
            (folder / f"inference-service{suffix}.yaml").write_text(manifest)


def _service_name(config: str, suffix: str) -> str:
    """A name that KServe takes: letters, digits and dashes, a letter first; one of its own for each export."""
    suffix = suffix.replace("_", "-")
    if not config[0].isalpha():
        config = f"model-{config}"
    # What is too long is cut off before the export's name, by which services of one run differ.
    return config[: SERVICE_NAME - len(suffix)].rstrip("-") + suffix


def _register_exports(step: Step, records: dict[str, Record], final: Pointer) -> None:
    """Each export of the final checkpoint as a version, found by the tag `ptl.export`; repeating it changes nothing."""
    for record in _exports(records):
        metadata = record.metadata
        tags = {
            "step": record.step,
            "export": metadata["export"]["name"],
            "parent_version": final.model_version or "the dense model",
            **score_tags(metadata["models"]["final"], record.pointer),
        }
        mlflow_objects.register(
            step.run, step.call.settings["registered_model"], record.pointer, tags
        )


def _set_alias(step: Step, records: dict[str, Record], final: Pointer, result: Result) -> None:
    """Name the final checkpoint's version by its verdict: `not-inferior`, `unclear` or `inferior` to the dense model.

    The newest run with a verdict has its alias; all other aliases of the registered model are the user's.
    """
    pair, scores = result.pair("dense"), _scores(records, final)
    if not pair or not scores or not final.model_version:
        return
    registered_model = step.call.settings["registered_model"]
    # Of a registry that was lost the pointer's version is out of date.
    version = mlflow_objects.register(step.run, registered_model, final, score_tags(scores, final))
    alias = pair.verdict.replace(" ", "-")
    mlflow_objects.set_alias(registered_model, alias, version)
    say(step.run.step, f"version {version} of {registered_model} has the alias {alias}")
