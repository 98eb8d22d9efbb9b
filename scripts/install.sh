#!/bin/sh
# Fetches pipeops, verifies it, and hands over to it, unattended:
#   curl -fsSL …/agent | AGENT_TOKEN=… sh                                          a server
#   curl -fsSL …/agent | NODE_TYPE=agent K3S_URL=… K3S_TOKEN=… sh                  a worker
#   sh install.sh cluster-info | install-server … | join-worker … | uninstall …    any command
# A program that is installed already is used as it is, without a network; PIPEOPS_UPDATE=1 fetches the release's.
# PIPEOPS_RELEASE_URL names another place with the same files: pipeops-linux-ARCH and sha256sums.txt.
# Exit codes are those of pipeops: 2 usage, 3 unsuitable machine, 5 download, 6 verification, …
\unalias -a 2>/dev/null || :
set -eu
# tokens are in variables from here on: no trace of the shell shows them, no child inherits them
set +avx

# everything is in functions: a script that was cut off on the way does nothing
main() {
    surroundings
    release=${PIPEOPS_RELEASE_URL:-https://get.pipeops.io}
    release=${release%/}
    agent_token=${AGENT_TOKEN:-}
    k3s_token=${K3S_TOKEN:-}
    unset AGENT_TOKEN K3S_TOKEN
    if [ $# -eq 0 ]; then
        set -- install-server
    fi
    if [ "$1" = install-server ]; then
        case ${NODE_TYPE:-server} in
            server) ;;
            agent)
                [ -n "${K3S_URL:-}" ] && [ -n "$k3s_token" ] || fail 2 "NODE_TYPE=agent needs K3S_URL and K3S_TOKEN"
                shift
                set -- join-worker "$K3S_URL" "$@"
                ;;
            *) fail 2 "NODE_TYPE is $NODE_TYPE; it is server or agent" ;;
        esac
    fi
    case $(uname -s) in Linux) ;; *) fail 3 "pipeops runs on Linux, this is $(uname -s)" ;; esac
    become_root
    dir='' rooms=''
    trap 'leave' EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    installed || download

    # sudo drops the environment: what is no secret goes as options, secrets on a descriptor
    token=''
    case $1 in
        install-server)
            [ -z "${PIPEOPS_CONTROL_PLANE_URL:-}" ] || set -- "$@" --control-plane-url "$PIPEOPS_CONTROL_PLANE_URL"
            [ -z "${PIPEOPS_CONTROL_PLANE_PIN:-}" ] || set -- "$@" --control-plane-pin "$PIPEOPS_CONTROL_PLANE_PIN"
            [ -z "${CLUSTER_NAME:-}" ] || set -- "$@" --cluster-name "$CLUSTER_NAME"
            [ -z "${CLUSTER_LABELS:-}" ] || set -- "$@" --cluster-label "$CLUSTER_LABELS"
            [ -z "$agent_token" ] || { token=$agent_token; set -- "$@" --agent-token-file -; }
            set -- "$@" --yes
            ;;
        join-worker)
            [ -z "$k3s_token" ] || { token=$k3s_token; set -- "$@" --token-file -; }
            set -- "$@" --yes
            ;;
    esac
    [ -z "${LOG_LEVEL:-}" ] || set -- "$@" --log-level "$LOG_LEVEL"
    # whatever the caller's umask is: k3s and its pods read what is made from here on
    umask 022
    # printf is part of the shell: the token is in no argv
    code=0
    if [ -n "$token" ]; then
        printf '%s\n' "$token" | $as_root "$program" "$@" || code=$?
    else
        $as_root "$program" "$@" </dev/null || code=$?
    fi
    exit "$code"
}

fail() {
    code=$1
    shift
    echo "error: $*" >&2
    exit "$code"
}

