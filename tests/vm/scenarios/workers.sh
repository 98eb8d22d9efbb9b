# shellcheck shell=bash disable=SC2154,SC2034
# Join, wrong tokens and addresses, an expired token after a reboot, a worker recreated under its old name, pods, leave. Read by tests/vm/accept.

scenario_workers() {
    fresh a1 a2 a3 || return
    listing a2 >"$out/a2.before"
    exits 0 "a server" install a1
    local line token; line=$(join_line a1); token=${line##*.}
    is "ten calls leave one token" "$(for _ in 1 2 3; do join_line a1; done | sort -u | wc -l) $(k a1 -n kube-system get secrets --field-selector type=bootstrap.kubernetes.io/token -o name | wc -l)" "1 1"
    # wrong tokens and servers, before anything is written
    exits 7 "a token of another cluster" join a2 "${line% *} K10$(printf '0%.0s' $(seq 64))::abcdef.0123456789abcdef"
    exits 2 "a mangled token" join a2 "${line% *} ${line#* }x"
    exits 5 "a MASTER that is not there" join a2 "$(vm ip a1 | sed 's/[0-9]*$/250/') ${line#* }"
    exits 5 "a MASTER that refuses" join a2 "${line% *}1 ${line#* }"
    if in_vm a2 sh -c '[ -e /usr/local/bin/k3s ] || [ -e /etc/rancher ] || [ -e /var/lib/pipeops ] || [ -e /usr/local/bin/pipeops ]'; then bad "a refused join wrote something"; else ok "none of them wrote anything"; fi
    exits 0 "a join" join a2 "$line"
    want "the server lists it Ready" in_vm a1 sh -c 'kubectl get nodes a2 | grep -w Ready'
    if in_vm a2 sh -c "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\0' '\n' | grep -q $token'\$'"; then bad "the token is in an argv or environment"; else ok "the token is in no argv and no environment"; fi
    is "the token is in one 0600 file" "$(in_vm a2 sh -c "grep -rl $token /etc /var/lib/pipeops /var/log /run 2>/dev/null | xargs stat -c '%a %n'")" "600 /etc/rancher/k3s/pipeops-token"
    exits 0 "cluster-info on a worker" in_vm a2 pipeops cluster-info
    exits 0 "a re-run on a worker" join a2 "$line"
    says "it changes nothing" "nothing to do"
    # the token expires, the worker reboots
    k a1 -n kube-system delete secret --field-selector type=bootstrap.kubernetes.io/token >/dev/null
    vm stop a2; vm start a2 2>/dev/null
    want "a worker with an expired token is Ready after a reboot" until_true 120 in_vm a2 sh -c 'systemctl is-active k3s-agent'
    want "the server sees it Ready" until_true 60 in_vm a1 sh -c 'kubectl get nodes a2 | grep -w Ready'
    # an API server takes a token that it has just seen for ten seconds more
    refused() { local rc=0; join a3 "$line" --dry-run || rc=$?; [ $rc = 7 ]; }
    until_true 30 refused
    exits 7 "an expired token" join a3 "$line"
    says "it is called expired" "expired or was deleted"
    # a worker put up by plain k3s is as welcome
    line=$(join_line a1)
    in_vm a3 sh -c "cp /opt/release/k3s /usr/local/bin/; mkdir -p /var/lib/rancher/k3s/agent/images; cp /opt/release/*.tar* /var/lib/rancher/k3s/agent/images/; cat > /root/t; systemd-run -q --unit k3s-plain sh -c 'K3S_URL=${line% *} K3S_TOKEN=\$(cat /root/t) exec k3s agent${k3s:+ --kubelet-arg=fail-cgroupv1=false}'" <<<"${line#* }"
    want "a worker put up by plain k3s is listed" until_true 90 in_vm a1 sh -c 'pipeops cluster-info | grep -E "^a3 +Ready"'
    # a re-imaged worker: same name, new machine
    fresh a2
    exits 7 "a re-imaged worker is told what to do" join a2 "$line"
    says "the exact line" "kubectl delete node a2"
    k a1 delete node a2 >/dev/null; sleep 3
    exits 0 "after it, the join works" join a2 "$line"
    vm push a1 "$out/web.yaml" /root/web.yaml; k a1 apply -f /root/web.yaml >/dev/null
    want "pods run on all" k a1 -n production rollout status ds/web --timeout=60s
    local pod; pod=$(k a1 -n production get pods -o wide | awk '/ a2 /{print $1}')
    want "one on a worker resolves names of the cluster" until_true 30 k a1 -n production exec "$pod" -- nslookup kubernetes.default.svc.cluster.local
    want "kubectl top shows the worker" until_true 120 in_vm a1 sh -c 'kubectl top nodes | grep -E "^a2 +[0-9]+m"'
    exits 0 "uninstall of a worker with pods running" in_vm a2 pipeops uninstall --yes
    says "it says what to do on the server" "kubectl delete node a2"
    listing a2 >"$out/a2.after"
    same_listing a2 "the worker is as before but for /var/log/pipeops"
    vm remove a1; vm remove a2; vm remove a3
}
