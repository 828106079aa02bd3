"""Records of a run as its steps commit them: their numbers are made up for the tests and measured nowhere."""

import dataclasses

from ptl.storage.store import Pointer, Record

DENSE, WIDTHS = 213_120, (256, 206, 170, 145, 122)


def pointer(step: str, params: int, parent: str = "") -> dict:
    digest = f"sha256:{step.encode().hex():0<64}"
    return {
        "uri": f"file:///tmp/run/{step}", "digest": digest, "params": params, "original_params": DENSE,
        "parent_digest": parent, "run_id": f"{step.encode().hex():0<32}"[:32], "model_id": f"m-{step}",
        "model_version": "", "gate": {},
    }  # fmt: skip


def scores(params: int, accuracy: float, width: int) -> dict:
    def task(name: str, value: float, items: int) -> dict:
        return {"task": name, "version": "1", "metric": "exact_match,final-number", "accuracy": value,
                "low": value - 0.02, "high": min(1.0, value + 0.02), "items": items, "num_fewshot": 0,
                "truncated": 0.0, "cut_prompts": 0.0, "code_timeouts": 0, "higher_is_better": True,
                "answer_tokens": 22.5, "answer_tokens_p95": 40.0, "seconds": 3.1,
                "samples": 1, "pass_at_n": None}  # fmt: skip

    return {
        "tasks": [task("tiny_reasoner", accuracy, 500), task("tiny_retention", accuracy - 0.1, 300)],
        "params": params, "active_params": params, "experts": 0, "bytes": params * 4, "flops_per_token": params * 2,
        "kv_bytes_per_token": 2048, "speed": [], "widths": [width] * 4, "seconds": 4.2,
        "hidden_size": 64, "kv_heads": 2, "retention": losses(2.5 + (1 - accuracy) / 4),
    }  # fmt: skip


def losses(nats: float) -> dict:
    """Of held-out text, by a token."""
    tokens = [40, 50, 60]
    return {
        "texts": "retention.jsonl",
        "bytes": 600,
        "tokens": tokens,
        "losses": [nats * count for count in tokens],
    }


def speed() -> dict:
    """Metadata of speed.side_by_side."""

    def model(params: int, times: float, solved: int) -> dict:
        rows = [
            {
                "batch": b,
                "prefill_tokens_per_s": 4000.0 * b,
                "decode_tokens_per_s": 900.0 * b * times,
                "repeats": 3,
            }
            for b in (1, 32)
        ]
        seconds = 0.5 / solved / times
        return {
            "params": params,
            "speed": rows,
            "seconds_per_solved": seconds,
            "solved": solved,
            "answer_tokens": 22.5,
        }

    models = {"dense": model(DENSE, 1.0, 64), "final": model(127_872, 1.25, 50)}
    return {"device": "CPU, 1 thread", "task": "tiny_reasoner", "items": 64, "samples": 1, "batch_size": 128,
            "prompt_tokens": 64, "new_tokens": 32, "repeats": 3, "models": models, "seconds": 3.0}  # fmt: skip


def metadata(stage: str, iteration: int, arm: str = "loop", **more: object) -> dict:
    return {"stage": stage, "arm": arm, "iteration": iteration, "seconds": 3.5 + iteration,
            "whole_seconds": 3.5 + iteration, "started": 1.76e9} | more  # fmt: skip


def export(params: int, size: int, accuracy: float, limit: int | None = None) -> dict:
    """Metadata of an export to GGUF; the final model's form is worse than it on five items."""
    pair = {"items": 500, "reference": 0.98, "candidate": accuracy, "regressions": 6, "improvements": 1,
            "difference": -0.01, "low": -0.02, "high": 0.0, "p_different": 0.125, "p_worse": 0.0625,
            "margin": 0.02, "alpha": 0.05, "verdict": "not inferior"}  # fmt: skip
    models = {
        name: {
            "bytes": size * (2 if name == "dense" else 1),
            "tasks": scores(params, accuracy, 1)["tasks"],
        }
        for name in ("dense", "final")
    }
    rows = [{"batch": 1, "decode_tokens_per_s": 3210.0, "prefill_tokens_per_s": 9000.0}]
    form = {"format": "gguf", "type": "q8_0", "limit": limit, "name": "gguf-q8_0"}
    return metadata(
        "export", 0, "export", params=params, bytes=size, accuracy=accuracy, export=form, models=models,
        notes=["a note on it"],
        speed={"models": dict.fromkeys(("dense", "dense_export", "final", "final_export"), rows), "setting": "How."},
        scored={"dense": "evaluate-0", "final": "evaluate-4"},
        pairs={"tiny_reasoner": {"final": pair, "dense_export": pair, "dense": pair}},
    )  # fmt: skip


