# shellcheck shell=bash disable=SC2154,SC2034
# What scenarios are made of: verdicts, machines, the commands of pipeops, manifests. Read by tests/vm/accept, which sets pipeops, out and flags.

vm() { scripts/vm "$@"; }
in_vm() { local name=$1; shift; vm exec "$name" "$@"; }
ok() { passed=$((passed + 1)); printf '  ok      %s\n' "$*"; }
bad() { failed=$((failed + 1)); printf '  FAILED  %s: %s\n' "$scenario" "$*"; }
# want TEXT COMMAND…: the command succeeds
want() { local text=$1; shift; if "$@" >"$out/last" 2>&1; then ok "$text"; else bad "$text (status $?)"; tail -15 "$out/last" | sed 's/^/          /'; fi; }
# exits CODE TEXT COMMAND…
exits() { local code=$1 text=$2 rc=0; shift 2; "$@" >"$out/last" 2>&1 || rc=$?; if [ "$rc" = "$code" ]; then ok "$text"; else bad "$text: exit $rc, wanted $code"; tail -15 "$out/last" | sed 's/^/          /'; fi; }
is() { if [ "$2" = "$3" ]; then ok "$1"; else bad "$1: '$2', wanted '$3'"; fi; }
says() { if grep -qF -- "$2" "$out/last"; then ok "$1"; else bad "$1: nothing says '$2'"; tail -5 "$out/last" | sed 's/^/          /'; fi; }
# until SECONDS COMMAND…: the condition comes true in time
until_true() { local n=$1 _; shift; for _ in $(seq $((n * 2))); do "$@" >/dev/null 2>&1 && return 0; sleep 0.5; done; return 1; }
# a VM that does not come up is the rig's trouble, not the product's: one more try, and its words are shown
fresh() {
    local n try
    for n; do
        for try in 1 2 3; do
            vm remove "$n"
            vm start "$n" 2>"$out/vm.log" && break
            sed 's/^/          /' "$out/vm.log"
            [ "$try" != 3 ] || { bad "VM $n does not start"; return 1; }
        done
        vm push "$n" "$pipeops" /root/pipeops
    done
}
install() { local name=$1; shift; in_vm "$name" /root/pipeops install-server "${flags[@]}" "$@"; }
join_line() { in_vm "$1" pipeops cluster-info --join -o json | sed -n 's/.*"join": "sudo pipeops join-worker \(.*\)".*/\1/p'; }
join() { local name=$1 line; line=$2; shift 2; in_vm "$name" /root/pipeops join-worker ${line% *} - "${flags[@]}" "$@" <<<"${line#* }"; }
# k MACHINE ARGUMENT…: kubectl in it
k() { local name=$1; shift; in_vm "$name" kubectl "$@"; }
pid_of() { in_vm "$1" systemctl show -p MainPID --value "$2"; }

