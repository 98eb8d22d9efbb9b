# shellcheck shell=bash disable=SC2154,SC2034
# The whole loop: a control plane, a server that comes by the line that it prints, a Runner, kubectl, helm and k9s through the gateway. Read by tests/vm/accept.

# A release from its beginning to its end. No role but admin reads Secrets, where helm keeps releases unless told otherwise.
helm_through_the_gateway() {
    local helm; helm=${PIPEOPS_TEST_HELM:-$(command -v helm)} || { echo "NOT RUN: helm through the gateway: helm is not installed (PIPEOPS_TEST_HELM names one)"; return; }
    mkdir -p "$out/chart/templates"
    printf 'apiVersion: v2\nname: web\nversion: 0.1.0\n' >"$out/chart/Chart.yaml"
    printf 'replicas: 1\n' >"$out/chart/values.yaml"
    cat >"$out/chart/templates/web.yaml" <<YAML
apiVersion: apps/v1
kind: Deployment
metadata: {name: "{{ .Release.Name }}"}
spec:
  replicas: {{ .Values.replicas }}
  selector: {matchLabels: {app: "{{ .Release.Name }}"}}
  template:
    metadata: {labels: {app: "{{ .Release.Name }}"}}
    spec:
      securityContext: {runAsNonRoot: true, runAsUser: 1000, seccompProfile: {type: RuntimeDefault}}
      containers:
      - name: web
        image: $image
        imagePullPolicy: IfNotPresent
        command: [sleep, "3600"]
        securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
YAML
    h() { env HOME="$out" KUBECONFIG="$out/loop.kubeconfig" HELM_DRIVER="${driver:-configmap}" "$helm" -n production "$@"; }
    "$helm" version --short 2>/dev/null | sed 's/^/          helm /'
    want "helm install --wait through the gateway" h install chart "$out/chart" --wait --timeout 90s
    want "helm upgrade" h upgrade chart "$out/chart" --set replicas=2 --wait --timeout 90s
    is "it is what Kubernetes runs" "$(kl -n production get deployment chart -o 'jsonpath={.status.readyReplicas}')" 2
    want "helm rollback" h rollback chart 1 --wait --timeout 90s
    is "three revisions" "$(h history chart 2>/dev/null | grep -c '^[0-9]')" 3
    want "helm uninstall" h uninstall chart --wait
    driver=secret exits 1 "with its releases in Secrets it is refused" h list
}

# A hundred watches of one caller, each a kubectl of its own, keep nobody out.
many_watches() {
    local i pids=()
    for i in $(seq 100); do
        HOME=$out KUBECONFIG=$out/loop.kubeconfig "$kubectl" --cache-dir "$out/kubectl" -n production get pods -w -o 'jsonpath={.kind} {.metadata.labels.round}{"\n"}' >"$out/watch.$i" 2>&1 &
        pids+=($!)
    done
    heard() { [ "$(grep -lF "$1" "$out"/watch.* | wc -l)" = 100 ]; }
    want "100 watches of one caller are open" until_true 60 heard Pod
    want "a read beside them" kl get nodes
    want "a change beside them" kl -n production label pod "$pod" round=watches
    want "each of them hears of it" until_true 30 heard 'Pod watches'
    grep -LF 'Pod watches' "$out"/watch.* | head -1 | xargs -r tail -3 | sed 's/^/          /'
    kill "${pids[@]}"; wait "${pids[@]}" 2>/dev/null
    rm -f "$out"/watch.*
}

# Workloads that can't run, all at once: each operation says why, with a code. An administrator sets the traps.
planted_outcomes() {
    local dir=$out/outcomes verdict text
    rm -rf "$dir"; mkdir -p "$dir"
    k a1 apply -f - <<'YAML' >/dev/null
apiVersion: v1
kind: ResourceQuota
metadata: {name: none, namespace: beta}
spec: {hard: {pods: "0"}}
---
apiVersion: v1
kind: LimitRange
metadata: {name: small, namespace: beta}
spec: {limits: [{type: Container, max: {memory: 64Mi}}]}
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: nobody-answers}
webhooks:
- name: nobody.example.com
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Fail
  timeoutSeconds: 2
  objectSelector: {matchLabels: {webhook: down}}
  clientConfig: {service: {name: nobody, namespace: production}}
  rules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [pods]}]
