#!/usr/bin/env bash
# A Docker engine and the steps' CPU images on a machine that has neither and can pull nothing.
#
#   .ci/docker.sh run CMD...   engine and images, then CMD with DOCKER_HOST set; stops what it started, whatever happens
#   .ci/docker.sh up           start the engine and keep it up (for development); prints `export DOCKER_HOST=...`
#   .ci/docker.sh build [STEP...]  the CPU base image and the images (default: all three), on the engine that answers
#   .ci/docker.sh down         stop the engine that `up` started and remove its data, images included
#
# An engine that already answers is used as it is and never stopped. `run` exits 77 when no engine can be had.
#
#   PTL_DOCKER_DIR   where the private engine keeps its data (several GB)          default: ${TMPDIR:-/tmp}/ptl-docker
#   PTL_CPU_BASE     name of the CPU base image; made when it is missing           default: ptl-base:cpu
#   PTL_IMAGES       which images `run` builds                                  default: prune recover evaluate
#   PTL_BASE_PYTHON  the interpreter that goes into the base image                 default: the python3 on PATH
#   PIP_CERT, PIP_FIND_LINKS   as for pip: a CA bundle, and a folder of local wheels, for the build
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dir=${PTL_DOCKER_DIR:-${TMPDIR:-/tmp}/ptl-docker}
base=${PTL_CPU_BASE:-ptl-base:cpu}
socket=unix://$dir/docker.sock
started=no

say() { printf 'docker.sh: %s\n' "$*" >&2; }

answers() { command -v docker >/dev/null && docker info >/dev/null 2>&1; }

install_engine() {
    command -v dockerd >/dev/null && command -v mmdebstrap >/dev/null && docker buildx version >/dev/null 2>&1 && return
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    say "installing Debian's docker.io, docker-buildx and mmdebstrap"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        docker.io docker-cli docker-buildx mmdebstrap iptables >&2
}

start_engine() {
    if answers; then
        say "an engine answers: using it"
        return
    fi
    export DOCKER_HOST=$socket
    if answers; then
        say "the engine that \`up\` started answers: using it"
        return
    fi
    install_engine || return 1
    if (unset DOCKER_HOST && answers); then
        unset DOCKER_HOST
        say "the service that the package started answers: using it"
        return
    fi
    mkdir -p "$dir"
    # Own folders and an own socket: nothing of another engine is touched. Its log is the first thing to read on failure.
    setsid dockerd --data-root "$dir/data" --exec-root "$dir/exec" --pidfile "$dir/dockerd.pid" --host "$socket" \
        --log-level warn >"$dir/dockerd.log" 2>&1 </dev/null &
    started=yes
    for _ in $(seq 100); do
        answers && return
        sleep 0.3
    done
    say "dockerd did not answer within 30 s; the end of $dir/dockerd.log:"
    tail -n 20 "$dir/dockerd.log" >&2
    return 1
}

stop_engine() {
    [ -d "$dir" ] || return 0
    local pid=none
    if [ -s "$dir/dockerd.pid" ]; then pid=$(cat "$dir/dockerd.pid"); fi
    # The file may outlive its process, and the number may be somebody else's by now.
    if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ]; then
        kill "$pid"
        for _ in $(seq 100); do
            [ -e "/proc/$pid" ] || break
            sleep 0.3
        done
    fi
    # dockerd may leave mounts behind (its network namespace, its data folder bound to itself): rm would fail on them.
    local mount
    while read -r mount; do umount "$mount"; done < <(awk -v dir="$dir/" 'index($2, dir) == 1 { print $2 }' /proc/mounts | tac)
    rm -rf "$dir"
    say "stopped the engine and removed $dir"
}

