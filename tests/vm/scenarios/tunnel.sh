# shellcheck shell=bash disable=SC2154,SC2034
# kubectl through the tunnel, and the rights of each role. Read by tests/vm/accept.

# a Runner's way
scenario_tunnel() {
    local pod ip gw kubectl
    runner || return
    want "get" kt get nodes,ns
    want "apply --server-side" kt apply --server-side --field-manager=pipeops-runner -f "$out/web.yaml"
    want "the pod runs" until_true 90 sh -c "$(declare -f in_vm vm); scripts/vm exec a1 kubectl -n production get pods | grep Running"
    pod=$(k a1 -n production get pods -o name | sed -n '1s,pod/,,p')
    kt -n production get pod "$pod" -w -o 'jsonpath={.metadata.labels.seen}{"\n"}' >"$out/watched" 2>/dev/null &
    sleep 1
    kt -n production label pod "$pod" seen=yes >/dev/null
    want "watch sees a change" until_true 20 grep -q yes "$out/watched"
    is "exec, its output" "$(kt -n production exec "$pod" -- echo through)" through
    is "exec with stdin" "$(echo typed | kt -n production exec -i "$pod" -- cat)" typed
    for code in 0 1 137; do exits $code "exec ends with $code" kt -n production exec "$pod" -- sh -c "exit $code"; done
    printf '#!/bin/sh\nstty rows 33 cols 99\nHOME=%s KUBECONFIG=/dev/null exec %s --insecure-skip-tls-verify --server https://%s:%s/k8s --token %s -n production exec -it %s -- sh -c "sleep 1; stty size"\n' \
        "$out" "$kubectl" "$ip" "$gw" "$(token deployer)" "$pod" >"$out/terminal"
    is "exec with a terminal of the right size" "$(sleep 6 | script -qec "sh $out/terminal" /dev/null | tr -d '\r' | grep -c '^33 99$')" 1
    rm "$out/terminal"
    k a1 -n production run talker --image "$image" --image-pull-policy Never --restart Never -- sh -c 'i=0; while :; do echo "line $i"; i=$((i+1)); sleep 0.2; done' >/dev/null
    want "a second pod runs" until_true 60 in_vm a1 sh -c 'kubectl -n production get pod talker | grep Running'
    want "logs -f" bash -c "$(declare -f kt token in_vm vm); out=$out ip=$ip gw=$gw kubectl=$kubectl TOKENS=$TOKENS; timeout 10 bash -c 'true'; kt -n production logs -f talker | sed -n '10q;p' | grep -q 'line 5'"
    want "attach" bash -c "$(declare -f kt token in_vm vm); out=$out ip=$ip gw=$gw kubectl=$kubectl TOKENS=$TOKENS; (timeout 5 bash -c \"\$(declare -f kt token in_vm vm); out=$out ip=$ip gw=$gw kubectl=$kubectl TOKENS=$TOKENS; kt -n production attach talker\" || true) | grep -q '^line'"
    head -c 3000000 /dev/urandom >"$out/blob"
    want "cp there" kt -n production cp "$out/blob" "$pod:/tmp/blob"
    want "and back" kt -n production cp "$pod:/tmp/blob" "$out/blob.back"
    want "unchanged" cmp "$out/blob" "$out/blob.back"
    kt -n production exec "$pod" -- sh -c 'while :; do echo forwarded | busybox nc -l -p 8080; done' >/dev/null 2>&1 &
    kt -n production port-forward "$pod" 18080:8080 >/dev/null 2>&1 &
    want "port-forward" until_true 20 bash -c 'exec 3<>/dev/tcp/127.0.0.1/18080; head -1 <&3 | grep -q forwarded'
    pkill -f "server https://$ip:$gw/k8s" || true
    exits 1 "secrets cannot be listed" kt -n production get secrets
    exits 1 "another namespace cannot be written" kt -n kube-system create configmap x
    want "the API server's audit log names the caller" in_vm a1 sh -c 'grep "\"impersonatedUser\"" /var/log/kube-audit.log | grep pipeops:runner | grep pipeops:deployer | grep -q runner-1'
    want "our audit log verifies" in_vm a1 pipeops audit verify
    vm push a1 "$out/stand" /root/stand
    exits 0 "rights: every verdict as written" in_vm a1 /root/stand rights /etc/rancher/k3s/k3s.yaml
    sed -n 's/^\(WRONG.*\)/          \1/p' "$out/last" | head -30
    sed -n 's/^\(.*verdicts over.*\)/          \1/p; s/^\(NOT RUN.*\)/          \1/p' "$out/last"
    in_vm a1 systemctl stop k3s
    want "the API away: waiting, tunnel up" until_true 40 in_vm a1 sh -c 'systemctl show -p StatusText --value pipeops-agent | grep "^online; tunnel up; kubernetes: waiting"'
    is "and 503 without a Retry-After, so that kubectl says it at once" "$(in_vm a1 curl -s -o /dev/null -D - -H "Authorization: Bearer $(token viewer)" -k "https://127.0.0.1:$gw/k8s/api" | tr -d '\r' | grep -ciE '^HTTP/1.1 503|^retry-after')" 1
    in_vm a1 systemctl start k3s
    want "back within a minute" until_true 60 in_vm a1 sh -c 'systemctl show -p StatusText --value pipeops-agent | grep "^online; tunnel up; kubernetes v"'
    is "uid of the agent is not 0" "$(in_vm a1 sh -c 'stat -c %U /proc/$(systemctl show -p MainPID --value pipeops-agent)')" pipeops-agent
    is "it has no capabilities" "$(in_vm a1 sh -c 'sed -n s/^CapEff:.//p /proc/$(systemctl show -p MainPID --value pipeops-agent)/status')" 0000000000000000
    want "exposure of at most 1.5" in_vm a1 sh -c 'systemd-analyze security pipeops-agent --no-pager | tail -1 | grep -E "level for pipeops-agent.service: (0\.[0-9]|1\.[0-5]) "'
    printf '          agent: %s\n' "$(in_vm a1 sh -c 'grep -E "VmRSS|RssAnon|RssFile" /proc/$(systemctl show -p MainPID --value pipeops-agent)/status' | tr -s ' \t\n' ' ')"
    local k3s; k3s=$(pid_of a1 k3s)
    exits 0 "another URL changes only the agent" in_vm a1 env "PIPEOPS_CONTROL_PLANE_URL=http://127.0.0.1:1" /root/pipeops install-server "${flags[@]}" --components storage
    is "k3s is not restarted" "$(pid_of a1 k3s)" "$k3s"
    want "the agent says so" until_true 30 in_vm a1 sh -c 'systemctl show -p StatusText --value pipeops-agent | grep -v "^online"'
    vm remove a1
}
