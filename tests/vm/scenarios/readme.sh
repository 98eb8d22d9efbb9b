# shellcheck shell=bash disable=SC2154,SC2034
# The README's own commands, word by word, on a terminal: a control plane, a server, a user, an application that is deployed and answers from
# outside, through an ingress and with a certificate of cert-manager. Read by tests/vm/accept.
# With PIPEOPS_PICTURES=DIR it leaves the README's pictures of a rollout there.

# console SECTION: the console blocks of a section of the README
console() {
    awk -v section="$1" '
        /^```/ { inside = !inside; console = inside && $0 == "```console"; next }
        !inside && /^#/ { here = $0; sub(/^#+ /, "", here); next }
        console && here == section' README.md
}

# filled TEXT: where the README leaves the end of a word out (sha256:…), the last word that a command has printed and that begins so
filled() {
    local text=$1 begin found
    while [[ $text =~ ([A-Za-z0-9]+[_:])… ]]; do
        begin=${BASH_REMATCH[1]}
        found=$(grep -ohE "(^|[[:space:]])${begin}[^[:space:]]+" "$out/readme.printed" | tail -1 | tr -d '[:space:]')
        [ -n "$found" ] || return 1
        text=${text/"$begin…"/$found}
    done
    printf '%s' "$text"
}

# plain: what a terminal shows, line by line: without control sequences, spaces as one. A word with a digit is another one in each run: #; in the
# README also one whose end is left out.
plain() {
    sed -E 's/\x1b\[[0-9;?]*[A-Za-z]//g' | tr '\r' '\n' |
        sed -E 's/[^[:space:]]*[0-9][^[:space:]]*/#/g; s/[^[:space:]]+…[^[:space:]]*/?/g; s/[[:space:]]+/ /g; s/^ //; s/ $//'
}

# told LINE…: each line of the README stands in what the last command showed; a line … stands for any
told() {
    local line
    plain <"$out/shown" >"$out/readme.plain"
    for line; do
        line=$(plain <<<"$line" | sed 's/[][\.*^$+(){}|]/\\&/g; s/?/[^ ]+/g')
        [ -z "$line" ] || [ "$line" = … ] || grep -qE -- "^$line" "$out/readme.plain" || { echo "nothing says: $line" >>"$out/shown"; return 1; }
    done
}

# typed USER MACHINE COMMAND [TEXT]: the command in the user's login shell, on a terminal; types TEXT, where there is any. What the terminal shows is in
# shown, and recorded on the machine.
typed() {
    local user=$1 machine=$2 text=${4:-}
    # no list of processes shows the command: there may be a token in it
    (umask 077; printf '%s\n' "$3" >"$out/readme.step")
    vm push "$machine" "$out/readme.step" /tmp/step; in_vm "$machine" chown "$user" /tmp/step
    # a prompt throws away what was typed before it
    { [ -z "$text" ] || { sleep 3; printf '%s\n' "$text"; sleep 3; }; } |
        TERM=xterm-256color vm exec "$machine" su - "$user" -c 'script -qefc "stty rows 30 cols 100; . /tmp/step" -O /tmp/typescript -T /tmp/timing' >"$out/shown" 2>&1
}
again() { local user=$1 machine=$2 run=$3; shift 3; typed "$user" "$machine" "$run" && told "$@"; }

