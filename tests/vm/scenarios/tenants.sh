# shellcheck shell=bash disable=SC2154,SC2034
# Two customers in one cluster, from the first `tenant set` to the last `tenant delete`, with the command line alone. Read by tests/vm/accept.

# cli PERSON ARGUMENT…: pipeops as that person, outside of the VMs; kp the same with kubectl
cli() { local who=$1; shift; env -i PATH="$PATH" HOME="$dir/$who" "$pipeops" "$@"; }
kp() { local who=$1; shift; HOME=$dir/$who KUBECONFIG=$dir/$who/kubeconfig "$kubectl" --cache-dir "$dir/$who/cache" "$@"; }
# api PERSON PATH [CURL-OPTION…]: what the command line has no words for
api() { local who=$1 path=$2; shift 2; curl -sSk -m 20 -H "@$dir/$who/header" "$@" "https://$ip:8443$path"; }

# becomes SECONDS TEXT WANTED COMMAND…: what the command prints is that in time
becomes() {
    local end=$((SECONDS + $1)) text=$2 wanted=$3 got; shift 3
    while got=$("$@" 2>&1 </dev/null); [ "$got" != "$wanted" ] && [ $SECONDS -lt $end ]; do sleep 0.5; done
    is "$text" "$got" "$wanted"
}

# kept_out CODE TEXT COMMAND…: it ends so because of whom the token is for, and shows nothing of the other tenant
kept_out() {
    local code=$1 text=$2 rc=0; shift 2
    "$@" >"$out/last" 2>&1 </dev/null || rc=$?
    if [ "$rc" = "$code" ] && grep -qiE 'namespace_scope|is not in one of its namespaces' "$out/last" && ! grep -qE 'page-of|value-of' "$out/last"; then ok "$text"; return; fi
    bad "$text: exit $rc, wanted $code, the scope of the token as the reason, and nothing else said"; tail -15 "$out/last" | sed 's/^/          /'
}

