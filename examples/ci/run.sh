#!/usr/bin/env bash
# run.sh CONFIG TABLE [options of submit]: start a run on Kubeflow, wait, and write its result as Markdown.
# Exit codes are those of submit: 0 done, 1 failed, 2 wrong input, 3 gate not passed, 4 timeout.
set -uo pipefail
config=$1 table=$2
shift 2

log=$(mktemp)
trap 'rm -f "$log"' EXIT
ptl submit "$config" "$@" --wait --timeout 21000 2>&1 | tee "$log"
code=${PIPESTATUS[0]}
{
    printf '**ptl %s**: ' "$(basename "$config")"
    case $code in
    0) echo "done" ;;
    3) echo "gate not passed" ;;
    4) echo "still running" ;;
    *) echo "failed" ;;
    esac
    grep -E '^https?://' "$log" || true
    # The result: from the table's title to the link to MLflow.
    result=$(sed -n '/(seed [0-9]*)/,/^MLflow: /p' "$log")
    fence='```'
    [ -z "$result" ] || printf '%s\n%s\n%s\n' "$fence" "$result" "$fence"
} >"$table"
cat "$table"
exit "$code"