# step USER MACHINE COMMAND LINE…: a command of the README there, and what the README says that it shows
step() {
    local user=$1 machine=$2 command=$3 line text='' more='' run verdict=bad; shift 3
    # what the README shows of a prompt is answered
    for line; do [[ ! $line =~ ^token:$ ]] || text=$(filled 'pou_…'); done
    # a file that the README shows is the one that it means
    if [[ $command == cat\ * ]]; then
        printf '%s\n' "$@" >"$out/file"
        vm push "$machine" "$out/file" "$(in_vm "$machine" sh -c "echo ~$user")/${command#cat }"
    fi
    run=$(filled "$command") || { bad "$user@$machine: $command: nothing was printed that begins so"; return; }
    # what a machine without internet and with cgroups of version 1 needs besides
    [[ $command != *install-server* ]] || more=" ${flags[*]/--yes/} --components storage,cert-manager"
    case $command in
        # what only looks is looked at until it is as the README says
        *\ list* | *\ get\ * | curl\ *) until_true 90 again "$user" "$machine" "$run" "$@" && verdict=ok ;;
        *) typed "$user" "$machine" "$run$more" "$text" && told "$@" && verdict=ok ;;
    esac
    "$verdict" "$user@$machine: $command${more:+ …}"
    [ $verdict = ok ] || tail -15 "$out/shown" | sed -E 's/(po[a-z]_)[^[:space:]]+/\1…/g; s/^/          /'
    (umask 077; sed 's/\x1b\[[0-9;?]*[A-Za-z]//g' "$out/shown" >>"$out/readme.printed")
    case $command in
        *install-server*) served ;;
        *pipeops\ deploy*) picture deploy "$user@$machine:~\$ $command" ;;
    esac
}