# person NAME ARGUMENT…: made by the control plane, logged in with the two lines that it prints, and with a kubeconfig
person() {
    local who=$1; shift
    local -a line
    mkdir -p "$dir/$who"
    (umask 077; in_vm cp pipeops control-plane user create "$who" "$@" >"$dir/$who/made" 2>"$out/last"
        printf 'Authorization: Bearer %s\n' "$(sed -n 2p "$dir/$who/made")" >"$dir/$who/header")
    read -r -a line <"$dir/$who/made"
    if [ ${#line[@]} = 0 ]; then bad "user create $who $*"; sed 's/^/          /' "$out/last"; return; fi
    exits 0 "user create $who $*, and the line that it prints logs in" cli "$who" "${line[@]:1}" <<<"$(sed -n 2p "$dir/$who/made")"
    sed 's/^/          /' "$out/last"
    cp "$out/last" "$dir/$who/login"
    rm "$dir/$who/made"
    exits 0 "$who has a kubeconfig" cli "$who" kubeconfig --write "$dir/$who/kubeconfig"
}

# application NAME [HOST]: NAME.toml, a server of one page, which says whose it is. With a host it has a secret too. Its pods end when they are told
# to: one that takes its time counts in the quota meanwhile.
application() {
    local host='' secret=''
    [ -z "${2:-}" ] || { host="host = {name = \"$2\", tls = false, class = \"tests\"}"; secret='URL = {secret = "db", key = "url"}'; }
    cat >"$dir/$1.toml" <<TOML
name = "web"
image = "$image"
replicas = 1
command = ["sh", "-c", "echo \$PAGE begins; echo \$PAGE > /tmp/index.html; httpd -p 8080 -h /tmp; trap exit TERM; while :; do sleep 1; done"]
ports = [{container_port = 8080}]
$host

[environment]
PAGE = "page-of-$1"
$secret

[probes.readiness]
path = "/"

[security]
user = 1000
TOML
}

# first of the running pods of web in a namespace: name or address
web() { k a1 -n "$1" get pods -l app=web --field-selector status.phase=Running -o "jsonpath={.items[0].$2}"; }
# tcp NAMESPACE POD ADDRESS PORT: whether a connection comes about
tcp() { k a1 -n "$1" exec "$2" -- sh -c "if busybox timeout 10 nc -w 3 $3 $4 </dev/null >/dev/null 2>&1; then echo reached; else echo kept out; fi" </dev/null 2>&1; }

# a_customers_day PERSON TENANT [-n NAMESPACE]: the namespace is said where the person has several
a_customers_day() {
    local who=$1 tenant=$2 page=page-of-$2 in=("${@:3}")
    exits 0 "$who: secret set" cli "$who" secret set db --key url "${in[@]}" <<<"first-value-of-$tenant"
    exits 0 "$who: deploy" cli "$who" deploy "$dir/$tenant.toml" "${in[@]}"
    says "the revision runs" "$tenant/web: revision 1 runs"
    exits 0 "$who: status" cli "$who" status web "${in[@]}"
    says "it is ready" "$tenant/web on a1: ready"
    exits 0 "$who: logs" cli "$who" logs web "${in[@]}"
    says "they are its own" "$page begins"
    exits 0 "$who: history" cli "$who" history web "${in[@]}"
    says "it names who has deployed" "user:$who"
    exits 0 "$who: scale" cli "$who" scale web 2 "${in[@]}"
    exits 0 "$who: secret set again, with a rollout" cli "$who" secret set db --key url "${in[@]}" <<<"another-value-of-$tenant"
    becomes 30 "its pods have the new value" "another-value-of-$tenant" kp "$who" -n "$tenant" exec deploy/web -- sh -c 'echo $URL'
    exits 0 "$who: secret list" cli "$who" secret list "${in[@]}"
    if grep -qE ' db .* url ' "$out/last" && ! grep -q value-of "$out/last"; then ok "it has names and keys, and no value"; else bad "it has names and keys, and no value"; sed 's/^/          /' "$out/last"; fi
    exits 0 "$who: job run" cli "$who" job run web "${in[@]}" -- sh -c 'echo "ran beside $PAGE"'
    says "its log is printed" "ran beside $page"
}

# nothing_of PERSON NAMESPACE POD: neither commands nor kubectl show or change anything of a namespace that is another tenant's
nothing_of() {
    local who=$1 other=$2 words
    for words in "apps" "status web" "history web" "logs web" "secret list" "scale web 3" "restart web" "delete web"; do
        # shellcheck disable=SC2086
        kept_out 7 "$who: $words -n $other" cli "$who" $words -n "$other"
    done
    kept_out 7 "$who: job run -n $other" cli "$who" job run web -n "$other" -- true
    kept_out 7 "$who: deploy -n $other" cli "$who" deploy "$dir/acme-data.toml" -n "$other"
    for words in "get pods" "get secrets" "get configmaps" "get services" "get resourcequotas" "exec $3 -- true" "port-forward $3 18083:8080" "logs $3" "delete pod $3" "create configmap x"; do
        # shellcheck disable=SC2086
        kept_out 1 "$who: kubectl -n $other ${words/ $3/ POD}" timeout 30 env HOME="$dir/$who" KUBECONFIG="$dir/$who/kubeconfig" "$kubectl" --cache-dir "$dir/$who/cache" -n "$other" $words
    done
    # kubectl asks for the pod first: these don't
    words=/clusters/$id/k8s/api/v1/namespaces/$other/pods/$3
    is "$who: the exec itself in $other is refused" "$(api "$who" "$words/exec?command=true&stdout=true" -X POST -o /dev/null -w '%{http_code}' 2>&1)" 403
    is "$who: so is the port-forward" "$(api "$who" "$words/portforward?ports=8080" -o /dev/null -w '%{http_code}' 2>&1)" 403
}

nothing_crosses() {
    local mine theirs path words
    nothing_of eve globex "$(web globex metadata.name)"
    nothing_of bob acme "$(web acme metadata.name)"
    kept_out 7 "eve: apps -n production" cli eve apps -n production
    kept_out 1 "eve: kubectl -n production get pods" kp eve -n production get pods
    for words in "get pods -A" "get secrets -A" "get nodes" "get namespace globex" "get persistentvolumes" "get clusterroles"; do
        # shellcheck disable=SC2086
        kept_out 1 "eve: kubectl $words" kp eve $words
    done
    is "eve: kubectl get namespaces -A has the tenant's own" "$(kp eve get namespaces -A -o name 2>&1 | LC_ALL=C sort | tr '\n' ' ')" "namespace/acme namespace/acme-data "
    is "eve: apps has the tenant's own" "$(cli eve apps 2>&1 | awk 'NR > 1 {print $1 "/" $2}' | LC_ALL=C sort | tr '\n' ' ')" "acme-data/web acme/web "
    is "bob: apps has the tenant's own" "$(cli bob apps 2>&1 | awk 'NR > 1 {print $1 "/" $2}' | tr '\n' ' ')" "globex/web "
    exits 7 "eve: tenant show globex" cli eve tenant show globex
    is "eve: tenant list has the tenant's own" "$(cli eve tenant list 2>&1 | awk 'NR > 1 {print $1}' | sort -u | tr '\n' ' ')" "acme "
    exits 7 "eve: tenant set is for operators of the whole cluster" cli eve tenant set acme -n acme,acme-data --quota pods=1000 --yes
    exits 7 "eve: tenant delete too" cli eve tenant delete globex --yes
    # the command line shows those of an application; the paths below it have all
    mine=$(cli eve restart web -n acme -o json 2>"$out/last" | grep -oE 'o-[0-9a-f]{32}' | head -1)
    theirs=$(cli bob restart web -n globex -o json 2>>"$out/last" | grep -oE 'o-[0-9a-f]{32}' | head -1)
    if [ -z "$mine" ] || [ -z "$theirs" ]; then bad "each of them restarts web"; sed 's/^/          /' "$out/last"; return; fi
    for path in "/api/v1/clusters/$id/operations" "/clusters/$id/api/v1/operations"; do
        is "eve: ${path/$id/ID} has the tenant's own" "$(api eve "$path" 2>&1 | grep -oF -e "$mine" -e "$theirs" | sort -u)" "$mine"
        is "bob: ${path/$id/ID} too" "$(api bob "$path" 2>&1 | grep -oF -e "$mine" -e "$theirs" | sort -u)" "$theirs"
        is "eve: one of globex is not there" "$(api eve "$path/$theirs" -o /dev/null -w '%{http_code}' 2>&1)" 404
        is "eve: nor can it be cancelled" "$(api eve "$path/$theirs" -X DELETE -o /dev/null -w '%{http_code}' 2>&1)" 404
    done
    is "eve: nor are its events" "$(api eve "/clusters/$id/api/v1/operations/$theirs/events" -o /dev/null -w '%{http_code}' 2>&1)" 404
}

what_a_tenant_may_use() {
    local kind forward
    exits 13 "eve: scale past the quota" cli eve scale web 9 -n acme --timeout 20
    says "the reason is the quota" "quota_exceeded"
    exits 13 "eve: status meanwhile" cli eve status web -n acme
    says "it says what keeps it" "keeps it   quota_exceeded"
    exits 0 "eve: and back" cli eve scale web 2 -n acme
    exits 0 "ops: tenant show" cli ops tenant show acme
    says "it has the quota" "services.nodeports"
    for kind in loadbalancer nodeport; do
        exits 1 "eve: a Service of the type $kind is refused" kp eve -n acme create service "$kind" way-in --tcp=80:8080
        says "by the quota" "exceeded quota"
    done
    exits 13 "eve: a host of globex is refused" cli eve deploy "$dir/globex.toml" -n acme
    says "with its reason" "host_not_allowed"
    exits 13 "ops: it is not given to acme either" cli ops tenant set acme -n acme,acme-data "${limits[@]}" --host www.globex.example
    says "with the reason" "host_taken"
    exits 0 "eve: a name of the cluster in a pod" kp eve -n acme exec deploy/web -- nslookup kubernetes.default.svc.cluster.local
    # its wget, a static program of glibc, cannot look names up
    named=$(kp eve -n acme exec deploy/web -- nslookup web.acme-data.svc.cluster.local 2>&1 | grep -oE '([0-9]+\.){3}[0-9]+' | tail -1)
    becomes 30 "eve: acme reaches its other namespace by the Service's name" page-of-acme-data \
        kp eve -n acme exec deploy/web -- sh -c "printf 'GET / HTTP/1.0\r\n\r\n' | nc -w 5 $named 8080 | tail -1"
    HOME=$dir/eve KUBECONFIG=$dir/eve/kubeconfig "$kubectl" --cache-dir "$dir/eve/cache" -n acme port-forward deploy/web 18082:8080 >"$dir/forward" 2>&1 &
    forward=$!
    becomes 20 "eve: port-forward to a pod of her own" page-of-acme curl -sS -m 5 http://127.0.0.1:18082/
    kill "$forward"; wait "$forward" 2>/dev/null
}

# Who reaches whom: the network plug-in's work, so where there is none it is not known.
network_of_tenants() {
    local acme data globex acme_at data_at globex_at service node serves_at place labels to port what
    [ -n "$k3s" ] || { echo "NOT RUN: the network of tenants: the stand-in's plain bridge enforces no NetworkPolicy (PIPEOPS_TEST_K3S_DIR is not set)"; return; }
    acme=$(web acme metadata.name); acme_at=$(web acme status.podIP)
    data=$(web acme-data metadata.name); data_at=$(web acme-data status.podIP)
    globex=$(web globex metadata.name); globex_at=$(web globex status.podIP)
    service=$(k a1 -n globex get service web -o 'jsonpath={.spec.clusterIP}')
    node=$(vm ip a1)
    in_vm a1 sh -c 'cat > /root/serves.yaml' <<YAML
apiVersion: v1
kind: Pod
metadata: {name: serves, namespace: production, labels: {app: serves}}
spec:
  containers: [{name: web, image: "$image", imagePullPolicy: Never, command: [sh, -c, "echo here > /tmp/index.html; exec httpd -f -p 8080 -h /tmp"]}]
---
apiVersion: v1
kind: Service
metadata: {name: serves, namespace: production}
spec: {type: NodePort, selector: {app: serves}, ports: [{port: 8080, nodePort: 30080}]}
YAML
    k a1 apply -f /root/serves.yaml >/dev/null
    k a1 create namespace nginx-ingress >/dev/null
    # those that play ingress controllers, and one that stands beside them
    while read -r place labels; do
        k a1 -n "${place%/*}" run "${place#*/}" --image "$image" --image-pull-policy Never --restart Never --labels "$labels" -- sleep 100000 </dev/null >/dev/null
        want "$place runs" k a1 -n "${place%/*}" wait --for=condition=Ready "pod/${place#*/}" --timeout=90s </dev/null
    done <<'PODS'
nginx-ingress/controller app=controller
kube-system/traefik-like app.kubernetes.io/name=traefik
kube-system/beside app=beside
PODS
    want "production/serves runs" k a1 -n production wait --for=condition=Ready pod/serves --timeout=90s
    serves_at=$(k a1 -n production get pod serves -o 'jsonpath={.status.podIP}')

    becomes 60 "a pod of acme does not reach one of globex" "kept out" tcp acme "$acme" "$globex_at" 8080
    is "nor globex's Service" "$(tcp acme "$acme" "$service" 8080)" "kept out"
    is "nor does its other namespace" "$(tcp acme-data "$data" "$globex_at" 8080)" "kept out"
    is "globex does not reach acme" "$(tcp globex "$globex" "$acme_at" 8080)" "kept out"
    is "acme reaches its other namespace" "$(tcp acme "$acme" "$data_at" 8080)" reached
    is "and the other way" "$(tcp acme-data "$data" "$acme_at" 8080)" reached
    # what keeps acme out is acme's policies: production, which has none, reaches each of these
    while read -r to port what; do
        is "production reaches $what" "$(tcp production "$pod" "$to" "$port")" reached
        is "acme does not reach $what" "$(tcp acme "$acme" "$to" "$port")" "kept out"
    done <<TARGETS
$serves_at 8080 a pod of production
$(k a1 -n production get service serves -o 'jsonpath={.spec.clusterIP}') 8080 a Service of production
$node 30080 a node port
$node 6443 the API server at the node's address
$(k a1 get service kubernetes -o 'jsonpath={.spec.clusterIP}') 443 the API server's Service
$node 10250 the kubelet
$ip 8443 another machine of the private network
TARGETS
    is "production does not reach acme" "$(tcp production "$pod" "$acme_at" 8080)" "kept out"
    is "the namespace of an ingress controller reaches acme" "$(tcp nginx-ingress controller "$acme_at" 8080)" reached
    is "and globex" "$(tcp nginx-ingress controller "$globex_at" 8080)" reached
    is "so does k3s' own, by its label" "$(tcp kube-system traefik-like "$acme_at" 8080)" reached
    is "and nothing else beside it" "$(tcp kube-system beside "$acme_at" 8080)" "kept out"
}

# Of one customer nothing is left, and the other has not noticed.
one_customer_leaves() {
    local before address
    acme_pods() { k a1 -n acme get pods -l app=web -o 'jsonpath={range .items[*]}{.metadata.name} {.status.containerStatuses[0].restartCount} {end}' 2>&1; }
    before=$(acme_pods); address=$(web acme status.podIP)
    exits 11 "ops: a tenant is not deleted unasked" cli ops tenant delete globex </dev/null
    is "it is still there" "$(k a1 get namespace globex -o name 2>&1)" namespace/globex
    exits 0 "ops: tenant delete globex" cli ops tenant delete globex --yes
    is "its namespace is gone" "$(k a1 get namespace globex --ignore-not-found -o name 2>&1)" ""
    is "nothing of globex is left in the cluster" "$(k a1 get pods,services,ingresses,networkpolicies,resourcequotas,rolebindings,configmaps -A --no-headers 2>&1 | grep -w globex)" ""
    becomes 120 "nor in the rules of the node" "" in_vm a1 sh -c 'iptables-save | grep -w globex | head -3'
    kept_out 7 "bob reaches nothing any more" cli bob apps -n globex
    is "the pods of acme are the same and were not restarted" "$(acme_pods)" "$before"
    is "acme serves" "$(in_vm a1 curl -sS -m 5 "http://$address:8080/" 2>&1)" page-of-acme
    exits 0 "eve: status" cli eve status web -n acme
    says "it is ready" "acme/web on a1: ready"
    is "ops: tenant list has acme alone" "$(cli ops tenant list 2>&1 | awk 'NR > 1 {print $1}' | sort -u | tr '\n' ' ')" "acme "
}

# two customers, from the control plane's first user to the node's uninstall
scenario_tenants() {
    local ip kubectl pod id dir=$out/tenants
    # those of acme
    local limits=(--quota "cpu=1,memory=4Gi,pods=4" --host "shop.acme.example,*.apps.acme.example")
    case $k3s in v1.2?.*) echo "NOT RUN: tenants: they need Kubernetes 1.30, and this is k3s $k3s"; return ;; esac
    fresh cp a1 || return
    ip=$(vm ip cp)
    rm -rf "$dir"; install -d -m 0700 "$dir"
    listing a1 >"$out/a1.before"
    control_plane '' ''
    by_the_line
    [ -n "$id" ] || { bad "no cluster is at the control plane, so there are no tenants"; return; }
    person ops --role operator
    exits 0 "ops: tenant set acme" cli ops tenant set acme -n acme,acme-data,acme-old "${limits[@]}"
    exits 0 "ops: tenant set globex" cli ops tenant set globex -n globex --quota cpu=1,memory=4Gi,pods=4 --host www.globex.example
    exits 0 "ops: tenant list" cli ops tenant list
    sed 's/^/          /' "$out/last"
    is "each namespace is its tenant's" "$(awk 'NR > 1 {print $1 "/" $2}' "$out/last" | LC_ALL=C sort | tr '\n' ' ')" "acme/acme acme/acme-data acme/acme-old globex/globex "
    exits 11 "ops: a namespace is not removed unasked" cli ops tenant set acme -n acme,acme-data "${limits[@]}" --remove-namespace acme-old </dev/null
    is "it is still there" "$(k a1 get namespace acme-old -o name 2>&1)" namespace/acme-old
    exits 0 "ops: tenant set with --remove-namespace" cli ops tenant set acme -n acme,acme-data "${limits[@]}" --remove-namespace acme-old --yes
    is "it is gone" "$(k a1 get namespace acme-old --ignore-not-found -o name 2>&1)" ""
    person eve --tenant acme
    is "login says the tenant" "$(grep -o 'tenant acme;' "$dir/eve/login")" "tenant acme;"
    person bob --tenant globex
    application acme shop.acme.example; application acme-data; application globex www.globex.example
    a_customers_day eve acme -n acme
    exits 2 "eve: deploy asks in which of the namespaces" cli eve deploy "$dir/acme-data.toml"
    says "it names them" "acme, acme-data"
    exits 0 "eve: deploy -n acme-data" cli eve deploy "$dir/acme-data.toml" -n acme-data
    # of a tenant with one namespace it need not be said
    a_customers_day bob globex
    nothing_crosses
    what_a_tenant_may_use
    network_of_tenants
    one_customer_leaves
    exits 0 "uninstall of the node" in_vm a1 pipeops uninstall --yes
    listing a1 >"$out/a1.after"
    same_listing a1 "the machine is as before but for /var/log/pipeops: no policy is left"
    rm -rf "$dir" "$out/loop.kubeconfig"
    vm remove a1; vm remove cp
}
