# shellcheck shell=bash disable=SC2154,SC2034
# A component whose chart cannot be had. Read by tests/vm/accept.

scenario_component() {
    fresh a1 || return
    # no chart server can be reached from the rig: the base must stay healthy
    exits 10 "a component whose source cannot be reached" in_vm a1 /root/pipeops install-server --offline-dir /opt/release --yes --ignore CGROUP_V1_UNSUPPORTED --ignore DISK_FSYNC_SLOW --components storage,cert-manager --timeout 60s
    says "the base is healthy" "the base is healthy"
    want "the node is Ready" in_vm a1 sh -c 'kubectl get nodes | grep -w Ready'
    is "its chart never uninstalls on failure" "$(k a1 -n kube-system get helmchart cert-manager -o jsonpath='{.spec.failurePolicy}')" abort
    # helm-controller has written the chart back in its own form by now, and owns what differed
    exits 10 "a re-run beside helm-controller" in_vm a1 /root/pipeops install-server --offline-dir /opt/release --yes --ignore CGROUP_V1_UNSUPPORTED --components storage,cert-manager --timeout 30s
    if grep -qE 'FIELD_CONFLICT|INTERNAL' "$out/last"; then bad "its objects are applied again"; grep -E 'FIELD_CONFLICT|INTERNAL' "$out/last"; else ok "its objects are applied again"; fi
    exits 0 "a re-run without it repairs" install a1 --components storage
    # a genuine helm-controller holds it until its own job has run, which needs helm's image
    is "and takes its chart back" "$(k a1 -n kube-system get helmchart -o jsonpath='{range .items[*]}{.metadata.deletionTimestamp}{"\n"}{end}' | grep -c '^$')" 0
    vm remove a1
}
