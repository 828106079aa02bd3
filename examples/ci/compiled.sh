#!/usr/bin/env bash
# Every shipped config compiles to the pipeline whose digest is in git, so a change of a compiled YAML is one that a
# reviewer sees. When the change is intended, run `examples/ci/compiled.sh --update` and commit tests/golden.
# Otherwise the compiled files stay in the folder that is printed, to compare them with those of another commit.
set -euo pipefail
cd "$(dirname "$0")/../.."

golden=$PWD/tests/golden
work=$(mktemp -d)
for config in pipelines/prune_tune_loop/configs/*.yaml; do
    compiled=$work/$(basename "$config")
    ptl compile "$config" -o "$compiled"
    sed -i 's/^sdkVersion: .*/sdkVersion: any/' "$compiled"
done
cd "$work"
if [ "${1:-}" = --update ]; then
    sha256sum -- *.yaml >"$golden/compiled.sha256"
    cp tiny.yaml "$golden/tiny.yaml"
elif ! sha256sum --check --quiet "$golden/compiled.sha256"; then
    diff -u "$golden/tiny.yaml" tiny.yaml || true
    echo "a compiled pipeline differs from tests/golden; the new ones are in $work" >&2
    exit 1
fi
rm -r "$work"
