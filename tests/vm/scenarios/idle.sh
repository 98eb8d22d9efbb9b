# shellcheck shell=bash disable=SC2154,SC2034
# Streams that are silent for ten minutes. Read by tests/vm/accept.

# ten minutes in which nothing is said; not part of the whole, for its length
scenario_idle() {
    local pod ip gw kubectl
    runner || return
    kt apply --server-side -f "$out/web.yaml" >/dev/null
    want "the pod runs" until_true 90 sh -c "$(declare -f in_vm vm); scripts/vm exec a1 kubectl -n production get pods | grep Running"
    pod=$(k a1 -n production get pods -o name | sed -n '1s,pod/,,p')
    mkfifo "$out/typed"
    kt -n production exec -i "$pod" -- cat <"$out/typed" >"$out/echoed" 2>&1 &
    local exec=$!
    exec 7>"$out/typed"
    kt -n production get pod "$pod" -w -o 'jsonpath={.metadata.labels.late}{"\n"}' >"$out/watched" 2>&1 &
    local watch=$!
    sleep 600
    want "an idle exec is alive after 10 minutes" kill -0 $exec
    want "an idle watch is alive after 10 minutes" kill -0 $watch
    echo still there >&7
    want "what is typed comes back" until_true 10 grep -q 'still there' "$out/echoed"
    kt -n production label pod "$pod" late=yes >/dev/null
    want "a change is seen" until_true 10 grep -q yes "$out/watched"
    exec 7>&-
    kill $watch $exec 2>/dev/null || true
    rm "$out/typed"
    vm remove a1
}
