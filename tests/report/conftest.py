"""A run of four iterations and a control, as records of its steps."""

import pytest
from run_records import DENSE, WIDTHS, arm_records, items, metadata, record_of, scores, speed


@pytest.fixture
def settings() -> dict:
    return {
        "name": "tiny", "model": {"path": "examples/tiny_reasoner/checkpoint", "revision": None}, "seed": 7,
        "training": {"sources": [{"source": "examples/tiny_reasoner/train.jsonl"}]},
        "schedule": {"iterations": 4, "target": 0.4},
        "recover": [{"method": "cpt", "learning_rate": 3e-4}],
        "evaluate": {"confidence": 0.95, "tasks": [{"name": "tiny_reasoner", "limit": 500}, {"name": "retention"}]},
        "gate": {"enabled": True, "margin": 0.02, "alpha": 0.05, "strict": False},
        "run_id": "run-1", "mlflow_run_id": "f" * 32, "experiment_id": "1",
    }  # fmt: skip


@pytest.fixture
def records() -> dict:
    """Four accepted iterations that end at 0.98, a control that ends at 0.90."""
    out = {
        "import-model": metadata("import", 0, model="examples/tiny_reasoner/checkpoint", revision="", params=DENSE,
                              versions={"torch": "2.13.0", "ptl": "0.1.0"}, host="fixture"),
        "evaluate-0": metadata("evaluate", 0, scores=scores(DENSE, 0.996, 256), items=items({3}),
                            verdict={"decision": "baseline", "reason": "the dense model"}),
    }  # fmt: skip
    sizes, accuracies = (163_800, 141_100, 132_400, 127_872), (0.99, 0.986, 0.984, 0.98)
    for i, (params, accuracy) in enumerate(zip(sizes, accuracies, strict=True), 1):
        out |= arm_records(f"-{i}", "loop", i, params, accuracy, 100_000 * 2**i, WIDTHS[i])
    out["evaluate-4"] |= {"items": items({2, 11}), "speed": speed()}
    out |= arm_records("control", "control", 1, 127_872, 0.9, 3_000_000, WIDTHS[4])
    return {step: record_of(step, f) for step, f in out.items()}


@pytest.fixture
def no_pictures(monkeypatch):
    """A mock in place of the plots, for tests that look at the words only: drawing takes most of the time."""
    monkeypatch.setattr("ptl.report.render.draw", lambda result: {})