# walk SECTION: its commands in their order
walk() {
    local lines line user='' machine command said=()
    mapfile -t lines < <(console "$1")
    [ ${#lines[@]} -gt 0 ] || { bad "the README has no section '$1' with commands"; return; }
    for line in "${lines[@]}" ''; do
        if [[ $line =~ ^([a-z]+)@([a-z0-9]+):~[#$]\ (.*)$ ]]; then
            local next=("${BASH_REMATCH[@]:1:3}")
            [ -z "$user" ] || step "$user" "$machine" "$command" "${said[@]}"
            user=${next[0]} machine=${next[1]} command=${next[2]} said=()
        elif [ -n "$user" ] && [ -n "$line" ]; then
            said+=("$line")
        fi
    done
    step "$user" "$machine" "$command" "${said[@]}"
}

# In place of the helm controller, which the stand-in for k3s does not have: installs the chart that pipeops asks for, from cert-manager's own module,
# with the values that pipeops gives it, and answers as the controller does. The chart's last job only waits, as pipeops does itself.
helm_controller() {
    until_true 180 k s1 -n kube-system get helmchart cert-manager || return
    k s1 -n kube-system get helmchart cert-manager -o 'jsonpath={.spec.valuesContent}' >"$out/values.yaml"
    vm push s1 "$out/values.yaml" /root/values.yaml
    in_vm s1 env KUBECONFIG=/etc/rancher/k3s/k3s.yaml /root/helm upgrade --install cert-manager /root/chart --namespace cert-manager --create-namespace \
        --values /root/values.yaml --set startupapicheck.enabled=false || return
    k s1 -n kube-system create job helm-install-cert-manager --image="$image" -- true
    k s1 -n kube-system patch helmchart cert-manager --subresource=status --type=merge -p '{"status":{"jobName":"helm-install-cert-manager"}}'
}

# what the cluster and the person's machine have by now: the ingress, and trust in the cluster's own CA
served() {
    if ! wait "$helm"; then bad "the chart of cert-manager: $(tail -3 "$out/helm.log")"; fi
    want "cert-manager runs" k s1 -n cert-manager wait --for=condition=Available deployment --all --timeout=120s
    is "the issuers of pipeops" "$(k s1 get clusterissuers -o name | sed 's,.*/,,' | sort | paste -sd' ')" "pipeops-ca pipeops-selfsigned"
    until_true 60 k s1 -n cert-manager get secret pipeops-ca
    k s1 -n cert-manager get secret pipeops-ca -o 'jsonpath={.data.tls\.crt}' | base64 -d >"$out/file"
    vm push laptop "$out/file" /usr/local/share/ca-certificates/pipeops-ca.crt
    want "the person's machine trusts the cluster's CA" in_vm laptop update-ca-certificates
    # not of the README: the same controller serves the Gateway API, in the definitions of that API's own module
    cp -r "$gateway_api" "$(vm root s1)/root/gateway-api"
    want "the Gateway API's definitions" k s1 apply --server-side -f /root/gateway-api
    vm push s1 "$out/traefik.yaml" /root/traefik.yaml
    want "an ingress controller" k s1 apply -f /root/traefik.yaml
    want "it runs" k s1 -n kube-system rollout status deployment/ingress --timeout=120s
}

traefik() {
    cat <<YAML
apiVersion: v1
kind: ServiceAccount
metadata: {name: ingress, namespace: kube-system}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: ingress}
rules:
- {apiGroups: [""], resources: [services, secrets, configmaps, nodes, namespaces], verbs: [get, list, watch]}
- {apiGroups: [gateway.networking.k8s.io], resources: ["*"], verbs: [get, list, watch, update]}
- {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}
- {apiGroups: [networking.k8s.io], resources: [ingresses, ingressclasses], verbs: [get, list, watch]}
- {apiGroups: [networking.k8s.io], resources: [ingresses/status], verbs: [update]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: ingress}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: ingress}
subjects: [{kind: ServiceAccount, name: ingress, namespace: kube-system}]
---
apiVersion: networking.k8s.io/v1
kind: IngressClass
metadata: {name: traefik}
spec: {controller: traefik.io/ingress-controller}
---
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: traefik}
spec: {controllerName: traefik.io/gateway-controller}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: door, namespace: kube-system}
spec:
  gatewayClassName: traefik
  listeners:
  - {name: web, protocol: HTTP, port: 80, allowedRoutes: {namespaces: {from: All}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: ingress, namespace: kube-system}
spec:
  selector: {matchLabels: {app: ingress}}
  template:
    metadata: {labels: {app: ingress}}
    spec:
      serviceAccountName: ingress
      # no load balancer of k3s in the stand-in
      hostNetwork: true
      containers:
      - name: traefik
        image: docker.io/rancher/mirrored-library-traefik:tests
        imagePullPolicy: Never
        args: [--providers.kubernetesgateway, --providers.kubernetesingress, --providers.kubernetesingress.ingressendpoint.ip=$1, "--entrypoints.web.address=:80", "--entrypoints.websecure.address=:443",
          --entrypoints.websecure.http.tls, --global.checknewversion=false, --global.sendanonymoususage=false]
        readinessProbe: {tcpSocket: {port: 443}, periodSeconds: 2}
YAML
}

# picture NAME LINE: the last command on the laptop as the README's picture
picture() {
    [ -n "${PIPEOPS_PICTURES:-}" ] || return 0
    local file
    for file in typescript timing; do in_vm laptop cat /tmp/$file >"$out/$file"; done
    want "its picture, $PIPEOPS_PICTURES/$1.svg" sh -c "tests/picture '$out/typescript' '$out/timing' '$2' >'$PIPEOPS_PICTURES/$1.svg'"
}

# an application whose host is a Gateway's: HTTPRoute instead of Ingress
through_a_gateway() {
    cat >"$out/file" <<'TOML'
name = "door"
image = "registry.example.com/shop:43"
ports = [{container_port = 8080}]
host = {name = "door.example.com", gateway = "kube-system/door"}
TOML
    vm push laptop "$out/file" /home/eve/door.toml
    want "eve@laptop: an application behind a Gateway" in_vm laptop su - eve -c 'pipeops deploy door.toml'
    is "it is an HTTPRoute, and no Ingress" "$(k s1 -n production get httproutes,ingresses -o name | grep -c door) $(k s1 -n production get httproute door -o 'jsonpath={.spec.hostnames[0]}')" "1 door.example.com"
    want "and is served" until_true 30 in_vm laptop curl -sfo /dev/null -H 'Host: door.example.com' "http://$server/"
    want "eve@laptop: and deleted" in_vm laptop su - eve -c 'pipeops delete door'
    is "with its route" "$(k s1 -n production get httproutes -o name)" ""
}

scenario_readme() {
    local parts images ip server name t0 helm gateway_api
    if [ -n "${PIPEOPS_TEST_K3S_DIR:-}" ]; then
        echo "NOT RUN: the README's commands on a genuine k3s: its helm controller takes charts from the internet"
        return
    fi
    images=$(scripts/vm images 2>"$out/parts.err") || {
        if [ $? = 3 ]; then echo "NOT RUN: the README's commands: $(tail -1 "$out/parts.err")"; else bad "cert-manager, Traefik and helm cannot be built: $(tail -1 "$out/parts.err")"; fi
        return
    }
    parts=$(scripts/parts ingress)
    gateway_api=$(cd tests/parts/ingress && go mod download sigs.k8s.io/gateway-api && go list -m -f '{{.Dir}}' sigs.k8s.io/gateway-api)/config/crd/standard
    printf '          %s, Debian'\''s nginx as the application\n' "$(paste -sd, "$parts/versions" | sed 's/,/, /g')"
    fresh cp s1 laptop || return
    ip=$(vm ip cp); server=$(vm ip s1)
    for name in cp s1 laptop; do in_vm "$name" sh -c "printf '%s\n' '$ip cp.example.com' '$server shop.example.com' >> /etc/hosts"; done
    # what the reader has: the two files of the control plane, the program, kubectl, a user, a file with a value; images, which no registry has here
    vm push cp systemd/pipeops-control-plane.service /root/pipeops-control-plane.service
    in_vm cp ln -s /opt/kube-parts/kubectl /usr/local/bin/kubectl
    for name in s1 laptop; do in_vm "$name" install -m 0755 /root/pipeops /usr/local/bin/pipeops; done
    in_vm laptop useradd -m -s /bin/bash eve
    in_vm laptop sh -c 'echo postgres://shop:pass@db/shop > /home/eve/url; chown eve /home/eve/url'
    in_vm s1 mkdir -p /var/lib/rancher/k3s/agent/images
    vm push s1 "$images" /var/lib/rancher/k3s/agent/images/readme.tar
    vm push s1 "$parts/helm" /root/helm
    cp -r "$parts/chart" "$(vm root s1)/root/chart"
    traefik "$server" >"$out/traefik.yaml"
    (umask 077; : >"$out/readme.printed")

    t0=$SECONDS
    helm_controller >"$out/helm.log" 2>&1 &
    helm=$!
    walk "A control plane of your own"
    walk "Command line"
    want "HTTP 200 from outside, over TLS that the cluster's own issuer has signed" until_true 90 in_vm laptop curl -sfo /dev/null https://shop.example.com/
    is "the certificate is cert-manager's" "$(k s1 -n production get certificate shop-tls -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status} {.spec.issuerRef.name}')" "True pipeops-ca"
    is "from the first command to that answer 10 minutes at most ($((SECONDS - t0)) s)" "$((SECONDS - t0 <= 600))" 1
    through_a_gateway
    want "eve@laptop: a command in a pod" in_vm laptop su - eve -c 'pipeops exec shop -- nginx -v'
    in_vm laptop su - eve -c 'pipeops exec shop -- nginx -t -c /none' >/dev/null 2>&1
    is "eve@laptop: one that fails is 13" $? 13
    want "eve@laptop: and one with a terminal" typed eve laptop 'pipeops exec shop -it -- nginx -v'
    want "which shows what it says" grep -q 'nginx version' "$out/shown"
    # an image that runs as root is refused before anything serves it
    typed eve laptop "pipeops deploy --image $image"
    is "eve@laptop: a rollout that cannot be is exit 13" $? 13
    picture deploy-failed "eve@laptop:~\$ pipeops deploy --image $image"
    is "and the former pods serve on" "$(in_vm laptop curl -so /dev/null -w '%{http_code}' https://shop.example.com/)" 200
    rm -f "$out"/readme.* "$out/shown" "$out/file"
    vm remove laptop; vm remove s1; vm remove cp
}
