"""Our scores against the harness's own, item by item: same prompts, same answers, same extraction, same outcomes.

Run: python benchmarks/agreement.py CHECKPOINT TASK [--limit 50] [--batch-size 8] [--data-dir FOLDER] [--metric M]

With --data-dir both sides read the local files; everything else on the other side is plain `simple_evaluate`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from ptl.config.run import Evaluate, Speed, Task
from ptl.evaluation import scoring, tasks
from ptl.evaluation.evaluate import evaluate_checkpoint, read_items


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("task")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--data-dir")
    parser.add_argument("--metric", default="exact_match")
    args = parser.parse_args()
    task = Task(name=args.task, limit=args.limit, metric=args.metric)
    settings = Evaluate(
        tasks=[task], batch_size=args.batch_size, speed=Speed(repeats=0), data_dir=args.data_dir
    )
    with tempfile.TemporaryDirectory() as folder:
        score = evaluate_checkpoint(args.checkpoint, Path(folder), settings, seed=1234).tasks[0]
        items = read_items(Path(folder))

    import torch
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    spec = tasks.find(args.task)[0]
    plain = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(args.checkpoint)},
        tasks=[scoring.load_task(spec, task, settings, seed=1234)]
        if args.data_dir
        else [args.task],
        limit=args.limit,
        batch_size=args.batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=not tasks.is_path(args.task)),
    )
    metric, extraction = score.metric.split(",")
    theirs = [s for s in plain["samples"][spec.name] if s["filter"] == extraction]
    same = {
        "prompts": sum(
            s["prompt_hash"] == i["prompt_digest"] for s, i in zip(theirs, items, strict=True)
        ),
        "answers": sum(s["resps"][0][0] == i["answer"] for s, i in zip(theirs, items, strict=True)),
        "outcomes": sum(
            bool(s[metric] == i["correct"]) for s, i in zip(theirs, items, strict=True)
        ),
    }
    print(
        f"{score.task}, {score.metric}, version {score.version}, {score.num_fewshot}-shot, {len(items)} items"
    )
    print(f"ours {score.accuracy:.4f}, lm_eval {plain['results'][spec.name][score.metric]:.4f}")
    print(f"equal: {same}; answers that hit the token limit: {score.truncated:.1%}")
    sys.exit(any(count != len(items) for count in same.values()))


if __name__ == "__main__":
    main()
