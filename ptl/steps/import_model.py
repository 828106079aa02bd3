"""The import step: the dense model, checked and published as the checkpoint that a run starts from."""

from __future__ import annotations

import os
import platform
import re
import shutil

from ptl import __version__
from ptl.config.base import flat_settings
from ptl.config.image_names import own_revision
from ptl.config.parameters import check_compiled, run_config
from ptl.config.run import Evaluate
from ptl.data.sources import local_file
from ptl.errors import WorkError
from ptl.lineage import run_page, tracking
from ptl.lineage.run_status import MAX_EARLIER, StepRun
from ptl.log import say
from ptl.model import checkpoint
from ptl.steps.call import BENCHMARK_ITEMS, Call, key_of, withdraw_outdated
from ptl.steps.step import Step, empty_folder, fresh_location, scratch
from ptl.storage import store
from ptl.storage.manifest import digest_of
from ptl.storage.store import Pointer, Record


def import_model(call: Call) -> None:
    """Check the dense model and all that the run will need of it, then publish it."""
    from ptl.export.formats import check_exports
    from ptl.model import model_card
    from ptl.model.hub import import_checkpoint, is_local
    from ptl.preflight import preflight

    # All that the hub, the data and the benchmarks can be checked with, before anything expensive.
    config = run_config(call.settings)
    check_compiled(config, gated=call.settings["gated"], answered=call.settings["answered"])
    folder, dimensions = preflight.preflight(config, hub_rows=True)
    assert dimensions is not None, "a step has torch"
    # This step's image does not have llama.cpp.
    check_exports(folder, [export for export in config.export if export.format != "gguf"])

    with Step(call, key={"source": config.model}) as step:
        # When the run is resumed, also data that has changed.
        run_page.describe(
            step.run,
            flat_settings(config.model_dump(mode="json")),
            own_revision(),
            run_page.data_sets(config.calibration, config.training, local_file),
        )
        _name_earlier_runs(step.run, call.settings["earlier_runs"])
        # First: they are cheap, and a benchmark that does not load is known before the model is copied.
        if config.training.decontaminate.tasks:
            _commit_items(step.run, config.evaluate, config.seed)
        if step.record is None:
            # From the folder that was checked: on the hub the model may have changed since.
            import_checkpoint(str(folder), None, step.folder)
            checkpoint.write_mlflow_model(step.folder)
            path = config.model.path
            name = os.path.join(".", path) if is_local(path) else path  # noqa: PTH118 - as no id of the hub begins
            source = {"model": name, "revision": config.model.revision or ""}
            card = model_card.published(path, folder)
            step.publish(
                {
                    **source,
                    **card,
                    "params": dimensions.params,
                    "versions": _versions(),
                    "host": platform.node(),
                }
            )


def _name_earlier_runs(run: StepRun, earlier_runs: str) -> None:
    """Let the run's steps know by its page in MLflow which unfinished runs they may take over from."""
    names = re.findall(r"[^\s,]+", earlier_runs)[:MAX_EARLIER]
    for name in names:
        try:
            if store.committed(run.root, name, run.step) is None:
                say(run.step, f"earlier run {name} has no steps here that could be taken over")
        except WorkError as error:
            say(run.step, f"earlier run {name}: {error}")
    if names:
        tracking.name_earlier_runs(run, names)


def _commit_items(run: StepRun, evaluate: Evaluate, seed: int) -> None:
    """Publish the benchmarks' items for all recoveries of the run, which find their record by its id."""
    from ptl.evaluation.evaluate import write_items

    key = key_of("", {"evaluate": evaluate, "seed": seed})
    earlier = store.committed(run.root, run.run, BENCHMARK_ITEMS)
    if earlier is not None and earlier.key == key.digest and not earlier.damaged:
        return
    if earlier is not None and earlier.key != key.digest:
        withdraw_outdated(run, earlier, key)
    folder = empty_folder(BENCHMARK_ITEMS)
    number = write_items(folder, evaluate, seed)
    location = fresh_location(run)
    digest = digest_of(store.publish(folder, location))
    pointer = Pointer(location, digest, run_id=run.run_id, step=BENCHMARK_ITEMS)
    record = Record(
        key.digest, pointer, {"stage": BENCHMARK_ITEMS}, version=__version__, files=key.files
    )
    store.commit(run.root, run.run, BENCHMARK_ITEMS, record)
    shutil.rmtree(scratch(BENCHMARK_ITEMS), ignore_errors=True)
    say(run.step, f"{number:,} items of benchmarks, which recovery does not train on")


def _versions() -> dict[str, str]:
    """Of what a result may depend on."""
    from importlib.metadata import version

    # An image may have other ones than the machine that compiled the pipeline.
    return {
        "ptl": __version__,
        "python": platform.python_version(),
        **{library: version(library) for library in ("torch", "transformers", "safetensors")},
    }
