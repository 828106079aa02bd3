"""A run of four iterations and a control, as records of its steps."""

import pytest
import run_records


@pytest.fixture
def settings() -> dict:
    return run_records.settings()


@pytest.fixture
def records() -> dict:
    return run_records.records()


@pytest.fixture
def no_pictures(monkeypatch):
    """A mock in place of the plots, for tests that look at the words only: drawing takes most of the time."""
    monkeypatch.setattr("ptl.report.render._accuracy_plot", lambda result: "<svg></svg>")
