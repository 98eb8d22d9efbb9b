# shellcheck shell=bash disable=SC2154,SC2034
# The loop through somebody else's frps. Read by tests/vm/accept.

# the loop through somebody else's frps, which asks the control plane as its plugin
scenario_frps() {
    local ip kubectl pod id frps
    if [ -n "${PIPEOPS_TEST_FRP_DIR:-}" ]; then
        frps=$(find "$PIPEOPS_TEST_FRP_DIR" -maxdepth 2 -name frps -type f | sort -V | tail -1)
        [ -n "$frps" ] || { echo "NOT RUN: kubectl through a genuine frps: PIPEOPS_TEST_FRP_DIR holds none"; return; }
    else
        # the newest of the generations
        frps=$(scripts/parts frp "$(find tests/parts/frp -mindepth 1 -maxdepth 1 -printf '%f\n' | sort -V | tail -1)")/frps \
            || { echo "NOT RUN: kubectl through a genuine frps: it could not be built"; return; }
    fi
    fresh cp a1 || return
    ip=$(vm ip cp)
    printf '          frps %s\n' "$("$frps" -v)"
    openssl req -x509 -newkey rsa:2048 -nodes -keyout "$out/frps.key" -out "$out/frps.crt" -days 2 -subj /CN=frps \
        -addext "subjectAltName=IP:$ip" -addext basicConstraints=critical,CA:FALSE 2>/dev/null
    in_vm cp sh -c 'mkdir -p /etc/pipeops /etc/frp; umask 077; printf "frps-%s" "$(head -c 16 /dev/urandom | od -An -tx1 | tr -d " \n")" > /etc/pipeops/frps-token'
    vm push cp "$frps" /usr/local/bin/frps
    vm push cp "$out/frps.key" /etc/frp/tls.key; vm push cp "$out/frps.crt" /etc/frp/tls.crt
    in_vm cp sh -c 'install -m 0755 /root/pipeops /usr/local/bin/pipeops; chmod +x /usr/local/bin/frps'
    vm push cp systemd/pipeops-control-plane.service /etc/systemd/system/pipeops-control-plane.service
    in_vm cp sh -c 'mkdir -p /etc/systemd/system/pipeops-control-plane.service.d; cat > /etc/systemd/system/pipeops-control-plane.service.d/frps.conf; systemctl daemon-reload' <<CONF
[Service]
LoadCredential=frps-token:/etc/pipeops/frps-token
LoadCredential=frps-ca:/etc/frp/tls.crt
ExecStart=
ExecStart=/usr/local/bin/pipeops control-plane --public-name $ip --frps $ip:7000 --frps-token-file %d/frps-token --frps-ca %d/frps-ca
CONF
    want "the control plane's unit starts" in_vm cp systemctl start pipeops-control-plane
    in_vm cp sh -c 'pipeops control-plane frps-config >/etc/frp/asked; sed "s/the one in --frps-token-file/$(cat /etc/pipeops/frps-token)/; s/^transport.tls.force = true/&\ntransport.tls.certFile = \"\/etc\/frp\/tls.crt\"\ntransport.tls.keyFile = \"\/etc\/frp\/tls.key\"/" /etc/frp/asked >/etc/frp/frps.toml'
    want "frps takes the settings that the control plane prints" in_vm cp frps verify -c /etc/frp/frps.toml
    in_vm cp systemd-run -q --unit frps -p Restart=always -p RestartSec=100ms /usr/local/bin/frps -c /etc/frp/frps.toml
    by_the_line
    kl -n production get pod "$pod" -w -o 'jsonpath={.metadata.labels.seen}{"\n"}' >"$out/watched" 2>/dev/null &
    local watch=$!
    sleep 1
    kl -n production label pod "$pod" seen=yes >/dev/null
    want "watch sees a change" until_true 20 grep -q yes "$out/watched"
    kill $watch
    is "exec with stdin" "$(echo typed | kl -n production exec -i "$pod" -- cat)" typed
    kl -n production exec "$pod" -- sh -c 'while :; do echo forwarded | busybox nc -l -p 8080; done' >/dev/null 2>&1 &
    kl -n production port-forward "$pod" 18081:8080 >/dev/null 2>&1 &
    want "port-forward" until_true 20 bash -c 'exec 3<>/dev/tcp/127.0.0.1/18081; head -1 <&3 | grep -q forwarded'
    pkill -f "$out/kubectl -n production" || true
    in_vm cp systemctl kill -s KILL frps
    want "frps killed: kubectl again by itself" until_true 30 bash -c "$(declare -f kl); out=$out kubectl=$kubectl; kl get nodes"
    in_vm cp systemctl kill -s KILL pipeops-control-plane
    want "the control plane killed: kubectl again by itself" until_true 60 bash -c "$(declare -f kl); out=$out kubectl=$kubectl; kl get nodes"
    in_vm cp pipeops control-plane cluster revoke "$id" >/dev/null
    exits 1 "revoked: kubectl is refused" kl get nodes
    want "and frps lets the agent in no more" until_true 60 in_vm a1 sh -c 'systemctl show -p StatusText --value pipeops-agent | grep -E "agent_revoked|unauthorized"'
    rm -rf "$out/loop.kubeconfig" "$out/frps.key"
    vm remove a1; vm remove cp
}
