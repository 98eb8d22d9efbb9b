#!/bin/sh
# join-worker.sh <MASTER_IP> <CLUSTER_TOKEN>: makes this machine a worker. The token may also come in K3S_TOKEN.
set -eu

main() {
    if [ $# -lt 1 ] || [ $# -gt 2 ]; then
        echo "usage: join-worker.sh <MASTER_IP> <CLUSTER_TOKEN>" >&2
        exit 2
    fi
    case $1 in
        https://*) K3S_URL=$1 ;;
        *://*) echo "error: $1: a server is reached by https" >&2; exit 2 ;;
        *:*:*) K3S_URL=https://[$1]:6443 ;;
        *:*) K3S_URL=https://$1 ;;
        *) K3S_URL=https://$1:6443 ;;
    esac
    [ $# -lt 2 ] || K3S_TOKEN=$2
    if [ -z "${K3S_TOKEN:-}" ]; then
        echo "error: a join token is needed: 'pipeops cluster-info --join' on the server prints it" >&2
        exit 2
    fi
    NODE_TYPE=agent
    export NODE_TYPE K3S_URL K3S_TOKEN
    here=$(dirname "$0")
    if [ -r "$here/install.sh" ]; then
        exec sh "$here/install.sh"
    fi
    release=${PIPEOPS_RELEASE_URL:-https://get.pipeops.io}
    dir=$(mktemp -d)
    trap 'rm -rf "$dir"' EXIT
    # the secret is not for the downloader
    (unset K3S_TOKEN; curl -fsSL --retry 2 --connect-timeout 10 --speed-limit 1 --speed-time 15 -o "$dir/install.sh" "${release%/}/install.sh") || {
        echo "error: cannot download ${release%/}/install.sh" >&2
        exit 5
    }
    code=0
    sh "$dir/install.sh" || code=$?
    exit "$code"
}

main "$@"
