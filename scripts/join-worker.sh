#!/bin/sh
# Makes this machine a worker:
#   sh join-worker.sh <MASTER_IP> <CLUSTER_TOKEN>                                  the token may also come in K3S_TOKEN
#   curl -fsSL …/join-worker | bash -s <MASTER_IP> <CLUSTER_TOKEN>
# The work is install.sh's: the one beside this script, where this is a file that only root and the caller can
# change; else that of the release.
\unalias -a 2>/dev/null || :
set -eu
# the token is in a variable from here on: no trace of the shell shows it, no child inherits it
set +avx

join() {
    unset IFS ENV BASH_ENV CDPATH
    # nothing of the current directory is run
    rest=${PATH:-}: path=''
    while [ -n "$rest" ]; do
        case ${rest%%:*} in /*) path=$path${path:+:}${rest%%:*} ;; esac
        rest=${rest#*:}
    done
    export PATH="$path${path:+:}/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    if [ $# -lt 1 ] || [ $# -gt 2 ]; then
        echo "usage: join-worker.sh <MASTER_IP> <CLUSTER_TOKEN>" >&2
        exit 2
    fi
    token=${2:-${K3S_TOKEN:-}}
    unset K3S_TOKEN
    # shellcheck disable=SC2034
    case $1 in
        [Hh][Tt][Tt][Pp][Ss]://*) K3S_URL=https://${1#*://} ;;
        *://*) echo "error: a server is reached by https" >&2; exit 2 ;;
        # not shown: it may be the token
        K10*) echo "error: MASTER comes first, then the token" >&2; exit 2 ;;
        \[*) K3S_URL=https://$1 ;;
        *:*:*) K3S_URL=https://[$1]:6443 ;;
        *:*) K3S_URL=https://$1 ;;
        *) K3S_URL=https://$1:6443 ;;
    esac
    if [ -z "$token" ]; then
        echo "error: a join token is needed: 'pipeops cluster-info --join' on the server prints it" >&2
        exit 2
    fi
    set --
    if beside; then
        hand_over
        # shellcheck source=/dev/null
        . "$script"
    fi
    release=${PIPEOPS_RELEASE_URL:-https://get.pipeops.io}
    from=${release%/}/install.sh
    text=''
    for pause in 1 2 0; do
        if text=$(load "$from") && [ "${text##*
}" = 'main "$@"' ]; then
            hand_over
            eval "$text"
        fi
        sleep "$pause"
    done
    echo "error: cannot download $from" >&2
    exit 5
}

# What install.sh reads, in this very process: in no environment and no argv.
hand_over() {
    # shellcheck disable=SC2034 # install.sh reads them
    NODE_TYPE=agent K3S_TOKEN=$token
}

# A whole file on standard output.
load() {
    # shellcheck disable=SC2046 # options are words
    if command -v curl >/dev/null 2>&1; then
        curl -fsSL $(case $1 in https:*) echo "--proto =https" ;; esac) --connect-timeout 10 --speed-limit 1 --speed-time 15 "$1"
    else
        wget -q -O - "$1"
    fi
}

# The install.sh beside this script. Through a pipe $0 is the shell's name, which says nothing about files here: a script
# that was read from a file is open in this very shell.
beside() {
    script=''
    for descriptor in /proc/$$/fd/*; do
        case $descriptor in */[012]) continue ;; esac
        # shellcheck disable=SC3013 # dash, bash and busybox have -ef
        if [ -f "$descriptor" ] && [ "$descriptor" -ef "$0" ]; then
            script=$(readlink -- "$descriptor")
            break
        fi
    done
    [ -n "$script" ] || return 1
    script=${script%/*}/install.sh
    [ -f "$script" ] || return 1
    if ! ours "$script"; then
        echo "note: $script is not used: others than you and root can change it, or its directory" >&2
        return 1
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

join "$@"
