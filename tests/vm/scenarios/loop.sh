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

# said PROGRAM TEXT ARGUMENT…: what `stand PROGRAM ARGUMENT…` says, line by line; counts the outcomes in planted and told
said() {
    local program=$1 text=$2 verdict line; shift 2
    "$(stand)" "$program" "$@" >"$out/said" 2>"$out/said.err" || true
    while read -r verdict line; do
        case $verdict in
            ok) ok "$text: $line" ;;
            WRONG) bad "$text: $line" ;;
            count) planted=$((planted + ${line% *})) told=$((told + ${line#* })) ;;
            *) printf '          %s\n' "$line" ;;
        esac
    done <"$out/said"
    # an end that is none: it has no line of its own
    ! grep -q panicked "$out/said.err" || bad "$text: stand $program did not come to its end: $(tail -5 "$out/said.err")"
}
# at_least NUMBER WHAT: so many lines of it were said
at_least() { [ "$(grep -cE '^(ok|WRONG) ' "$out/said")" -ge "$1" ] || bad "fewer than $1 $2 were tried: $(tail -3 "$out/said.err")"; }

# Workloads that can't run, all at once: each operation says why, with a code. An administrator sets the traps. Then one application from its
# first revision to its end, and its operations while what is around them fails.
planted_outcomes() {
    local dir=$out/outcomes planted=0 told=0 n
    given "$dir" outcomes
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
    said outcomes "an outcome is told" "$dir" "$image"
    at_least 25 outcomes
    said applications "an application" "$dir" "$image"
    at_least 41 "claims about an application"
    k a1 -n production delete deployments,statefulsets,daemonsets,jobs -l outcome=planted >/dev/null
    k a1 -n beta delete resourcequota/none limitrange/small >/dev/null
    k a1 delete validatingwebhookconfiguration/nobody-answers >/dev/null
    said deploys "an outcome is told" "$dir" "$image"
    at_least 45 "outcomes of operations of an application"
    as_it_was
    printf '          %d planted outcomes, %d told as they were\n' "$planted" "$told"
    is "planted outcomes that are told as they were" "$told" "$planted"
    scored "$dir/objects.json"
    for n in 1 2 3 4; do (umask 077; in_vm cp pipeops control-plane runner create "crowd-$n" >"$dir/token-$n"); done
    said crowd "four callers at once" "$dir" "$image"
    at_least 5 "claims about four callers"
    rm -rf "$dir"
}

# Whatever the outcomes have left of their faults, also when they did not come to their end.
as_it_was() {
    in_vm a1 sh -c 'nft delete table inet cut 2>/dev/null; rm -f /run/pipeops-gate /run/systemd/system/pipeops-agent.service.d/gate.conf
        kubectl label namespace production pod-security.kubernetes.io/enforce=baseline --overwrite >/dev/null; systemctl daemon-reload; systemctl restart pipeops-agent'
    in_vm cp systemctl start pipeops-control-plane
    want "the agent is reached as before" until_true 60 kl get nodes
}

# The objects that a deploy has made, looked at by kube-score: nothing critical. What is not asked of them, and why:
scored() {
    local score ignored=(
        # a tag that names a version is pulled once, as Kubernetes does by itself: a registry that is away must not keep a pod from starting
        container-image-pull-policy
        # what a pod may write is the namespace's to limit: a LimitRange
        container-ephemeral-storage-request-and-limit
        # an image that nobody has said it of may write where it likes in its own root; security.read_only_root says it
        container-security-context-readonlyrootfilesystem
        # whose number is above 10000 is the image's own affair; security.user sets another one
        container-security-context-user-group-id
        # who may reach whom is the namespace's to say, and not an application's about itself
        pod-networkpolicy
    )
    score=$(scripts/parts kube-score 2>"$out/score.err") || {
        if [ $? = 3 ]; then echo "NOT RUN: kube-score: $(tail -1 "$out/score.err")"; else bad "kube-score cannot be built: $(tail -1 "$out/score.err")"; fi
        return
    }
    printf '          %s\n' "$(paste -sd, "$score/versions")"
    if [ ! -s "$1" ]; then bad "kube-score: there are no objects of a deploy"; return; fi
    exits 0 "kube-score finds nothing critical in the objects of a deploy" "$score/kube-score" score --output-format ci "${ignored[@]/#/--ignore-test=}" "$1"
    grep -E '^\[(CRITICAL|WARNING)\]' "$out/last" | sed 's/^/          /'
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

# A Runner by its unit, on the machine of the control plane: jobs of a person's command line go over RabbitMQ, through it and the tunnel to the
# cluster, also while it is killed; the value of a Secret is in clear nowhere on that way.
jobs_over_rabbitmq() {
    local line value=planted-canary-3311-in-plain-text sealed
    (umask 077; in_vm cp pipeops control-plane user create jobs-user >"$out/jobs-user")
    line=$(head -1 "$out/jobs-user")
    exits 0 "a user of the command line" in_vm cp sh -c "$line" <<<"$(sed -n 2p "$out/jobs-user")"
    in_vm cp sh -c 'umask 077; pipeops control-plane runner create jobs --jobs --role viewer >/etc/pipeops/runner-token; cp /etc/pipeops/amqp-url /etc/pipeops/runner-amqp-url'
    printf 'control-plane-url = "https://%s:8443"\ncontrol-plane-pin = ["%s"]\n' "$ip" "${line##* }" | in_vm cp sh -c 'umask 077; cat >/etc/pipeops/runner.toml'
    vm push cp systemd/pipeops-runner.service /etc/systemd/system/pipeops-runner.service
    in_vm cp systemctl daemon-reload
    want "the Runner's unit starts" in_vm cp systemctl start pipeops-runner
    want "it takes jobs" until_true 30 in_vm cp sh -c 'systemctl show -p StatusText --value pipeops-runner | grep -x running'
    want "its exposure is at most 1.5" in_vm cp sh -c 'systemd-analyze security pipeops-runner --no-pager | tail -1 | grep -E "level for pipeops-runner.service: (0\.[0-9]|1\.[0-5]) "'
    is "it is not root, and has no capability" "$(in_vm cp sh -c 'p=$(systemctl show -p MainPID --value pipeops-runner); echo "$(stat -c %u /proc/$p | sed "s/^0$/root/; s/^[0-9]*$/other/") $(grep CapEff /proc/$p/status | cut -f2)"')" "other 0000000000000000"
    # send TEXT FILE CODE: a job from its publication to its answer
    send() { exits "${3:-0}" "$1" in_vm cp timeout 180 pipeops runner send "/root/$2" --amqp-url-file /etc/pipeops/amqp-url; }
    ordered() { printf '{"cluster": "%s", "kind": "deploy", "spec": {"application": {"name": "ordered", "namespace": "production", "image": "%s", "command": ["sleep", "3600"], "replicas": %s, "strategy": {"min_ready_s": 5}, "security": {"user": 1000}}}}' "$id" "$image" "$1"; }
    ordered 1 | in_vm cp sh -c 'cat >/root/deploy.json'
    send "a job deploys an application" deploy.json
    is "it runs" "$(kl -n production get deployment ordered -o 'jsonpath={.status.readyReplicas}')" 1
    want "as its maker" in_vm a1 sh -c 'pipeops audit tail -n 400 | grep -qF "\"subject\":\"user:jobs-user\""'
    # killed while the rollout is waited for: systemd starts it again, and the job comes again
    ordered 2 | in_vm cp sh -c 'cat >/root/scaled.json'
    { until_true 20 bash -c "$(declare -f kl); out=$out kubectl=$kubectl; kl -n production get deployment ordered -o 'jsonpath={.spec.replicas}' | grep -x 2"; in_vm cp systemctl kill -s KILL pipeops-runner; } &
    send "a job is answered though its Runner is killed meanwhile" scaled.json
    wait $!
    is "it was done once" "$(kl -n production get configmaps -o name | grep -c 'ordered\.revision-')" 2
    sealed=$(printf %s "$value" | in_vm cp pipeops runner seal)
    printf '{"cluster": "%s", "kind": "secret", "spec": {"action": "set", "namespace": "production", "name": "sealed", "data": {"password": {"sealed": "%s"}}}}' "$id" "$sealed" | in_vm cp sh -c 'cat >/root/secret.json'
    send "a job with a sealed value" secret.json
    is "the cluster has the value" "$(k a1 -n production get secrets -o 'jsonpath={.items[*].data.password}' | tr ' ' '\n' | base64 -d 2>/dev/null | grep -o "$value")" "$value"
    if grep -rqaF "$sealed" "$out/rabbitmq/data"; then ok "the broker had it on disk, sealed"; else bad "the files of the broker hold no job"; fi
    if grep -rqaF "$value" "$out/rabbitmq/data" "$out/rabbitmq/log"; then bad "the broker has the value in clear"; else ok "and not in clear"; fi
    printf '{"cluster": "%s", "kind": "secret", "spec": {"action": "set", "namespace": "production", "name": "sealed", "data": {"password": "%s"}}}' "$id" "$value" | in_vm cp sh -c 'cat >/root/clear.json'
    send "the same in clear is refused before it is published" clear.json 2
    says "with its code" secret_in_clear
    printf '{"cluster": "%s", "kind": "delete_application", "spec": {"namespace": "production", "name": "ordered"}}' "$id" | in_vm cp sh -c 'cat >/root/delete.json'
    send "a job deletes the application" delete.json
    rm -f "$out/jobs-user"
    vm push a1 deployments/runner.yaml /root/runner.yaml
    k a1 create namespace pipeops-runner >/dev/null
    want "the manifest of a Runner is one that Kubernetes takes" k a1 apply --dry-run=server -f /root/runner.yaml
}

# the whole loop with nobody's help: a control plane, a server that comes by the line that it prints, kubectl through the gateway
scenario_loop() {
    local ip kubectl pod id
    fresh cp a1 || return
    ip=$(vm ip cp)
    # RabbitMQ stands outside the VMs
    local amqp broker=''
    [ ! -e "$out/rabbitmq" ] || scripts/services rabbitmq kill "$out/rabbitmq"
    rm -rf "$out/rabbitmq"
    if amqp=$(PIPEOPS_SERVICES_ADDRESS=${ip%.*}.1 scripts/services rabbitmq start "$out/rabbitmq" 2>"$out/rabbitmq.err"); then
        broker=" --amqp-url-file %d/amqp-url"
        in_vm cp sh -c 'mkdir -p /etc/pipeops; umask 077; cat > /etc/pipeops/amqp-url' <<<"$amqp"
    else
        echo "NOT RUN: the loop with RabbitMQ, Runner and jobs: $(tail -1 "$out/rabbitmq.err")"
    fi
    control_plane "$broker" "${broker:+LoadCredential=amqp-url:/etc/pipeops/amqp-url}"
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
        jobs_over_rabbitmq
        # what a program that hears of clusters is given, and nothing else
        mkdir -p "$out/runner"
        (umask 077; in_vm cp pipeops control-plane runner create reference >"$out/runner/token")
        printf '%s\n' "$amqp" >"$out/runner/amqp-url"; echo "https://$ip:8443" >"$out/runner/control-plane"
        in_vm cp sh -c "curl -sSk https://127.0.0.1:8443/api/v1/ca" >"$out/runner/ca.pem"
        "$(stand)" runner "$out/runner" "$image" >"$out/runner/said" 2>&1 || bad "a program that hears of the cluster did not come to its end"
        while read -r verdict text; do
            case $verdict in ok) ok "a program that hears of the cluster: $text" ;; WRONG) bad "a program that hears of the cluster: $text" ;; *) printf '          %s %s\n' "$verdict" "$text" ;; esac
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
