# shellcheck shell=bash disable=SC2154,SC2034
# From one genuine k3s to the next while a pod serves. Read by tests/vm/accept.

# From one genuine k3s to the next, server first, while a pod serves.
scenario_upgrade() {
    local next dir line address before
    [ -n "$k3s" ] || { echo "NOT RUN: an upgrade: PIPEOPS_TEST_K3S_DIR is not set"; return; }
    read -r next dir < <(scripts/vm genuine | awk -v k3s="$k3s" 'found {print; exit} $1 == k3s {found = 1}')
    [ -n "$next" ] || { echo "NOT RUN: an upgrade from $k3s: PIPEOPS_TEST_K3S_DIR holds no newer one"; return; }
    dir=/opt/k3s${dir#"${PIPEOPS_TEST_K3S_DIR%/}"}
    fresh a1 a2 || return
    exits 0 "a server with $k3s" install a1
    line=$(join_line a1)
    exits 0 "a worker" join a2 "$line"
    in_vm a1 sh -c 'cat > /root/serve.yaml' <<YAML
apiVersion: v1
kind: Pod
metadata: {name: serves, namespace: production}
spec:
  nodeName: a1
  tolerations: [{operator: Exists}]
  containers: [{name: web, image: "$image", imagePullPolicy: Never, command: [sh, -c, "echo here > /tmp/index.html; exec httpd -f -p 8080 -h /tmp"]}]
YAML
    k a1 apply -f /root/serve.yaml >/dev/null
    want "a pod serves" k a1 -n production wait --for=condition=Ready pod/serves --timeout=90s
    state() { k a1 -n production get pod serves -o jsonpath='{.status.podIP} {.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}'; }
    before=$(state); address=${before%% *}
    # four requests a second, each within a second: what fails, and the longest time without an answer in hundredths of a second
    in_vm a1 sh -c 'cat > /root/client; systemd-run -q --unit client sh /root/client' <<CLIENT
now() { echo \$((\$(cut -d' ' -f1 /proc/uptime | tr -d .))); }
n=0 failed=0 longest=0 last=\$(now)
while :; do
    n=\$((n + 1)); if curl -fsS -m 1 http://$address:8080/ >/dev/null 2>&1; then t=\$(now); [ \$((t - last)) -le \$longest ] || longest=\$((t - last)); last=\$t; else failed=\$((failed + 1)); fi
    echo "\$n \$failed \$longest" > /run/client; sleep 0.2
done
CLIENT
    exits 0 "the server upgraded to $next" in_vm a1 /root/pipeops install-server --offline-dir "$dir" "${flags[@]:2}" --k3s-version "$next"
    is "its kubelet is the new one" "$(k a1 get node a1 -o jsonpath='{.status.nodeInfo.kubeletVersion}')" "$next"
    want "exec works at once" k a1 -n production exec serves -- true
    exits 0 "the worker upgraded" in_vm a2 /root/pipeops join-worker "${line% *}" - --offline-dir "$dir" "${flags[@]:2}" <<<"${line#* }"
    want "both are Ready with it" until_true 60 in_vm a1 sh -c "[ \$(kubectl get nodes --no-headers | grep -w Ready | grep -cF $next) = 2 ]"
    is "the pod's container is the same and was not restarted" "$(state)" "$before"
    local n bad_ones longest
    read -r n bad_ones longest < <(in_vm a1 cat /run/client)
    is "no request of $n failed (longest time between two answers ${longest}0 ms)" "$bad_ones" 0
    exits 0 "a re-run" in_vm a1 /root/pipeops install-server --offline-dir "$dir" "${flags[@]:2}"
    says "it keeps the version and changes nothing" "nothing to do"
    vm remove a1; vm remove a2
}