# The base image: Debian trixie with the very interpreter that the checkout's tests run with, so that an image and
# the subprocess runner load the same torch build.
make_base() {
    docker image inspect "$base" >/dev/null 2>&1 && return
    local python prefix version packages tree shared
    python=${PTL_BASE_PYTHON:-$(command -v python3)}
    prefix=$("$python" -c 'import sys; print(sys.base_prefix)')
    packages="ca-certificates,libgomp1"
    if [ "$prefix" = /usr ]; then
        packages+=",python3,python3-venv"
    else
        # What the standard library's extension modules link against.
        packages+=",libbz2-1.0,libexpat1,libffi8,liblzma5,libreadline8t64,libsqlite3-0,libssl3t64,libuuid1,zlib1g"
    fi
    say "making $base with $python"
    tree=$(mktemp -d)
    nice mmdebstrap --quiet --variant=minbase --include="$packages" trixie "$tree/root.tar"
    if [ "$prefix" != /usr ]; then
        version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
        # Some interpreters are one file, some keep their code in a shared libpython beside the standard library.
        mapfile -t shared < <(cd "$prefix" && find lib -maxdepth 1 -name 'libpython*')
        # (Flag S: the targets of symbolic links stay as they are.)
        tar -C "$prefix" --exclude=site-packages --exclude=__pycache__ --exclude='*.a' --exclude="lib/$version/test" \
            --exclude="lib/$version/idlelib" --transform 's,^,usr/local/,S' --owner=0 --group=0 \
            -rf "$tree/root.tar" bin/python3 "bin/$version" "lib/$version" "${shared[@]}"
    fi
    docker import "$tree/root.tar" ptl-base:unlinked >/dev/null
    rm -rf "$tree"
    # The interpreter's libpython lies in /usr/local/lib: the loader's cache must know.
    docker build --quiet --tag "$base" - >/dev/null <<'DOCKERFILE'
FROM ptl-base:unlinked
RUN ldconfig && python3 -c "import bz2, ctypes, lzma, sqlite3, ssl, venv, zlib"
DOCKERFILE
}

bake() {
    (cd "$root" && BASE_IMAGE=$base SYSTEM_PACKAGES='' LOCKS=docker/locks/cpu HASHES=--verify-hashes \
        REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown) \
        nice docker buildx bake --file docker/docker-bake.hcl --progress plain --load "$@" >&2)
}

build_images() {
    if ! command -v mmdebstrap >/dev/null || ! docker buildx version >/dev/null 2>&1; then
        install_engine || { say "mmdebstrap and docker buildx are needed"; return 1; }
    fi
    make_base
    local args=() ca=${PIP_CERT:-}
    if [ -n "$ca" ]; then args+=(--set "*.secrets=id=ca,src=$ca"); fi
    if [ -n "${PIP_FIND_LINKS:-}" ]; then args+=(--set "*.contexts.wheels=$PIP_FIND_LINKS"); fi
    say "building $* on $base"
    # Once more: stages that are built at once now and then lose a layer in the engine ("stat .../overlay2/...: no such
    # file or directory"). What was built is kept, so that a build that can not succeed fails again at once.
    bake "${args[@]}" "$@" || bake "${args[@]}" "$@"
}

case ${1:-} in
run)
    shift
    trap 'if [ "$started" = yes ]; then stop_engine; fi' EXIT
    trap 'exit 130' INT TERM
    if ! start_engine; then
        say "skipped: no engine"
        exit 77
    fi
    export PTL_IMAGES=${PTL_IMAGES:-prune recover evaluate}
    read -ra images <<<"$PTL_IMAGES"
    build_images "${images[@]}"
    "$@"
    ;;
up)
    start_engine || { say "no engine"; exit 77; }
    echo "export DOCKER_HOST=${DOCKER_HOST:-unix:///var/run/docker.sock}"
    ;;
build)
    shift
    if ! answers; then export DOCKER_HOST=$socket; fi
    answers || { say "no engine answers; \`.ci/docker.sh up\` starts one"; exit 1; }
    build_images "${@:-default}"
    ;;
down) stop_engine ;;
*)
    sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac
