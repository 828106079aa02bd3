#!/bin/sh
# Resolve all exact versions again: `make lock`. constraints.txt is what `make install` takes, and the images' locks are
# resolved within it, so that an image holds what the tests ran with. Needs uv; asks the package index that uv is set up
# for, and names none.
set -eu

cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
export UV_CUSTOM_COMPILE_COMMAND="make lock"
# Newest releases; `make lock UPGRADE=` keeps the pins that still satisfy setup.cfg.
flags=${UPGRADE---upgrade}

# Universal: the CUDA base brings Python 3.12, the CPU base that of the machine that builds it.
compile() {
    uv pip compile --quiet --universal --python-version 3.11 ${flags:+"$flags"} "$@"
}

# A CPU build of the same torch release must satisfy the pin too, whatever its local version; the CUDA build pins its own
# CUDA libraries.
any_build() {
    awk '
        /^(nvidia|cuda)-/ || /^triton==/ { next }
        /^torch==/ { split($1, part, /[=.]+/); sub(/^torch==[^ ]+/, "torch==" part[2] "." part[3] ".*") }
        { print }
    '
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
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
cp constraints.txt "$pins" # without --upgrade they are kept
compile setup.cfg --extra dev -c docker/locks/caps.txt --no-annotate -o "$pins"
any_build <"$pins" >constraints.txt

compile docker/locks/build.in --generate-hashes -o docker/locks/build.lock
for step in prune recover evaluate; do
    compile setup.cfg --extra "$step" -c constraints.txt --generate-hashes -o "docker/locks/$step.lock"
    cpu "docker/locks/$step.lock"
done
# With torch of the same release as the steps, for the same drivers.
compile docker/locks/llmcompressor.in -c docker/locks/caps.txt --generate-hashes -o docker/locks/llmcompressor.lock
cpu docker/locks/llmcompressor.lock
# One Python and one platform: vLLM's wheels are for CUDA on Linux, and its tree is large.
uv pip compile --quiet --python-version 3.12 --python-platform x86_64-unknown-linux-gnu --generate-hashes \
    ${flags:+"$flags"} setup.cfg docker/locks/vllm.in --extra evaluate -o docker/locks/evaluate-vllm.lock
