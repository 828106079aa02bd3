#!/bin/sh
# Resolve the images' locks again: `make lock`. Needs uv; asks the package index that uv is set up for and writes none down.
set -eu

cd "$(dirname "$0")/.."
export UV_CUSTOM_COMPILE_COMMAND="make lock"
# Without this, what is in the old locks would stay: `make lock LOCK_FLAGS=` changes only what must change.
flags=${LOCK_FLAGS---upgrade}

compile() {
    # Universal: the CUDA base brings Python 3.12, the CPU base that of the machine that builds it.
    # shellcheck disable=SC2086  # flags are words
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes $flags "$@"
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
for step in prune recover evaluate; do
    cpu "docker/locks/$step.lock"
done