# everything that uninstall must bring back: files, units, users, processes, cgroups, interfaces, mounts, rules
listing() {
    in_vm "$1" sh -c '
      iptables-save >/dev/null; ip6tables-save >/dev/null
      echo "== files"; find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /opt -o -path /var/log/journal -o -path /var/log/pipeops -o -path /run -o -path /tmp -o -path /root -o -path /var/tmp \) -prune -o -printf "%M %u %g %p %l\n" | sort
      find /run -printf "%M %u %g %p\n" 2>/dev/null | grep -vE "/run/(systemd|udev|log|user|credentials|host|initctl|lock|dbus|agetty)" | sort
      echo "== units"; systemctl list-unit-files --no-legend --no-pager | sort
      systemctl list-units --all --plain --no-legend --no-pager --type=service,timer,mount | awk "\$2 != \"not-found\" {print \$1,\$3}" | grep -vE "systemd-tmpfiles|user@|run-credentials" | sort
      echo "== users"; sort /etc/passwd /etc/group
      echo "== processes"; ps -eo args --no-headers | grep -E "k3s|kube|containerd|etcd|pipeops|sleep|pause" | grep -vE "grep|nsenter" | sort
      echo "== links"; ip -br link | awk "{print \$1}" | sed "s/@.*//" | sort; ip netns list
      echo "== mounts"; awk "{print \$5}" /proc/self/mountinfo | grep -v /run/credentials | sort
      echo "== rules"; iptables-save | grep -v "^#" | sed "s/\[.*\]//"; ip6tables-save | grep -v "^#" | sed "s/\[.*\]//"; nft list tables | sort'
}
same_listing() { if diff "$out/$1.before" "$out/$1.after" >"$out/$1.diff"; then ok "$2"; else bad "$2"; head -12 "$out/$1.diff" | sed 's/^/          /'; fi; }
# what pods are made of: the stand-in's one image, or one of the genuine air-gap archive
image=docker.io/library/busybox:1
[ -z "${PIPEOPS_TEST_K3S_DIR:-}" ] || image=${PIPEOPS_TEST_IMAGE:-docker.io/rancher/mirrored-library-busybox:1.37.0}
cat >"$out/web.yaml" <<YAML
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: web, namespace: production}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      tolerations: [{operator: Exists}]
      terminationGracePeriodSeconds: 1
      containers: [{name: web, image: "$image", imagePullPolicy: Never, command: [sleep, "100000"]}]
YAML
cat >"$out/volume.yaml" <<YAML
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data, namespace: production}
spec: {accessModes: [ReadWriteOnce], storageClassName: local-path, resources: {requests: {storage: 10Mi}}}
---
apiVersion: v1
kind: Pod
metadata: {name: writer, namespace: production}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: w, image: "$image", imagePullPolicy: Never, command: [sh, -c, "[ -e /data/f ] || echo precious > /data/f; sleep 100000"], volumeMounts: [{name: d, mountPath: /data}]}
  volumes: [{name: d, persistentVolumeClaim: {claimName: data}}]
YAML

# the program that plays control plane, FRP server and Runner in the tests, built when it is not there
stand() { scripts/built dev examples/stand 2>/dev/null || { cargo build -q --example stand && scripts/built dev examples/stand; }; }

# control plane, FRP server and gateway stand in the VM a1, kubectl outside it; sets ip, gw and kubectl
runner() {
    fresh a1 || return
    strip -o "$out/stand" "$(stand)"
    vm push a1 "$out/stand" /root/stand
    in_vm a1 sh -c 'systemd-run -q --unit stand /root/stand serve /run/stand; for i in $(seq 100); do [ -e /run/stand/env ] && exit; sleep 0.1; done; exit 1'
    in_vm a1 cat /run/stand/env >"$out/stand.env"
    # shellcheck disable=SC1091
    . "$out/stand.env"
    in_vm a1 sh -c 'mkdir -p /etc/rancher/k3s; printf "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules: [{level: Metadata}]\n" > /etc/rancher/k3s/audit.yaml'
    in_vm a1 sh -c 'mkdir -p /etc/pipeops; printf "[k3s]\nkube-apiserver-arg = [\"audit-policy-file=/etc/rancher/k3s/audit.yaml\", \"audit-log-path=/var/log/kube-audit.log\"]\n" > /etc/pipeops/config.toml'
    exits 0 "install with a token" in_vm a1 env "AGENT_TOKEN=$ENROL" "PIPEOPS_CONTROL_PLANE_URL=$PLANE" /root/pipeops install-server "${flags[@]}" --components storage
    want "online and up within a minute" until_true 60 in_vm a1 sh -c 'systemctl show -p StatusText --value pipeops-agent | grep "^online; tunnel up; kubernetes .* 1 of 1 nodes ready"'
    exits 0 "cluster-info is content" in_vm a1 pipeops cluster-info
    want "the enrolment token is emptied once it is used" until_true 60 in_vm a1 sh -c '! [ -s /etc/pipeops/agent-token ]'
    ip=$(vm ip a1); gw=$GATEWAY
    kubectl=$(scripts/vm kubectl)
    token() { in_vm a1 curl -sS "$TOKENS/token?role=$1"; }
    kt() { HOME=$out KUBECONFIG=/dev/null "$kubectl" --cache-dir "$out/kubectl" --insecure-skip-tls-verify --server "https://$ip:$gw/k8s" --token "$(token deployer)" "$@"; }
    printf '          kubectl %s\n' "$("$kubectl" version --client -o json 2>/dev/null | sed -n 's/.*"gitVersion": "\(.*\)".*/\1/p')"
}

