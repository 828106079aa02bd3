#!/usr/bin/env bash
# The whole path of a CI job on one machine: compile, images, the run in containers with real S3 and MLflow servers, the
# comparison of the final model with the dense one as the check, the report.
#
#   examples/ci/local_path.sh [CONFIG [--set field=value ...]]     default: tiny.yaml, cut short
#
# Exit code: of the first step that fails; of `ptl compare` (0 not inferior, 3 inferior) when all work.
#
#   PTL_HOME       where everything goes                                               default: .ptl/ci-path
#   MARGIN         loss of accuracy that is tolerated, as a share                      default: 0.05
#   IMAGES=keep    take the images that the engine has; otherwise they are built (seconds when nothing changed)
#   PTL_CPU_BASE   base image, one with Python; taken when the engine has it           default: ptl-base:cpu (.ci/docker.sh)
#   S3_PORT, MLFLOW_PORT   of `ptl up`                                                 default: 8433, 15000
#   PIP_CERT, PIP_INDEX_URL, PIP_FIND_LINKS   as for pip: CA bundle, index, and a folder of wheels, for the images
set -euo pipefail
cd "$(dirname "$0")/../.."

config=${1:-pipelines/prune_tune_loop/configs/tiny.yaml}
options=("${@:2}")
if [ "$#" = 0 ]; then
    options=(--set schedule.iterations=2 --set schedule.target=0.2 --set schedule.recovery_tokens=250000
        --set control=false --set evaluate.speed.repeats=0)
fi
home=${PTL_HOME:-.ptl/ci-path}
base=${PTL_CPU_BASE:-ptl-base:cpu}
mkdir -p "$home"
export COLUMNS=${COLUMNS:-120} # the width of tables in a log

step() { printf '\n== %s\n' "$*"; }

step "compile $config"
ptl compile "$config" -o "$home/pipeline.yaml" "${options[@]}"

if [ "${IMAGES:-}" != keep ]; then
    step "images"
    from=()
    if docker image inspect "$base" >/dev/null 2>&1; then
        from=(--base-image "$base")
        export SYSTEM_PACKAGES=
    fi
    if [ -d "${PIP_FIND_LINKS:-}" ]; then from+=(--wheels "$PIP_FIND_LINKS"); fi
    ptl images build --cpu "${from[@]}"
fi

step "run"
# The servers' addresses and keys, here and for the comparison.
servers=$(ptl up --home "$home" --s3-port "${S3_PORT:-8433}" --mlflow-port "${MLFLOW_PORT:-15000}")
trap 'ptl up --stop --home "$home"' EXIT
eval "$servers"
ptl run "$config" --runner docker --s3 --new --home "$home" "${options[@]}"

step "compare the final model with the dense one"
result=$home/latest/result.json
# MLflow's ids of two evaluations: of the dense model, and of the last one that was not rejected.
evaluated() {
    python - "$result" "$@" <<'PYTHON'
import json, sys
steps = json.load(open(sys.argv[1]))["steps"]
found = [one for one in steps if one["stage"] == "evaluate" and one["decision"] in sys.argv[2:]]
print(found[-1]["run_id"] if found else "")
PYTHON
}
dense=$(evaluated baseline) final=$(evaluated accepted "gate off")
[ -n "$final" ] || { echo "no iteration was accepted: the final model is the dense one" >&2; exit 3; }
verdict=0
ptl compare "$dense" "$final" --margin "${MARGIN:-0.05}" || verdict=$?

step "report"
report=$(realpath "$home/latest")/report.html
[ -s "$report" ] || { echo "no report at $report" >&2; exit 1; }
echo "report: $report"
exit "$verdict"
