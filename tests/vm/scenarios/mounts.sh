# shellcheck shell=bash disable=SC2154,SC2034
# Mounts of the user below k3s' directories at uninstall. Read by tests/vm/accept.

scenario_mounts() {
    fresh a1 || return
    exits 0 "an install" install a1
    in_vm a1 sh -c 'mkdir -p /var/lib/rancher/k3s/mine /var/lib/kubelet/pods/x/volumes/y /root/elsewhere; mount -t tmpfs mine /var/lib/rancher/k3s/mine; mount --bind /root/elsewhere /var/lib/kubelet/pods/x/volumes/y; echo precious > /var/lib/rancher/k3s/mine/f; echo precious > /root/elsewhere/f'
    in_vm a1 sh -c 'cd /var/lib/rancher/k3s/mine && exec sleep 300' & in_vm a1 sh -c 'cd /var/lib/kubelet/pods/x/volumes/y && exec sleep 300' &
    sleep 1
    exits 10 "uninstall with busy mounts" in_vm a1 pipeops uninstall --yes
    says "it names them" "MOUNT_STILL_BUSY"
    is "no file on them is lost" "$(in_vm a1 cat /var/lib/rancher/k3s/mine/f /root/elsewhere/f | tr '\n' ' ')" "precious precious "
    in_vm a1 sh -c 'pkill -f "^sleep 300"'; wait
    exits 0 "once they are free, the rest goes" in_vm a1 pipeops uninstall --yes
    is "the file behind the bind mount is still there" "$(in_vm a1 cat /root/elsewhere/f)" precious
    vm remove a1
}
