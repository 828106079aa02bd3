#!/bin/sh
# Resolve the images' locks again: `make lock`. Needs uv; asks the package index that uv is set up for, and names none.
set -eu

cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
export UV_CUSTOM_COMPILE_COMMAND="make lock"
# Newest releases; `make lock UPGRADE=` keeps the pins that still satisfy setup.cfg.
flags=${UPGRADE---upgrade}

compile() {
    # Universal: the CUDA base brings Python 3.12, the CPU base that of the machine that builds it.
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes ${flags:+"$flags"} "$@"
}

# Without torch's CUDA libraries, and torch without hashes: the CPU build of the same release is another file.
cpu() {
    awk '
        /^[a-z0-9]/ { name = $1; sub(/==.*/, "", name) }
        name ~ /^(nvidia|cuda)-/ || name == "triton" { next }
        name == "torch" && /^torch==/ { sub(/ *\\$/, "") }
        name == "torch" && /--hash=/ { next }
        { print }
    ' "$1" >"docker/locks/cpu/$(basename "$1")"
}

mkdir -p docker/locks/cpu
compile docker/locks/build.in -o docker/locks/build.lock
compile setup.cfg --extra prune -c docker/locks/constraints.txt -o docker/locks/prune.lock
# Prune's image is the first layers of the other two: what it holds must be the same there.
for step in recover evaluate; do
    compile setup.cfg --extra "$step" -c docker/locks/constraints.txt -c docker/locks/prune.lock -o "docker/locks/$step.lock"
done
# One Python and one platform: vLLM's wheels are for CUDA on Linux, and its tree is large.
uv pip compile --quiet --python-version 3.12 --python-platform x86_64-unknown-linux-gnu --generate-hashes \
    ${flags:+"$flags"} setup.cfg docker/locks/vllm.in --extra evaluate -o docker/locks/evaluate-vllm.lock
for step in prune recover evaluate; do
    cpu "docker/locks/$step.lock"
done
