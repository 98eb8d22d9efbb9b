# shellcheck shell=bash disable=SC2154,SC2034
# Machines that are not fit, downloads that are damaged, a k3s of somebody else. Read by tests/vm/accept.

scenario_wrong() {
    fresh a1 || return
    listing a1 >"$out/a1.before"
    in_vm a1 sh -c 'cp /root/pipeops /tmp/pipeops; chmod 755 /tmp/pipeops'
    exits 3 "not root" in_vm a1 setpriv --reuid=65534 --clear-groups /tmp/pipeops install-server "${flags[@]}"
    says "it says so" "NOT_ROOT"
    in_vm a1 sh -c 'mkdir -p /opt/tiny 2>/dev/null; mkdir -p /tmp/tiny; mount -t tmpfs -o size=4m tiny /usr/local/bin'
    exits 3 "no room where the programs go" in_vm a1 /root/pipeops install-server "${flags[@]}"
    says "the disk is named" "DISK_LOW"
    exits 10 "a disk that fills up while it is written to" in_vm a1 /root/pipeops install-server "${flags[@]}" --ignore DISK_LOW
    says "it is called full" "DISK_FULL"
    in_vm a1 pipeops uninstall --yes >/dev/null 2>&1 || in_vm a1 /root/pipeops uninstall --yes >/dev/null 2>&1
    in_vm a1 umount /usr/local/bin
    in_vm a1 sh -c 'cp -r /opt/release /tmp/bad; echo x >> /tmp/bad/k3s'
    exits 6 "a damaged program" in_vm a1 /root/pipeops install-server --offline-dir /tmp/bad --yes
    exits 3 "an occupied port" in_vm a1 sh -c "socat TCP-LISTEN:6443,fork - & p=\$!; sleep 0.5; /root/pipeops install-server ${flags[*]}; rc=\$?; kill \$p; exit \$rc"
    says "its holder is named" '`socat`'
    exits 3 "a foreign k3s" in_vm a1 sh -c "touch /etc/systemd/system/k3s.service; /root/pipeops install-server ${flags[*]}; rc=\$?; rm /etc/systemd/system/k3s.service; exit \$rc"
    in_vm a1 sh -c 'rm -rf /tmp/*'
    listing a1 >"$out/a1.after"
    same_listing a1 "none of them left anything"
    vm remove a1
}
