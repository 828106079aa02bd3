"""Draw the graph of a compiled pipeline as Mermaid text, which GitHub renders: `python docs/graph.py pipeline.yaml`."""

import sys
from functools import cache
from pathlib import Path

import yaml


def draw(text: str) -> str:
    """The graph, and as comments above it how many edges it has and its longest path."""
    spec = next(iter(yaml.safe_load_all(text)))
    needs = {
        name: task.get("dependentTasks", []) for name, task in spec["root"]["dag"]["tasks"].items()
    }

    @cache
    def path(name: str) -> tuple[str, ...]:
        return (*max(map(path, needs[name]), key=len, default=()), name)

    longest = max(map(path, needs), key=len)
    edges = [f"  {before} --> {name}" for name in needs for before in needs[name]]
    counts = (
        f"%% {len(needs)} steps, {len(edges)} edges; the longest path has {len(longest)} steps:"
    )
    return "\n".join([counts, f"%% {' > '.join(longest)}", "graph LR", *edges])


if __name__ == "__main__":
    print(draw(Path(sys.argv[1]).read_text()))
