"""The doctor step: what can go wrong between a cluster and its servers goes wrong here, before anything expensive."""

from __future__ import annotations

from ptl.steps.call import Call


def doctor(call: Call) -> None:
    """Try out MLflow, the store and the accelerators. Raises InputError that names every fault."""
    from ptl.preflight.doctor import task

    task(call.settings["settings"], call.step.experiment)
