"""A finished run as a Markdown table, for a comment: `python -m pipelines.prune_tune_loop.table RUN`."""

import sys
from typing import Any

from pipelines.prune_tune_loop.outcome import result_of


def table(result: dict[str, Any]) -> str:
    """One line for each scored checkpoint."""
    lines = [
        "| arm | iteration | parameters | accuracy | items | recovery tokens | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        interval = "" if row.get("low") is None else f" ({row['low']:.3f} to {row['high']:.3f})"
        cells = [row["arm"], row["iteration"], f"{row['params']:,}", f"{row['accuracy']:.3f}{interval}"]
        cells += [row["items"], f"{row['recovery_tokens']:,}", row["verdict"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    share = result["final"]["share_removed"]
    return "\n".join([*lines, "", f"{share:.1%} of all parameters removed."])


if __name__ == "__main__":
    print(table(result_of(sys.argv[1])))
