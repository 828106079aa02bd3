#!/usr/bin/env bash
# Every shipped config compiles, and to the pipeline that is in git: a change of the compiled YAML is a change that a
# reviewer sees. When it is intended: examples/ci/compiled.sh --update, and commit the files.
set -euo pipefail
cd "$(dirname "$0")/../.."

keep=tests/golden
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
changed=0
for config in pipelines/prune_tune_loop/configs/*.yaml; do
    name=$(basename "$config")
    ptl compile "$config" -o "$work/$name"
    sed -i 's/^sdkVersion: .*/sdkVersion: any/' "$work/$name"
    [ -f "$keep/$name" ] || continue
    if [ "${1:-}" = --update ]; then
        cp "$work/$name" "$keep/$name"
    elif ! diff -u "$keep/$name" "$work/$name"; then
        echo "$name: the compiled pipeline differs from $keep/$name" >&2
        changed=1
    fi
done
exit $changed
