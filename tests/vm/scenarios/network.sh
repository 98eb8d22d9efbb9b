# shellcheck shell=bash disable=SC2154,SC2034
# What answers from outside on a public address. Read by tests/vm/accept.

scenario_network() {
    # a public-looking address; a third VM looks from outside
    vm remove a1; vm start a1 203.0.113.11 2>/dev/null; vm push a1 "$pipeops" /root/pipeops
    [[ $(ip -o addr show dev "${PIPEOPS_RIG_BRIDGE:-pipeops0}") == *" 203.0.113.1/24 "* ]] || ip addr add 203.0.113.1/24 dev "${PIPEOPS_RIG_BRIDGE:-pipeops0}"
    vm remove a3; vm start a3 203.0.113.13 2>/dev/null
    if [ -n "$k3s" ] && ! in_vm a1 sh -c 'ip link add wg-try type wireguard && ip link del wg-try' 2>/dev/null; then
        echo "NOT RUN: the pod network over WireGuard: the kernel here has none; VXLAN in its place"
        in_vm a1 sh -c 'mkdir -p /etc/pipeops; printf "[k3s]\nflannel-backend = \"vxlan\"\n" >/etc/pipeops/config.toml'
    fi
    # neither k3s has an ingress of its own: two listeners take its place
    exits 0 "an install on a public address" install a1
    says "API_PUBLIC says what answers" "will answer from outside: 6443/tcp, 10250/tcp"
    in_vm a1 sh -c 'systemd-run -q --unit p80 socat TCP-LISTEN:80,fork,reuseaddr - ; systemd-run -q --unit p443 socat TCP-LISTEN:443,fork,reuseaddr -'
    sleep 1
    probe() { in_vm a3 bash -c 'for p in 22 80 443 2379 6443 6444 10248 10249 10250 10256 10257 10259; do timeout 1 bash -c "exec 3<>/dev/tcp/203.0.113.11/$p" 2>/dev/null && printf "%s " $p; done; true'; }
    is "exactly these answer" "$(probe)" "80 443 6443 10250 "
    exits 0 "--api-allow" install a1 --api-allow 192.0.2.0/24
    is "only 80 and 443 answer" "$(probe)" "80 443 "
    want "the node itself is Ready" until_true 60 in_vm a1 sh -c 'kubectl get nodes | grep -w Ready'
    vm stop a1; vm start a1 203.0.113.11 2>/dev/null
    want "after a reboot it is Ready" until_true 120 in_vm a1 sh -c 'kubectl get nodes | grep -w Ready'
    is "and still closed" "$(probe)" ""
    in_vm a1 pipeops uninstall --yes >/dev/null 2>&1
    is "uninstall takes the table away" "$(in_vm a1 nft list tables | grep -c pipeops)" 0
    vm remove a1; vm remove a3; ip addr del 203.0.113.1/24 dev "${PIPEOPS_RIG_BRIDGE:-pipeops0}"
}
