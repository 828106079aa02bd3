"""Write components/*/README.md from each component's signature, metadata.yaml and OWNERS. `--check` only compares."""

import importlib
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- custom-content -->"

ABOUT = {
    "step": "Name of the step, for example `prune-1`: it names the MLflow run and the record, and says which arm and "
    "iteration it is of.",
    "iterations": "Iterations of the step's arm: the loop's, or 1 for the control.",
    "experiment": "MLflow experiment; its artifact location is where checkpoints are stored.",
    "run_name": "What people call the run; MLflow shows it under this name.",
    "gated": "Whether the pipeline was compiled with the gate on; `gate.enabled` must say the same.",
    "target": "Below 1: share of all parameters to remove in the whole run; 1 or more: parameters to end with.",
    "cuts": "`uniform` or `cubic`: how the removal is shared out over the iterations.",
    "recovery_tokens": "Tokens of recovery training over all iterations.",
    "tokens": "`uniform` or `doubling`: how these tokens are shared out over the iterations.",
    "seed": "Seed of every draw.",
    "model": "Checkpoint to work on.",
    "scored": "What evaluate-0 wrote: its items must not be trained on.",
    "fallback": "Checkpoint that the iteration started from; the loop continues with it when the gate rejects.",
    "final": "Checkpoint that the loop ended with.",
    "control": "Checkpoint that the control arm ended with, or why it did not finish.",
    "revision": "Commit on the Hugging Face hub; empty for the newest or for a folder.",
    "prune": "Section `prune` of the config.",
    "calibration": "Section `calibration` of the config.",
    "recover": "Section `recover` of the config.",
    "training": "Section `training` of the config.",
    "evaluate": "Section `evaluate` of the config.",
    "gate": "Section `gate` of the config.",
    "registered_model": "Name in the MLflow registry.",
    "settings": "What the config says beside the run's parameters.",
    "out": "Pointer to the new checkpoint: location, digest, MLflow ids. The weights are in the store.",
    "scores": "Pointer to the scores and the outcome of every item.",
    "accepted": "Pointer to the checkpoint that the loop continues with.",
    "metrics": "Accuracy, its interval, items and parameters.",
    "html": "The report as one page.",
    "markdown": "The report as Markdown.",
}
ABOUT_IMPORT = {"model": "Hub id or folder of a Hugging Face checkpoint with safetensors."}


def readme(name: str) -> str:
    """The README of a component; what stands after the mark in the old one is kept."""
    folder = ROOT / "components" / name
    module = importlib.import_module(f"components.{name}.component")
    spec = getattr(module, name).component_spec
    meta = yaml.safe_load((folder / "metadata.yaml").read_text())
    owners = yaml.safe_load((folder / "OWNERS").read_text())
    lines = [f"# {name.replace('_', ' ').title()}", "", f"> **Stability: {meta['stability']}**", ""]
    lines += ["## Overview", "", module.__doc__.strip(), ""]
    lines += ["## Inputs", "", "| Parameter | Type | Default | Description |", "|---|---|---|---|"]
    for key, item in (spec.inputs or {}).items():
        about = (ABOUT_IMPORT if name in ("import_model", "report") else {}).get(key) or ABOUT[key]
        lines.append(
            f"| `{key}` | `{_kind(item)}` | {'none' if not item.optional else f'`{item.default}`'} | {about} |"
        )
    lines += ["", "## Outputs", "", "| Name | Type | Description |", "|---|---|---|"]
    lines += [f"| `{key}` | `{_kind(item)}` | {ABOUT[key]} |" for key, item in (spec.outputs or {}).items()]
    needs = [f"{entry['name']} {entry['version']}" for group in meta["dependencies"].values() for entry in group]
    lines += ["", "## Metadata", "", f"- **Name**: {meta['name']}", f"- **Tier**: {meta['tier']}"]
    lines += [f"- **Stability**: {meta['stability']}", f"- **Dependencies**: {', '.join(needs)}"]
    lines += [f"- **Tags**: {', '.join(meta['tags'])}", f"- **Last verified**: {meta['lastVerified']:%Y-%m-%d}"]
    lines += [f"- **Approvers**: {', '.join(owners['approvers']) or 'none yet'}", "", BEGIN]
    path = folder / "README.md"
    kept = path.read_text().partition(BEGIN)[2] if path.is_file() else "\n"
    return "\n".join(lines) + (kept or "\n")


def _kind(item: object) -> str:
    return str(item.type).split("@")[0].removeprefix("system.")


def main() -> int:
    """Write all, or say which differ."""
    sys.path.insert(0, str(ROOT))
    stale = []
    for folder in sorted((ROOT / "components").iterdir()):
        if (folder / "component.py").is_file():
            text, path = readme(folder.name), folder / "README.md"
            if "--check" not in sys.argv:
                path.write_text(text)
            elif not path.is_file() or path.read_text() != text:
                stale.append(str(path))
    print("\n".join(stale), end="")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
