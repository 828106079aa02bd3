"""What a run that succeeded ended with: its result.json, its gate, and its table for a comment in Markdown.

`python -m pipelines.prune_tune_loop.outcome RUN` prints the table.
"""

import os
import sys
from typing import Any

from ptl.errors import InputError, WorkError
from ptl.lineage import locate


def result_of(run_id: str) -> dict[str, Any]:
    """A run's result.json, from its MLflow run. Raises WorkError where it cannot be read from here."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise WorkError(
            "the run succeeded, but its result is in MLflow, and MLFLOW_TRACKING_URI is not set here",
            remedy="set it (and the S3 credentials), or do without --wait",
        )
    try:
        return locate.result(run_id)
    except InputError as error:
        # The user's input was right: it is the run's own record that is missing.
        raise WorkError(f"the run succeeded, but its result.json cannot be read: {error}") from error


def terminal_text(result: dict[str, Any], run_id: str, page: str) -> str:
    """The table, the verdict, and where the report and the run's page in MLflow are, as `ptl run` prints them."""
    from ptl.report.render import terminal_text

    report = f"`ptl report {run_id}` writes it here; in MLflow it is an artifact of the run, report/report.html"
    # The images' version of ptl may be another one.
    try:
        return terminal_text(result | {"mlflow": result["mlflow"] | {"url": page}}, report)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        return f"another version of ptl has written the result ({error!r})\nReport: {report}\nMLflow: {page}"


# The table in Markdown, from the fields of the rows in result.json
HEADING = """\
| arm | iteration | parameters | accuracy | items | recovery tokens | verdict |
|---|---|---|---|---|---|---|"""
LINE = "| {arm} | {iteration} | {params:,} | {accuracy} | {items} | {recovery_tokens:,} | {verdict} |"


def gate_passed(result: dict[str, Any]) -> tuple[bool, str]:
    """Whether the loop reached its end, with its last iteration accepted; and the sentence that says so."""
    # The control has no gate, and iteration 0 is the dense model.
    iterations = [row for row in result["rows"] if row["arm"] == "loop" and row["iteration"] > 0]
    if not iterations:
        return False, "no iteration was scored"
    last = max(iterations, key=lambda row: row["iteration"])
    share = result["final"]["share_removed"]
    sentence = "iteration {iteration} {verdict}".format_map(last)
    return last["verdict"] == "accepted", f"{sentence}, {share:.1%} removed"


def markdown_table(result: dict[str, Any]) -> str:
    """One line for each scored checkpoint, and below them the share of parameters that was removed."""
    lines = [HEADING]
    for row in result["rows"]:
        accuracy = "{accuracy:.3f}"
        # With the interval, where the evaluation has one.
        if row.get("low") is not None:
            accuracy += " ({low:.3f} to {high:.3f})"
        lines.append(LINE.format_map(row | {"accuracy": accuracy.format_map(row)}))
    share = result["final"]["share_removed"]
    lines += ["", f"{share:.1%} of all parameters removed."]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table(result_of(sys.argv[1])))
