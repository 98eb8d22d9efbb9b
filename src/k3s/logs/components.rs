//! Which component of k3s ended, where nothing says why; what may pass by itself; warnings.

use super::Severity::{Component, Transient, Warning};
use super::{KnownCause, MODULES, cause};

pub(super) const TABLE: &[(&[&str], KnownCause)] = &[
    // pkg/agent/containerd/containerd.go, pkg/executor/embed/embed.go, pkg/agent/run.go: which part
    // it was
    (
        &["containerd exited"],
        cause(
            "CONTAINERD_EXITS",
            Component,
            "containerd ends again and again",
            "look at /var/lib/rancher/k3s/agent/containerd/containerd.log",
        ),
    ),
    (
        &["failed to start container runtime"],
        cause(
            "CONTAINERD_EXITS",
            Component,
            "containerd does not start",
            "look at /var/lib/rancher/k3s/agent/containerd/containerd.log",
        ),
    ),
    (
        &["kubelet exited"],
        cause(
            "KUBELET_EXITS",
            Component,
            "the kubelet ends again and again",
            "correct what the line names",
        ),
    ),
    (
        &["kube-proxy exited"],
        cause(
            "KUBE_PROXY_EXITS",
            Component,
            "kube-proxy ends again and again",
            "correct what the line names",
        ),
    ),
    (
        &["flannel exited"],
        cause(
            "FLANNEL_EXITS",
            Component,
            "the pod network does not come up",
            "correct what the line names",
        ),
    ),
    (
        &["failed to start networking"],
        cause(
            "FLANNEL_EXITS",
            Component,
            "the pod network does not come up",
            "correct what the line names",
        ),
    ),
    (
        &["controller-manager exited"],
        cause(
            "CONTROLLER_EXITS",
            Component,
            "a controller ends again and again",
            "correct what the line names",
        ),
    ),
    (
        &["scheduler exited"],
        cause(
            "CONTROLLER_EXITS",
            Component,
            "the scheduler ends again and again",
            "correct what the line names",
        ),
    ),
    (
        &["apiserver exited"],
        cause(
            "APISERVER_EXITS",
            Component,
            "the API server ends again and again",
            "correct what the line names",
        ),
    ),
    (
        &["creating storage endpoint"],
        cause(
            "DATASTORE_UNOPENED",
            Component,
            "the datastore cannot be opened",
            "correct what the line names",
        ),
    ),
    (
        &["start managed database"],
        cause(
            "DATASTORE_UNOPENED",
            Component,
            "etcd does not start",
            "correct what the line names",
        ),
    ),
    (
        &["extracting data"],
        cause(
            "K3S_UNPACKED",
            Component,
            "k3s cannot unpack itself into /var/lib/rancher/k3s/data",
            "check space, mount and mode of /var/lib/rancher",
        ),
    ),
    (
        &["panic: "],
        cause(
            "K3S_PANIC",
            Component,
            "k3s breaks off with a fault of its own",
            "try another --k3s-version, and report the lines to k3s-io/k3s",
        ),
    ),
    // what may come right by itself: it names the cause when time is up, and never ends a wait
    (
        &["connection refused", "/cacerts"],
        cause(
            "SERVER_UNREACHABLE",
            Transient,
            "the server refuses connections",
            "check that k3s runs there and the port is 6443",
        ),
    ),
    (
        &["context deadline exceeded", "/cacerts"],
        cause(
            "SERVER_UNREACHABLE",
            Transient,
            "the server does not answer",
            "check the address and firewalls for 6443/tcp",
        ),
    ),
    (
        &["no route to host", "/cacerts"],
        cause(
            "SERVER_UNREACHABLE",
            Transient,
            "there is no way to the server",
            "check the address, routes and firewalls for 6443/tcp",
        ),
    ),
    (
        &["failed to get CA certs"],
        cause(
            "SERVER_UNREACHABLE",
            Transient,
            "the server does not answer",
            "check that k3s runs there, the address, and firewalls for 6443/tcp",
        ),
    ),
    (
        &["failed to ping database connection"],
        cause(
            "DATASTORE_UNREACHABLE",
            Transient,
            "the database does not answer",
            "check that it runs, and datastore-endpoint",
        ),
    ),
    // worth saying beside a cause, and none of itself
    (
        &["failed to load kernel module"],
        cause("KMOD_MISSING", Warning, "a kernel module could not be loaded", MODULES),
    ),
    (
        &["toomanyrequests"],
        cause(
            "REGISTRY_RATE_LIMIT",
            Warning,
            "the image registry limits downloads",
            "wait, or use --registries with a mirror",
        ),
    ),
    (
        &["failed to pull", "no such host"],
        cause(
            "DNS_BROKEN",
            Warning,
            "names cannot be resolved, so images cannot be pulled",
            "check /etc/resolv.conf, or use --offline-dir",
        ),
    ),
    (
        &["failed to pull image"],
        cause(
            "IMAGE_PULL_FAILED",
            Warning,
            "an image cannot be pulled",
            "check the way to the registry, or use --offline-dir",
        ),
    ),
    (
        &["apply request took too long"],
        cause(
            "DISK_FSYNC_SLOW",
            Warning,
            "the data disk is slow",
            "use a local SSD for /var/lib/rancher",
        ),
    ),
    (
        &["Slow SQL"],
        cause(
            "DISK_FSYNC_SLOW",
            Warning,
            "the data disk is slow",
            "use a local SSD for /var/lib/rancher",
        ),
    ),
];
