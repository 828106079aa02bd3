#!/bin/sh
# Install a lock into VIRTUAL_ENV, in a RUN of the Dockerfile: install-lock LOCK HASHES, where HASHES is uv's option for
# them.
# That RUN mounts /opt/tools, /wheels, uv's cache and the secrets `ca` and `index`.
set -eu

lock=$1
hashes=$2

if [ -s /run/secrets/ca.crt ]; then
    export SSL_CERT_FILE=/run/secrets/ca.crt
fi
if [ -s /run/secrets/index ]; then
    UV_DEFAULT_INDEX=$(cat /run/secrets/index)
    export UV_DEFAULT_INDEX
fi
# A stage that extends another one adds to its environment.
if [ ! -e "$VIRTUAL_ENV/bin/python" ]; then
    python3 -m venv --without-pip "$VIRTUAL_ENV"
fi
# HASHES may be empty, or several options.
# shellcheck disable=SC2086
/opt/tools/bin/uv pip install --cache-dir /root/.cache/uv --link-mode copy --compile-bytecode \
    --find-links /wheels $hashes --requirements "$lock"