# Nothing of the current directory is run, and nothing that the caller's environment would slip under our children.
# Root by plain `su` and cron have no sbin in their PATH.
surroundings() {
    unset IFS ENV BASH_ENV CDPATH
    umask 077
    rest=${PATH:-}: path=''
    while [ -n "$rest" ]; do
        case ${rest%%:*} in /*) path=$path${path:+:}${rest%%:*} ;; esac
        rest=${rest#*:}
    done
    for entry in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin; do
        case :$path: in *:"$entry":*) ;; *) path=$path${path:+:}$entry ;; esac
    done
    export PATH="$path"
}

become_root() {
    as_root=''
    [ "$(id -u)" != 0 ] || return 0
    command -v sudo >/dev/null 2>&1 || fail 3 "this needs root, and sudo is not here: run it as root"
    as_root=sudo
    # without a terminal sudo cannot ask: told before anything is fetched
    if ! (exec 3<>/dev/tty) 2>/dev/null; then
        sudo true </dev/null >/dev/null 2>&1 ||
            fail 3 "this needs root, and sudo does not give it without a terminal to ask on: run it as root, or from a terminal"
    fi
}

# ours FILE: nobody but root and the caller can change it, or put another in its place. -O is of the shell itself.
ours() {
    at=$1
    while :; do
        state=$(LC_ALL=C ls -ldn -- "$at" 2>/dev/null | { read -r mode _ owner _ || :; echo "$mode $owner"; })
        case ${state#* } in
            0) ;;
            *) [ -O "$at" ] || [ "${state#* }" = "${SUDO_UID:-none}" ] || return 1 ;;
        esac
        case ${state%% *} in
            # in a sticky directory others cannot rename what is not theirs
            d????????[tT]*) [ -d "$1" ] || [ "$at" != "${1%/*}" ] || return 1 ;;
            l* | ?????w* | ????????w*) return 1 ;;
            [d-]*) ;;
            *) return 1 ;;
        esac
        [ "$at" != / ] || return 0
        at=${at%/*}
        at=${at:-/}
    done
}

# The program that is here already, where it is safe to run and does run.
installed() {
    [ -z "${PIPEOPS_UPDATE:-}" ] || return 1
    program=$(command -v pipeops) || return 1
    program=$(readlink -f -- "$program") && ours "$program" || return 1
    # a damaged one, or one of another machine, cannot be run at all
    code=0
    "$program" --version </dev/null >/dev/null 2>&1 || code=$?
    [ "$code" -lt 126 ]
}

download() {
    case $(uname -m) in
        x86_64 | amd64) arch=amd64 ;;
        aarch64 | arm64) arch=arm64 ;;
        armv7* | armhf) arch=arm ;;
        *) fail 3 "there is no pipeops for $(uname -m)" ;;
    esac
    room
    fetch "$release/sha256sums.txt" "$dir/sums"
    fetch "$release/pipeops-linux-$arch" "$dir/pipeops"
    wanted=$(awk -v f="pipeops-linux-$arch" '{ n = $2; sub(/^\*/, "", n); if (n == f) { print $1; exit } }' "$dir/sums")
    [ -n "$wanted" ] || fail 6 "$release/sha256sums.txt does not list pipeops-linux-$arch"
    have=$(sha256sum "$dir/pipeops" | awk '{ print $1 }')
    [ "$wanted" = "$have" ] || fail 6 "pipeops-linux-$arch is damaged or not genuine: expected sha256 $wanted, received $have"
    chmod 0755 "$dir/pipeops"
    program=$dir/pipeops
    [ "$runs" = yes ] || program=$(roots_room) || fail 3 "$unfit"
}

# A directory of our own to work in, and whether programs run there: /tmp may be full, read-only or mounted noexec.
room() {
    dir='' runs='' unfit='no directory was found in which a downloaded program can run; set TMPDIR to one of yours, on a file system without noexec:'
    more=''
    [ "$(id -u)" != 0 ] || more='/var/lib /usr/local/lib /root'
    for base in "${TMPDIR:-}" /tmp "${XDG_RUNTIME_DIR:-}" /var/tmp "${XDG_CACHE_HOME:-}" "${HOME:+$HOME/.cache}" $more; do
        case $base in /*) ;; *) continue ;; esac
        base=$(readlink -f -- "$base") && [ -d "$base" ] || continue
        if ! ours "$base"; then unfit="$unfit $base (others can write there),"; continue; fi
        made=$(mktemp -d "$base/pipeops.XXXXXXXX" 2>/dev/null) || {
            made=$base/pipeops.$$
            mkdir -m 0700 "$made" 2>/dev/null || { unfit="$unfit $base (cannot be written),"; continue; }
        }
        rooms="$made
$rooms"
        free=$(df -Pk "$made" 2>/dev/null | awk 'NR == 2 { print $4 }')
        case $free in '' | *[!0-9]*) free=65536 ;; esac
        if [ "$free" -lt 32768 ]; then unfit="$unfit $base (full),"; continue; fi
        [ -n "$dir" ] || dir=$made
        if printf '#!/bin/sh\n' 2>/dev/null >"$made/try" && chmod 0700 "$made/try" && "$made/try" 2>/dev/null; then
            dir=$made runs=yes
            return
        fi
        unfit="$unfit $base (noexec),"
    done
    unfit=${unfit%,}
    [ -n "$dir" ] && [ -n "$as_root" ] || fail 3 "$unfit"
}

# Where the caller has no directory in which programs run, root may have one.
roots_room() {
    for base in /var/lib /usr/local/lib /root; do
        made=$base/pipeops.$$
        $as_root mkdir -m 0755 "$made" >/dev/null 2>&1 || continue
        $as_root cp "$dir/pipeops" "$made/pipeops" >/dev/null && "$made/pipeops" --version </dev/null >/dev/null 2>&1 &&
            { echo "$made/pipeops"; return; }
        $as_root rm -rf "$made" >/dev/null
    done
    return 1
}

leave() {
    case ${program:-} in */pipeops.$$/pipeops) $as_root rm -rf "${program%/*}" >/dev/null 2>&1 || : ;; esac
    printf '%s' "$rooms" | while read -r made; do rm -rf "$made"; done
}

# fetch URL FILE: bounded, tried again, never half a file under its name
fetch() {
    try=0
    while :; do
        code=0
        # shellcheck disable=SC2046 # options are words
        if command -v curl >/dev/null 2>&1; then
            curl -fsSL $(https_only "$1") --connect-timeout 10 --speed-limit 1 --speed-time 15 -o "$2.part" "$1" 2>"$2.err" || code=$?
            [ "$code" != 23 ] || fail 3 "$2 cannot be written: the disk is full"
        elif command -v wget >/dev/null 2>&1; then
            # of busybox' wget not even -T is there for certain
            case $(wget --version 2>/dev/null) in
                *GNU*) wget -nv -t 1 -T 15 -O "$2.part" "$1" 2>"$2.err" || code=$? ;;
                *) wget -q -O "$2.part" "$1" 2>"$2.err" || code=$? ;;
            esac
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

# a release that is asked for by https is not taken from where a redirect leaves it
https_only() {
    case $1 in https:*) echo "--proto =https" ;; esac
}

main "$@"
