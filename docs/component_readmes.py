"""Write components/*/README.md from each component's signature and metadata.yaml, and the table of docs/ui.md.

`--check` only compares.
"""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from pipelines.prune_tune_loop import descriptions as texts  # noqa: E402

UI_PAGE = ROOT / "docs/ui.md"
TABLE = re.compile(r"^\| parameter \|.*?\n(?=\n)", re.S | re.M)  # of the run parameters
CUSTOM = "<!-- custom-content -->"  # what follows is written by hand and is kept

# Descriptions of inputs and outputs: one wording wherever a name occurs, that of the run parameters where it is one.
DESCRIPTIONS = {
    **{name.removesuffix("_settings"): text.plain for name, text in texts.PARAMETERS.items()},
    "step": "Name of the step, for example `prune-1`. The MLflow run and the record have this name, and it says to "
    "which arm and iteration the step belongs.",
    "iterations": "Number of iterations of the step's arm; 1 for the control.",
    "run_name": "Display name of the run in MLflow.",
    "gated": "Whether the pipeline was compiled with the gate on; `gate.enabled` must agree.",
    "answered": "Whether it was compiled with a step that writes own answers; `training.answers` must agree.",
    "model": "Checkpoint to work on.",
    "fallback": "Checkpoint that the iteration started from; the loop continues with it if the gate rejects.",
    "final": "Checkpoint that the loop ended with.",
    "control": "Checkpoint that the control arm ended with, or the reason why it did not finish.",
    "dense": "The imported model, whose form is made to compare with.",
    "export": "Format and type, an entry of `export` in the config.",
    "exports": "The list `export` of the config, checked before anything expensive.",
    "settings": "Sections of the config that are not run parameters.",
    "out": "Pointer to the new checkpoint: location, digest, MLflow ids. The weights are in the store.",
    "accepted": "Pointer to the checkpoint that the loop continues with.",
    "metrics": "Accuracy, its interval, items and parameters.",
    "html": "The report as one page.",
    "markdown": "The report as Markdown.",
}
# For the components whose `model` is what the user named, not a checkpoint of the run.
ANSWERS_METRICS = "How many answers were written, ended, and kept, and their mean length in tokens."
USERS_MODEL = texts.PARAMETERS["model"].plain


def readme(name: str) -> str:
    """The README of the component in the folder `name`; what follows the mark CUSTOM in the old one is kept."""
    folder = ROOT / "components" / name
    module = importlib.import_module(f"components.{name}.component")
    spec = getattr(module, name).component_spec
    metadata = yaml.safe_load((folder / "metadata.yaml").read_text())
    lines = [
        f"# {name.replace('_', ' ').title()}",
        "",
        f"> **Stability: {metadata['stability']}**",
        "",
        "## Overview",
        "",
        module.__doc__.strip(),
        "",
        "## Inputs",
        "",
        *_input_table(name, spec),
        "",
        "## Outputs",
        "",
        *_output_table(name, spec),
        "",
        "## Metadata",
        "",
        *_metadata_list(metadata),
        "",
        CUSTOM,
    ]
    path = folder / "README.md"
    custom_content = path.read_text().partition(CUSTOM)[2] if path.is_file() else ""
    return "\n".join(lines) + (custom_content or "\n")


def _input_table(name: str, spec: Any) -> list[str]:
    descriptions = dict(DESCRIPTIONS)
    if name in ("import_model", "report"):
        descriptions["model"] = USERS_MODEL
    rows = ["| Parameter | Type | Default | Description |", "|---|---|---|---|"]
    for parameter, item in (spec.inputs or {}).items():
        default = f"`{item.default}`" if item.optional else "none"
        rows.append(
            f"| `{parameter}` | `{_type_name(item)}` | {default} | {descriptions[parameter]} |"
        )
    return rows


def _output_table(name: str, spec: Any) -> list[str]:
    descriptions = dict(DESCRIPTIONS)
    if name == "answers":
        descriptions["metrics"] = ANSWERS_METRICS
    rows = ["| Name | Type | Description |", "|---|---|---|"]
    for output, item in (spec.outputs or {}).items():
        rows.append(f"| `{output}` | `{_type_name(item)}` | {descriptions[output]} |")
    return rows


def _metadata_list(metadata: dict[str, Any]) -> list[str]:
    dependencies = []
    for group in metadata["dependencies"].values():
        dependencies += [f"{dependency['name']} {dependency['version']}" for dependency in group]
    return [
        f"- **Name**: {metadata['name']}",
        f"- **Stability**: {metadata['stability']}",
        f"- **Dependencies**: {', '.join(dependencies)}",
        f"- **Tags**: {', '.join(metadata['tags'])}",
        f"- **Last verified**: {metadata['lastVerified']:%Y-%m-%d}",
    ]


def _type_name(item: Any) -> str:
    """`Model` of `system.Model@0.0.1`."""
    return str(item.type).split("@")[0].removeprefix("system.")


def main() -> int:
    """Write all, or with `--check` print those that differ and return 1."""
    folders = [module.parent for module in sorted((ROOT / "components").glob("*/component.py"))]
    pages = {folder / "README.md": readme(folder.name) for folder in folders}
    page = UI_PAGE.read_text()
    pages[UI_PAGE] = TABLE.sub(lambda _: texts.table(), page)
    stale = []
    for path, text in pages.items():
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            stale.append(str(path))
    print("\n".join(stale), end="")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
