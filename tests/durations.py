"""Measures which tests and shared fixtures are slow: `make durations` writes durations.json.

A plugin of pytest, since hooks of a conftest do not see fixtures of the session.
"""

import importlib
import itertools
import json
import time
from pathlib import Path

import pytest

FILE = Path(__file__).with_suffix(".json")
FAST = 0.3  # seconds: what takes longer is in the file


def function_of(nodeid):
    return nodeid.partition("[")[0].partition("@")[0]


def pytest_sessionstart():
    # What the first import takes is no test's own.
    for module in ("lm_eval.models.huggingface", "mlflow.transformers", "trl.trainer.sft_trainer"):
        importlib.import_module(module)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    """What a shared fixture takes is noted apart from the test that happens to pay for it."""
    start = time.perf_counter()
    yield
    if fixturedef.scope != "function":
        name = f"{fixturedef.baseid}::{fixturedef.argname}"
        request._pyfuncitem.user_properties.append((name, time.perf_counter() - start))


def pytest_terminal_summary(terminalreporter):
    seconds = {}
    for report in itertools.chain(*terminalreporter.stats.values()):
        if not hasattr(report, "duration"):
            continue
        shared = dict(report.user_properties) if report.when == "setup" else {}
        for name, taken in [
            (function_of(report.nodeid), report.duration - sum(shared.values())),
            *shared.items(),
        ]:
            seconds[name] = max(taken, seconds.get(name, 0))
    slow = {name: round(taken, 1) for name, taken in sorted(seconds.items()) if taken > FAST}
    FILE.write_text(json.dumps(slow, indent=1) + "\n")