# a control plane in the VM cp, whose address is in ip, started by its unit, with more of its flags and a line for its unit
control_plane() {
    in_vm cp install -m 0755 /root/pipeops /usr/local/bin/pipeops
    vm push cp systemd/pipeops-control-plane.service /etc/systemd/system/pipeops-control-plane.service
    in_vm cp sh -c 'mkdir -p /etc/systemd/system/pipeops-control-plane.service.d; cat > /etc/systemd/system/pipeops-control-plane.service.d/name.conf; systemctl daemon-reload' <<CONF
[Service]
$2
ExecStart=
ExecStart=/usr/local/bin/pipeops control-plane --public-name $ip$1
CONF
    want "the control plane's unit starts" in_vm cp systemctl start pipeops-control-plane
}

# what a Runner of the control plane in cp is given, of the name $2, in the directory $1: its address and CA, a token, the cluster in id
given() {
    rm -rf "$1"; mkdir -p "$1"
    (umask 077; in_vm cp pipeops control-plane runner create "$2" >"$1/token")
    echo "https://$ip:8443" >"$1/control-plane"; echo "$id" >"$1/cluster"
    in_vm cp sh -c "curl -sSk https://127.0.0.1:8443/api/v1/ca" >"$1/ca.pem"
}

# a1 enrolled at the control plane in cp by the line that it prints, and kubectl through its gateway; sets id, kubectl and pod
by_the_line() {
    local line
    line=$(in_vm cp pipeops control-plane token create)
    printf '          %s\n' "${line/poe_*| sudo/poe_… | sudo}"
    # the very line, with what an offline machine needs added at its end
    exits 0 "the pasted line installs a server" in_vm a1 sh -c "PATH=\$PATH:/root; ${line/sudo pipeops/pipeops} ${flags[*]/--yes/} --components storage"
    want "online with its tunnel up" until_true 60 in_vm cp sh -c 'pipeops control-plane cluster list | grep -E " online .* up "'
    in_vm cp pipeops control-plane cluster list | sed 's/^/          /'
    id=$(in_vm cp pipeops control-plane cluster list -o json | sed -n 's/.*"id": *"\(c-[0-9a-f]*\)".*/\1/p' | head -1)
    in_vm cp pipeops control-plane cluster kubeconfig "$id" >"$out/loop.kubeconfig"
    kubectl=$(scripts/vm kubectl)
    kl() { HOME=$out KUBECONFIG=$out/loop.kubeconfig "$kubectl" --cache-dir "$out/kubectl" "$@"; }
    want "kubectl get through the gateway" kl get nodes
    want "apply --server-side" kl apply --server-side --field-manager=pipeops-runner -f "$out/web.yaml"
    want "the pod runs" until_true 90 bash -c "$(declare -f kl); out=$out kubectl=$kubectl; kl -n production get pods | grep Running"
    pod=$(kl -n production get pods -o name | sed -n '1s,pod/,,p')
    is "exec" "$(kl -n production exec "$pod" -- echo through)" through
    exits 137 "exec ends with its code" kl -n production exec "$pod" -- sh -c 'exit 137'
    head -c 3000000 /dev/urandom >"$out/blob"
    want "cp there" kl -n production cp "$out/blob" "$pod:/tmp/blob"
    want "and back" kl -n production cp "$pod:/tmp/blob" "$out/blob.back"
    want "unchanged" cmp "$out/blob" "$out/blob.back"
}