YAML
    strip -o "$out/stand" "$(stand)"
    vm push a1 "$out/stand" /root/stand
    in_vm a1 systemd-run -q --unit stand-registry /root/stand registry
    (umask 077; in_vm cp pipeops control-plane runner create outcomes >"$dir/token")
    echo "https://$ip:8443" >"$dir/control-plane"; echo "$id" >"$dir/cluster"
    in_vm cp sh -c "curl -sSk https://127.0.0.1:8443/api/v1/ca" >"$dir/ca.pem"
    "$(stand)" outcomes "$dir" "$image" >"$dir/said" 2>"$dir/err" || true
    [ "$(wc -l <"$dir/said")" -ge 25 ] || bad "fewer than 25 outcomes were tried: $(tail -3 "$dir/err")"
    while read -r verdict text; do
        case $verdict in ok) ok "an outcome is told: $text" ;; *) bad "an outcome: $text" ;; esac
    done <"$dir/said"
    applications "$dir"
    k a1 -n production delete deployments,statefulsets,daemonsets,jobs -l outcome=planted >/dev/null
    k a1 -n beta delete resourcequota/none limitrange/small >/dev/null
    k a1 delete validatingwebhookconfiguration/nobody-answers >/dev/null
    rm -rf "$dir"
}

# One application from its first revision to its end, with the traps of the outcomes still set elsewhere.
applications() {
    local verdict text
    "$(stand)" applications "$1" "$image" >"$1/said" 2>"$1/err" || true
    [ "$(wc -l <"$1/said")" -ge 41 ] || bad "fewer than 41 claims about an application were tried: $(tail -3 "$1/err")"
    while read -r verdict text; do
        case $verdict in ok) ok "an application: $text" ;; *) bad "an application: $text" ;; esac
    done <"$1/said"
}

# Its screen for eight seconds, of a size that shows a pod's whole name.
k9s_through_the_gateway() {
    local k9s; k9s=${PIPEOPS_TEST_K9S:-$(command -v k9s)} || { echo "NOT RUN: k9s through the gateway: it is not installed (PIPEOPS_TEST_K9S names one)"; return; }
    mkdir -p "$out/k9s"
    printf '#!/bin/sh\nstty rows 50 cols 200\nHOME=%s/k9s K9S_CONFIG_DIR=%s/k9s TERM=xterm KUBECONFIG=%s exec %s --readonly -n production -c pods --logFile %s/k9s/log\n' \
        "$out" "$out" "$out/loop.kubeconfig" "$k9s" "$out" >"$out/k9s/run"
    printf '          k9s %s\n' "$("$k9s" version -s 2>/dev/null | awk '$1 == "Version" {print $2}')"
    { sleep 8; printf ':q\r'; sleep 2; } | timeout 30 script -qec "sh $out/k9s/run" "$out/k9s/screen" >/dev/null
    want "k9s shows the pod" grep -qaF "$pod" "$out/k9s/screen"
    rm -rf "$out/k9s"
}

