# shellcheck shell=bash disable=SC2154,SC2034
# Faults around the agent. Read by tests/vm/accept.

# faults around the agent, a quarter of an hour; not part of the whole, for its length
scenario_faults() {
    local ip gw kubectl
    runner || return
    in_vm a1 curl -sS --max-time 3000 "$TOKENS/faults?only=${PIPEOPS_FAULT:-}" >"$out/faults" || bad "the faults did not come to their end"
    while read -r verdict text; do
        case $verdict in ok) ok "$text" ;; WRONG) bad "$text" ;; esac
    done <"$out/faults"
    vm remove a1
}
