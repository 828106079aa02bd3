"""What a person who starts a run in Kubeflow must know: of each parameter, each step, and the pipeline itself.

One set of texts: the compiled YAML has them, docs/ui.md and the components' READMEs are written from them.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from ptl import __version__
from ptl.config import dag
from ptl.config.parameters import parameters
from ptl.config.run import Config

LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")  # of Markdown
LONGEST = 60  # characters of a value in a description


class Text(NamedTuple):
    """A run parameter: what it means, in Markdown for a page of docs, and the field of the config."""

    means: str
    field: str = ""

    @property
    def plain(self) -> str:
        """A sentence without the links, which lead to pages of docs."""
        sentence = LINK.sub(r"\1", self.means)
        in_config = f"; in the config `{self.field}`" if self.field else ""
        return f"{sentence[0].upper()}{sentence[1:]}{in_config}."


PARAMETERS = {
    "model": Text("hub id or folder of the dense checkpoint", "model.path"),
    "revision": Text("hub commit; empty: the newest", "model.revision"),
    "target": Text(
        "below 1: share of all parameters to remove; 1000 or more: parameters to end with",
        "schedule.target",
    ),
    "cuts": Text("`uniform`, or `cubic`: large cuts first", "schedule.cuts"),
    "recovery_tokens": Text("tokens of recovery over all iterations", "schedule.recovery_tokens"),
    "tokens": Text(
        "how these are distributed: `uniform`, `doubling` or `quadrupling`", "schedule.tokens"
    ),
    "seed": Text("seed of every random choice", "seed"),
    "prune_settings": Text("what goes, by which score (JSON)", "prune"),
    "chat": Text("[how the model is served](data.md#chats) (JSON)", "chat"),
    "calibration": Text("the text for scoring (JSON)", "calibration"),
    "recover_settings": Text("methods and their settings (JSON list)", "recover"),
    "training": Text("the data of recovery (JSON); keep `answers`", "training"),
    "evaluate_settings": Text(
        "benchmarks and how (JSON); keep `backend`, it decides the image", "evaluate"
    ),
    "gate": Text("margin, significance level (JSON); keep `enabled`", "gate"),
    "experiment": Text("MLflow experiment", "storage.experiment"),
    "registered_model": Text(
        "name in the MLflow registry; empty: nothing is registered", "storage.registered_model"
    ),
    "earlier_runs": Text(
        "ids of unfinished runs whose steps are [taken over](operations.md#failures-and-resuming), the newest first"
    ),
}

# By stage, whose steps are named prune-1, prune-2 and so on.
STEPS = {
    "doctor": "Checks secrets, MLflow and the store from inside the cluster, before any work.",
    "import": "Checks the run's settings, and stores the dense model and the benchmarks' items.",
    "answers": "Has the dense model answer the prompts that recovery learns from.",
    "prune": "Removes this iteration's share of what is redundant on the calibration text.",
    "recover": "Trains the pruned model within its token budget.",
    "evaluate": "Scores the checkpoint on the benchmarks; with the gate on it may reject the iteration.",
    "export": "Converts the final model to the form in which it is served, and scores that.",
    "report": "Writes the report: dense against final model, and what was not compared.",
}


def table() -> str:
    """The run parameters as the table of docs/ui.md."""
    rows = [
        f"| `{name}` | {text.means} | {f'`{text.field}`' if text.field else 'none'} |"
        for name, text in PARAMETERS.items()
    ]
    return "\n".join(["| parameter | means | from the config |", "|---|---|---|", *rows]) + "\n"


def docstring(config: Config) -> str:
    """A function's docstring from which KFP reads the descriptions of the run parameters."""
    lines = [f"    {name}: {PARAMETERS[name].plain}" for name in parameters(config)]
    return "\n".join([summary(config), "", "Args:", *lines])


def summary(config: Config) -> str:
    """What the pipeline does to which model, in one line."""
    schedule, gate = (
        config.schedule,
        ", each compared with the dense model by the gate" if config.gate.enabled else "",
    )
    target = parameters(config)["target"]
    if target < 1:
        goal = f"until {100 * target:g} % of its parameters are removed"
    else:
        goal = f"until {target:,.0f} parameters are left"
    number = f"{schedule.iterations} iterations" if schedule.iterations > 1 else "one iteration"
    model = parameters(config)["model"]
    return f"Prune-Tune Loop: prune, recover and evaluate {model} in {number}{gate}, {goal}"


def markdown(config: Config) -> str:
    """The description of the pipeline and of its version, which Kubeflow's UI shows before a run is started."""
    stages = dict.fromkeys(dag.stage_of(node.name) for node in dag.nodes(config))
    values = parameters(config)
    return "\n".join(
        [
            f"{summary(config)}.",
            "",
            "Defaults are the config's values. **Run parameters:**",
            "",
            *(f"- `{name}`{_default(values[name])}: {PARAMETERS[name].plain}" for name in values),
            "",
            "**Steps:**",
            "",
            *(f"- `{stage}`: {STEPS[stage]}" for stage in stages),
            "",
            f"Made by ptl {__version__}{_commit()}. More: `docs/ui.md` and `docs/operations.md` of ptl.",
        ]
    )


def _default(value: Any) -> str:
    """A default that is short enough for a line."""
    is_plain = isinstance(value, str | int | float) and value != "" and len(str(value)) <= LONGEST
    return f" ({value})" if is_plain else ""


def _commit() -> str:
    """The commit of ptl, with `-dirty` where files were changed since, if it runs from its checkout."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # An installed package may be within somebody else's checkout.
        if Path(git("rev-parse", "--show-toplevel")) != root.resolve():
            return ""
        return f", commit {git('describe', '--always', '--dirty', '--abbrev=40', '--exclude=*')}"
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return ""
