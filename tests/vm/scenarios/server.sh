# shellcheck shell=bash disable=SC2154,SC2034
# Install, re-run, change, a setting that is taken back, a reboot, and an uninstall that leaves nothing. Read by tests/vm/accept.

scenario_server() {
    fresh a1 || return
    listing a1 >"$out/a1.before"
    exits 0 "a fresh install" install a1
    is "exactly the namespaces" "$(k a1 get ns -o name | sed 's#.*/##' | grep -vE '^(default|kube-.*)$' | sort | tr '\n' ' ')" "beta monitoring pipeops production "
    is "production enforces baseline, warns restricted" "$(k a1 get ns production -o jsonpath='{.metadata.labels.pod-security\.kubernetes\.io/enforce} {.metadata.labels.pod-security\.kubernetes\.io/warn}')" "baseline restricted"
    is "pipeops enforces restricted" "$(k a1 get ns pipeops -o jsonpath='{.metadata.labels.pod-security\.kubernetes\.io/enforce}')" "restricted"
    is "kubeconfig 0600" "$(in_vm a1 stat -c %a /etc/rancher/k3s/k3s.yaml)" "600"
    k a1 create secret generic planted --from-literal=x=clear-text-canary-4711-in-plain-text >/dev/null
    sleep 1
    if in_vm a1 grep -rqa clear-text-canary-4711-in-plain-text /var/lib/rancher/k3s/server/db; then bad "a Secret is in clear in the datastore"; else ok "a Secret is not in clear in the datastore"; fi
    is "the agent is ready, as its own user without capabilities" "$(in_vm a1 sh -c 'p=$(systemctl show -p MainPID --value pipeops-agent); echo $(systemctl is-active pipeops-agent) $(stat -c %U /proc/$p) $(grep CapEff /proc/$p/status | cut -f2)')" "active pipeops-agent 0000000000000000"
    want "exposure at most 1.5" in_vm a1 sh -c 'systemd-analyze security pipeops-agent.service --no-pager | tail -1 | grep -oE "[0-9]+\.[0-9]+" | awk "{ exit \$1 > 1.5 }"'
    want "the agent sees the cluster" until_true 30 in_vm a1 sh -c 'systemctl show -p StatusText pipeops-agent | grep -q "1 of 1 nodes ready"'
    want "kubectl top shows the node" until_true 120 in_vm a1 sh -c 'kubectl top nodes | grep -E "^a1 +[0-9]+m"'
    local pid; pid=$(pid_of a1 k3s); local t0=$SECONDS
    exits 0 "a re-run" install a1
    says "the re-run changes nothing" "nothing to do"
    is "the re-run restarts nothing" "$(pid_of a1 k3s)" "$pid"
    is "the re-run takes at most 5 s" "$((SECONDS - t0 <= 5))" 1
    exits 0 "one more --tls-san" install a1 --tls-san api.example.com
    is "it changes one file and restarts once" "$(grep -c '^ok .*\(write\|install\|create\|place\)' "$out/last") $(grep -c '^ok .*start k3s.service' "$out/last")" "1 1"
    if [ "$(pid_of a1 k3s)" != "$pid" ]; then ok "k3s was restarted"; else bad "k3s was not restarted"; fi
    want "the API names the new SAN" in_vm a1 sh -c 'echo | timeout 5 curl -skv https://127.0.0.1:6443/ping --resolve api.example.com:6443:127.0.0.1 --cacert /var/lib/rancher/k3s/server/tls/server-ca.crt https://api.example.com:6443/ping | grep -q pong'
    in_vm a1 sh -c 'flock /var/lib/pipeops/lock sleep 3' & sleep 0.5
    exits 12 "a second run at the same time" install a1 --tls-san api.example.com
    wait
    in_vm a1 sh -c "printf '[k3s]\nkube-apiserver-arg = [\"nonsense=1\"]\n' > /root/bad.toml"
    exits 9 "a setting that the node does not survive is taken back" install a1 --tls-san api.example.com --config /root/bad.toml
    says "its cause is told" "K3S_SETTING_UNKNOWN"
    exits 0 "the node is as it was" install a1 --tls-san api.example.com
    says "and nothing is to do" "nothing to do"
    exits 0 "cluster-info" until_true 15 in_vm a1 pipeops cluster-info
    in_vm a1 systemctl stop pipeops-agent
    exits 13 "cluster-info with the agent stopped" in_vm a1 timeout 6 pipeops cluster-info
    says "it names the agent" "pipeops-agent.service is inactive"
    in_vm a1 systemctl start pipeops-agent
    in_vm a1 mv /etc/rancher/k3s/k3s.yaml /root/k3s.yaml
    exits 13 "cluster-info without a kubeconfig" in_vm a1 timeout 6 pipeops cluster-info
    says "it names the kubeconfig" "kubeconfig –"
    in_vm a1 mv /root/k3s.yaml /etc/rancher/k3s/k3s.yaml
    # the watchdog: a frozen agent is ended and started again
    local agent; agent=$(pid_of a1 pipeops-agent)
    in_vm a1 sh -c "mkdir -p /run/systemd/system/pipeops-agent.service.d; printf '[Service]\nWatchdogSec=6\n' > /run/systemd/system/pipeops-agent.service.d/fast.conf; systemctl daemon-reload; systemctl restart pipeops-agent"
    agent=$(pid_of a1 pipeops-agent); in_vm a1 kill -STOP "$agent"
    want "the watchdog restarts a frozen agent" until_true 40 in_vm a1 sh -c "p=\$(systemctl show -p MainPID --value pipeops-agent); [ \$p != 0 ] && [ \$p != $agent ] && systemctl is-active pipeops-agent"
    in_vm a1 rm -r /run/systemd/system/pipeops-agent.service.d; in_vm a1 systemctl daemon-reload
    # a volume, and a reboot
    vm push a1 "$out/volume.yaml" /root/volume.yaml; vm push a1 "$out/web.yaml" /root/web.yaml
    k a1 apply -f /root/volume.yaml -f /root/web.yaml >/dev/null
    want "a volume binds and a pod writes to it" until_true 60 in_vm a1 sh -c 'kubectl -n production exec writer -- cat /data/f | grep precious'
    want "pods run in production" k a1 -n production rollout status ds/web --timeout=60s
    want "they resolve names of the cluster" k a1 -n production exec ds/web -- nslookup kubernetes.default.svc.cluster.local
    vm stop a1; vm start a1 2>/dev/null
    want "after a reboot the node is Ready" until_true 120 in_vm a1 sh -c 'kubectl get nodes | grep -w Ready'
    want "the volume's file outlived it" until_true 90 in_vm a1 sh -c 'kubectl -n production exec writer -- cat /data/f | grep precious'
    want "the agent has a fresh credential within a minute" until_true 60 in_vm a1 sh -c 'systemctl show -p StatusText pipeops-agent | grep -q "1 of 1 nodes ready"'
    exits 13 "cluster-info with k3s stopped" in_vm a1 sh -c 'systemctl stop k3s; timeout 6 pipeops cluster-info'
    says "it names k3s" "k3s.service is inactive"
    in_vm a1 systemctl start k3s
    # volumes are kept unless purged
    exits 0 "uninstall with pods running" in_vm a1 pipeops uninstall --yes
    want "the volume is kept" in_vm a1 sh -c 'grep -r precious /var/lib/rancher/k3s/storage'
    in_vm a1 rm -rf /var/lib/rancher
    listing a1 >"$out/a1.after"
    same_listing a1 "the machine is as before but for /var/log/pipeops"
    # the hierarchies of version 1 are the host's: those of pods of the boot before may stand there empty, so what counts is who lives in them
    want "no cgroup of pods holds a process" until_true 90 sh -c '! find /sys/fs/cgroup -path "*/kubepods*" -name cgroup.procs -exec cat {} + 2>/dev/null | grep -q .'
    vm remove a1
}