# the whole loop with nobody's help: a control plane, a server that comes by the line that it prints, kubectl through the gateway
scenario_loop() {
    local ip kubectl pod id
    fresh cp a1 || return
    ip=$(vm ip cp)
    in_vm cp install -m 0755 /root/pipeops /usr/local/bin/pipeops
    vm push cp systemd/pipeops-control-plane.service /etc/systemd/system/pipeops-control-plane.service
    # RabbitMQ stands outside the VMs
    local amqp broker=''
    [ ! -e "$out/rabbitmq" ] || scripts/services rabbitmq kill "$out/rabbitmq"
    rm -rf "$out/rabbitmq"
    if amqp=$(PIPEOPS_SERVICES_ADDRESS=${ip%.*}.1 scripts/services rabbitmq start "$out/rabbitmq" 2>"$out/rabbitmq.err"); then
        broker=" --amqp-url-file %d/amqp-url"
        in_vm cp sh -c 'mkdir -p /etc/pipeops; umask 077; cat > /etc/pipeops/amqp-url' <<<"$amqp"
    else
        echo "NOT RUN: the loop with RabbitMQ and the reference Runner: $(tail -1 "$out/rabbitmq.err")"
    fi
    in_vm cp sh -c 'mkdir -p /etc/systemd/system/pipeops-control-plane.service.d; cat > /etc/systemd/system/pipeops-control-plane.service.d/name.conf; systemctl daemon-reload' <<CONF
[Service]
${broker:+LoadCredential=amqp-url:/etc/pipeops/amqp-url}
ExecStart=
ExecStart=/usr/local/bin/pipeops control-plane --public-name $ip$broker
CONF
    want "the control plane's unit starts" in_vm cp systemctl start pipeops-control-plane
    in_vm cp systemctl is-active -q pipeops-control-plane || { in_vm cp journalctl -u pipeops-control-plane --no-pager -n 20; [ -z "$broker" ] || scripts/services rabbitmq kill "$out/rabbitmq"; return; }
    want "exposure of at most 1.5" in_vm cp sh -c 'systemd-analyze security pipeops-control-plane --no-pager | tail -1 | grep -E "level for pipeops-control-plane.service: (0\.[0-9]|1\.[0-5]) "'
    is "it is not root" "$(in_vm cp sh -c 'stat -c %u /proc/$(systemctl show -p MainPID --value pipeops-control-plane)' | sed 's/^0$/root/; s/^[0-9]*$/other/')" other
    by_the_line
    want "logs" bash -c "$(declare -f kl); out=$out kubectl=$kubectl; kl -n production logs $pod >/dev/null"
    helm_through_the_gateway
    k9s_through_the_gateway
    many_watches
    planted_outcomes
    if [ -n "$broker" ]; then
        # what a Runner is given, and nothing else
        mkdir -p "$out/runner"
        (umask 077; in_vm cp pipeops control-plane runner create reference >"$out/runner/token")
        printf '%s\n' "$amqp" >"$out/runner/amqp-url"; echo "https://$ip:8443" >"$out/runner/control-plane"
        in_vm cp sh -c "curl -sSk https://127.0.0.1:8443/api/v1/ca" >"$out/runner/ca.pem"
        "$(stand)" runner "$out/runner" "$image" >"$out/runner/said" 2>&1 || bad "the reference Runner did not come to its end"
        while read -r verdict text; do
            case $verdict in ok) ok "the reference Runner: $text" ;; WRONG) bad "the reference Runner: $text" ;; *) printf '          %s %s\n' "$verdict" "$text" ;; esac
        done <"$out/runner/said"
    fi
    in_vm cp systemctl kill -s KILL pipeops-control-plane
    want "killed: the server is back by itself" until_true 60 in_vm cp sh -c 'pipeops control-plane cluster list | grep -E " online .* up "'
    want "and the kubeconfig still opens it" until_true 30 bash -c "$(declare -f kl); out=$out kubectl=$kubectl; kl get nodes"
    in_vm cp pipeops control-plane cluster revoke "$id" >/dev/null
    exits 1 "revoked: kubectl is refused" kl get nodes
    want "and the agent says so" until_true 60 in_vm a1 sh -c 'systemctl show -p StatusText --value pipeops-agent | grep -E "agent_revoked|unauthorized"'
    vm push a1 deployments/control-plane.yaml /root/control-plane.yaml
    k a1 create namespace pipeops-control-plane >/dev/null
    want "the manifest of a control plane is one that Kubernetes takes" k a1 apply --dry-run=server -f /root/control-plane.yaml
    # a data directory that takes nothing, and one that is full
    in_vm cp sh -c 'mkdir -p /mnt/ro /mnt/full; mount -t tmpfs -o ro none /mnt/ro; mount -t tmpfs -o size=1m none /mnt/full; head -c 1m /dev/zero > /mnt/full/z 2>/dev/null; true'
    for where in ro full; do
        exits 3 "a control plane on a data directory that is $where" in_vm cp timeout 10 pipeops control-plane --data-dir /mnt/$where --listen 127.0.0.1:1443 --tunnel-listen 127.0.0.1:1700
        says "it is named, with what to do" "--data-dir"
    done
    rm -rf "$out/loop.kubeconfig" "$out/runner"
    [ -z "$broker" ] || scripts/services rabbitmq kill "$out/rabbitmq"
    vm remove a1; vm remove cp
}
