#!/bin/sh
# Fetches pipeops, verifies it, and hands over to it, unattended:
#   curl -fsSL …/install.sh | AGENT_TOKEN=… sh                                     a server
#   curl -fsSL …/install.sh | NODE_TYPE=agent K3S_URL=… K3S_TOKEN=… sh             a worker
#   sh install.sh cluster-info | install-server … | join-worker … | uninstall …    any command
# PIPEOPS_RELEASE_URL names another place with the same files: pipeops-linux-ARCH and sha256sums.txt.
# Exit codes are those of pipeops: 2 usage, 3 unsuitable machine, 5 download, 6 verification, …
set -eu

# everything is in functions: a script that was cut off on the way does nothing
main() {
    release=${PIPEOPS_RELEASE_URL:-https://get.pipeops.io}
    release=${release%/}
    # tokens leave the environment before any other program is started
    agent_token=${AGENT_TOKEN:-}
    k3s_token=${K3S_TOKEN:-}
    unset AGENT_TOKEN K3S_TOKEN

    case $(uname -s) in Linux) ;; *) fail 3 "pipeops runs on Linux, this is $(uname -s)" ;; esac
    case $(uname -m) in
        x86_64 | amd64) arch=amd64 ;;
        aarch64 | arm64) arch=arm64 ;;
        armv7* | armhf) arch=arm ;;
        *) fail 3 "there is no pipeops for $(uname -m)" ;;
    esac
    as_root=''
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null 2>&1 || fail 3 "this needs root, and sudo is not here: run it as root"
        as_root=sudo
    fi

    dir=$(mktemp -d) || fail 1 "no temporary directory can be made"
    trap 'rm -rf "$dir"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    fetch "$release/sha256sums.txt" "$dir/sums"
    fetch "$release/pipeops-linux-$arch" "$dir/pipeops"
    wanted=$(awk -v f="pipeops-linux-$arch" '{ n = $2; sub(/^\*/, "", n); if (n == f) { print $1; exit } }' "$dir/sums")
    [ -n "$wanted" ] || fail 6 "$release/sha256sums.txt does not list pipeops-linux-$arch"
    have=$(sha256sum "$dir/pipeops" | awk '{ print $1 }')
    [ "$wanted" = "$have" ] || fail 6 "pipeops-linux-$arch is damaged or not genuine: expected sha256 $wanted, received $have"
    chmod 0755 "$dir/pipeops"

    if [ $# -eq 0 ]; then
        set -- install-server
    fi
    # sudo drops the environment: what is no secret goes as options, secrets on a descriptor
    case $1 in
        install-server)
            case ${NODE_TYPE:-server} in
                server) ;;
                agent)
                    [ -n "${K3S_URL:-}" ] && [ -n "$k3s_token" ] || fail 2 "NODE_TYPE=agent needs K3S_URL and K3S_TOKEN"
                    shift
                    set -- join-worker "$K3S_URL" "$@"
                    ;;
                *) fail 2 "NODE_TYPE is $NODE_TYPE; it is server or agent" ;;
            esac
            ;;
    esac
    command=$1
    token=''
    case $command in
        install-server)
            [ -z "${PIPEOPS_CONTROL_PLANE_URL:-}" ] || set -- "$@" --control-plane-url "$PIPEOPS_CONTROL_PLANE_URL"
            [ -z "${PIPEOPS_CONTROL_PLANE_PIN:-}" ] || set -- "$@" --control-plane-pin "$PIPEOPS_CONTROL_PLANE_PIN"
            [ -z "${CLUSTER_NAME:-}" ] || set -- "$@" --cluster-name "$CLUSTER_NAME"
            [ -z "$agent_token" ] || { token=$agent_token; set -- "$@" --agent-token-file -; }
            set -- "$@" --yes
            ;;
        join-worker)
            [ -z "$k3s_token" ] || { token=$k3s_token; set -- "$@" --token-file -; }
            set -- "$@" --yes
            ;;
    esac
    [ -z "${LOG_LEVEL:-}" ] || set -- "$@" --log-level "$LOG_LEVEL"
    # printf is part of the shell: the token is in no argv
    code=0
    if [ -n "$token" ]; then
        printf '%s\n' "$token" | $as_root "$dir/pipeops" "$@" || code=$?
    else
        $as_root "$dir/pipeops" "$@" </dev/null || code=$?
    fi
    exit "$code"
}

fail() {
    code=$1
    shift
    echo "error: $*" >&2
    exit "$code"
}

# fetch URL FILE: bounded, tried again, never half a file under its name
fetch() {
    try=0
    while :; do
        code=0
        if command -v curl >/dev/null 2>&1; then
            curl -fsSL --connect-timeout 10 --speed-limit 1 --speed-time 15 -o "$2.part" "$1" 2>"$2.err" || code=$?
        elif command -v wget >/dev/null 2>&1; then
            wget -q -T 15 -O "$2.part" "$1" 2>"$2.err" || code=$?
        else
            fail 3 "neither curl nor wget is here"
        fi
        if [ "$code" = 0 ]; then
            mv "$2.part" "$2"
            return
        fi
        try=$((try + 1))
        [ "$try" -lt 3 ] || fail 5 "cannot download $1: $(tail -n 1 "$2.err")"
        sleep "$try"
    done
}

main "$@"