def items(wrong: set[int], count: int = 20) -> list[dict]:
    return [
        {"task": "tiny_reasoner", "id": str(i), "prompt_digest": f"{i}", "prompt": f"{i} + 4 =", "target": str(i + 4),
         "correct": int(i not in wrong), "answer": str(i + 4 + (i in wrong)), "truncated": False, "thought": "",
         "tokens": 20 + i % 7 + (i in wrong)}
        for i in range(count)
    ]  # fmt: skip


def arm_records(
    name: str, arm: str, i: int, params: int, accuracy: float, tokens: int, width: int
) -> dict:
    prune, recover, evaluate = (
        f"{name}-{verb}" if arm == "control" else f"{verb}{name}"
        for verb in ("prune", "recover", "evaluate")
    )
    verdict = {"reason": "within the margin", "numbers": {"p_value": 0.0213}}
    verdict["decision"] = "control" if arm == "control" else "accepted"
    return {
        prune: metadata("prune", i, arm, params=params, criterion="max"),
        recover: metadata("recover", i, arm, params=params, tokens=tokens),
        evaluate: metadata(
            "evaluate", i, arm, scores=scores(params, accuracy, width), verdict=verdict
        ),
    }


def record_of(step: str, f: dict) -> Record:
    """An evaluate step scored, accepted and passes on the checkpoint of another step."""
    made = step
    if f["stage"] == "evaluate":
        made = step.replace("evaluate", "recover") if f["iteration"] else "import-model"
    params = f.get("params") or f["scores"]["params"]
    passed_on = pointer(made, params, "" if made == "import-model" else "sha256:" + "a" * 64)
    if f["stage"] == "evaluate":
        f = {"checkpoint": passed_on, "accepted": passed_on, "speed": {}} | f
    return Record("", Pointer(**passed_on), f, step)


def reject(records: dict, i: int) -> None:
    """Iteration i fails the gate: its evaluate step passes on what iteration i-1 ended with."""
    verdict = {"decision": "rejected", "reason": "2.1 points below", "numbers": {"margin": 0.01}}
    records[f"evaluate-{i}"].metadata["verdict"] = verdict
    before = records[f"evaluate-{i - 1}"].metadata["accepted"]
    records[f"evaluate-{i}"].metadata["accepted"] = before
    records[f"evaluate-{i}"] = dataclasses.replace(
        records[f"evaluate-{i}"], pointer=Pointer(**before)
    )


def settings() -> dict:
    return {
        "name": "tiny", "model": {"path": "examples/tiny_reasoner/checkpoint", "revision": None}, "seed": 7,
        "training": {"sources": [{"source": "examples/tiny_reasoner/train.jsonl"}]},
        "schedule": {"iterations": 4, "target": 0.4}, "storage": {"experiment": "ptl"},
        "recover": [{"method": "cpt", "learning_rate": 3e-4}],
        "evaluate": {"tasks": [{"name": "tiny_reasoner", "limit": 500}, {"name": "retention"}]},
        "gate": {"enabled": True, "margin": 0.02, "alpha": 0.05, "strict": False, "retention": None},
    }  # fmt: skip


RUN = {"run_id": "run-1", "mlflow_run_id": "f" * 32, "experiment_id": "1"}  # where it is tracked


def records() -> dict:
    """Four accepted iterations that end at 0.98, a control that ends at 0.90."""
    out = {
        "import-model": metadata("import", 0, model="examples/tiny_reasoner/checkpoint", revision="", params=DENSE,
                              base_model="", license="", license_name="", license_link="",
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
