# shellcheck shell=bash disable=SC2154,SC2034
# kill -9 in the middle of an install, and the run after it. Read by tests/vm/accept.

scenario_kills() {
    # where the install is killed, by number of journal entries: six chosen ones, and all from the start of the unit on
    fresh a1 || return
    local at n runs=0
    for at in 2 5 7 9 11 12 13 14 15 17 19 20 22 23 24; do
        in_vm a1 sh -c "/root/pipeops install-server ${flags[*]} >/dev/null 2>&1 & p=\$!; for n in \$(seq 2400); do [ \$(grep -c '\"title\"' /var/lib/pipeops/journal.json 2>/dev/null || echo 0) -ge $at ] && break; kill -0 \$p 2>/dev/null || break; sleep 0.02; done; kill -9 \$p 2>/dev/null; wait \$p 2>/dev/null; true"
        runs=$((runs + 1))
    done
    exits 0 "after $runs kills in a row the next run completes" install a1
    want "and all is well" until_true 30 in_vm a1 pipeops cluster-info
    k a1 get ns,sa,clusterrole,clusterrolebinding,rolebinding -A -o name | grep -E 'pipeops|production|beta|monitoring' | sort >"$out/killed.objects"
    in_vm a1 sh -c 'cd /; find etc/pipeops etc/rancher/k3s/config.yaml.d etc/systemd/system usr/local/bin -type f -printf "%m %p\n" -exec sha256sum {} \; | sort' >"$out/killed.tree"
    in_vm a1 pipeops uninstall --yes >/dev/null 2>&1
    exits 0 "an undisturbed install on the same machine" install a1
    k a1 get ns,sa,clusterrole,clusterrolebinding,rolebinding -A -o name | grep -E 'pipeops|production|beta|monitoring' | sort >"$out/whole.objects"
    in_vm a1 sh -c 'cd /; find etc/pipeops etc/rancher/k3s/config.yaml.d etc/systemd/system usr/local/bin -type f -printf "%m %p\n" -exec sha256sum {} \; | sort' >"$out/whole.tree"
    want "the same objects" diff "$out/killed.objects" "$out/whole.objects"
    want "the same files" diff "$out/killed.tree" "$out/whole.tree"
    in_vm a1 sh -c "/root/pipeops install-server ${flags[*]} --tls-san x.example.com >/root/int.log 2>&1 & p=\$!; for n in \$(seq 500); do grep -q 'start k3s' /root/int.log && break; sleep 0.02; done; kill -INT \$p; wait \$p; echo \$? > /root/int.rc"
    is "SIGINT ends with 130" "$(in_vm a1 cat /root/int.rc)" 130
    in_vm a1 cat /root/int.log >"$out/last"; says "and says how to go on" "run the same command again"
    exits 0 "which works" install a1 --tls-san x.example.com
    vm remove a1
}
