// A stand-in for k3s in tests, for machines that cannot have the genuine one. It keeps k3s' contract as pipeops sees it
// (server and agent, files, tokens, supervisor endpoints on 6443, Type=notify, config.yaml.d honoured or refused) over a
// real etcd, kube-apiserver, controller-manager, scheduler, kubelet, kube-proxy and containerd, found in /opt/kube-parts (scripts/parts kube).
// CoreDNS and metrics-server run in pods, as in k3s; what has no image here (local-path, traefik) is a pod that only sleeps.
package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"sort"
	"strings"
	"syscall"
	"time"
)

const (
	parts   = "/opt/kube-parts"
	dataDir = "/var/lib/rancher/k3s"
	etc     = "/etc/rancher/k3s"
	runDir  = "/run/k3s"
)

// version is that of the Kubernetes in parts, which is stamped as k3s stamps its own: v1.36.3+k3s1.
func version() string { return text(parts + "/version") }

func logf(level, format string, a ...interface{}) {
	fmt.Fprintf(os.Stderr, "time=%q level=%s msg=%q\n", time.Now().Format(time.RFC3339), level, fmt.Sprintf(format, a...))
}

func fatal(format string, a ...interface{}) {
	logf("fatal", format, a...)
	stopAll()
	os.Exit(1)
}

func check(what string, err error) {
	if err != nil {
		fatal("%s: %v", what, err)
	}
}

func main() {
	// children die with the thread that started them (Pdeathsig), so that thread must be the main one
	runtime.LockOSThread()
	name := filepath.Base(os.Args[0])
	args := os.Args[1:]
	if name == "k3s" {
		if len(args) == 0 {
			fmt.Println("usage: k3s server|agent|kubectl|crictl|ctr|token|--version")
			return
		}
		name, args = args[0], args[1:]
	}
	switch name {
	case "--version", "-v":
		fmt.Printf("k3s version %s (stand-in for tests)\ngo version %s\n", version(), runtime.Version())
	case "kubectl":
		if os.Getenv("KUBECONFIG") == "" {
			os.Setenv("KUBECONFIG", etc+"/k3s.yaml")
		}
		become("kubectl", args)
	case "ctr":
		become("ctr", append([]string{"--address", runDir + "/containerd/containerd.sock", "--namespace", "k8s.io"}, args...))
	case "crictl":
		fmt.Fprintln(os.Stderr, "crictl is not part of the stand-in")
		os.Exit(1)
	case "token":
		tokenCommand(args)
	case "server":
		server(settings(true, args))
	case "agent":
		agent(settings(false, args))
	default:
		fmt.Fprintf(os.Stderr, "No help topic for '%s'\n", name)
		os.Exit(3)
	}
}

func become(program string, args []string) {
	path := parts + "/" + program
	check("exec "+program, syscall.Exec(path, append([]string{program}, args...), os.Environ()))
}

// config is what the drop-in files and flags say: every value a list, lists appended, scalars replaced by later files.
type config map[string][]string

func (c config) get(key, otherwise string) string {
	if v := c[key]; len(v) > 0 {
		return v[len(v)-1]
	}
	return otherwise
}

func (c config) on(key string) bool { return c.get(key, "false") == "true" }

func (c config) list(key string) []string {
	var out []string
	for _, v := range c[key] {
		for _, p := range strings.Split(v, ",") {
			if p != "" {
				out = append(out, p)
			}
		}
	}
	return out
}

var agentKeys = "node-name node-ip node-external-ip node-label node-taint flannel-iface server token token-file kubelet-arg kube-proxy-arg " +
	"resolv-conf prefer-bundled-bin debug data-dir private-registry selinux pause-image snapshotter disable-default-registry-endpoint with-node-id"
var serverKeys = agentKeys + " write-kubeconfig-mode write-kubeconfig write-kubeconfig-group secrets-encryption disable tls-san flannel-backend " +
	"cluster-cidr service-cidr cluster-dns cluster-domain agent-token agent-token-file cluster-init kube-apiserver-arg " +
	"kube-controller-manager-arg kube-scheduler-arg disable-network-policy disable-helm-controller disable-cloud-controller embedded-registry " +
	"advertise-address bind-address https-listen-port etcd-snapshot-schedule-cron egress-selector-mode protect-kernel-defaults"

func settings(isServer bool, args []string) config {
	known := map[string]bool{}
	keys := agentKeys
	if isServer {
		keys = serverKeys
	}
	for _, k := range strings.Fields(keys) {
		known[k] = true
	}
	files := []string{etc + "/config.yaml"}
	more, _ := filepath.Glob(etc + "/config.yaml.d/*.yaml")
	sort.Strings(more)
	c := config{}
	for _, f := range append(files, more...) {
		read(f, c, known)
	}
	for _, a := range args {
		kv := strings.SplitN(strings.TrimLeft(a, "-"), "=", 2)
		if !known[kv[0]] {
			refuse(kv[0])
		}
		if len(kv) == 1 {
			kv = append(kv, "true")
		}
		c[kv[0]] = append(c[kv[0]], kv[1])
	}
	if t := os.Getenv("K3S_TOKEN"); t != "" {
		c["token"] = []string{t}
	}
	if u := os.Getenv("K3S_URL"); u != "" {
		c["server"] = []string{u}
	}
	return c
}

func refuse(key string) {
	fmt.Fprintf(os.Stderr, "Incorrect Usage: flag provided but not defined: -%s\n", key)
	logf("fatal", "flag provided but not defined: -%s", key)
	os.Exit(1)
}

// read takes the part of YAML that k3s' settings are written in: scalars, and lists of scalars.
func read(file string, c config, known map[string]bool) {
	f, err := os.Open(file)
	if err != nil {
		return
	}
	defer f.Close()
	key := ""
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		line := lines.Text()
		trim := strings.TrimSpace(line)
		if trim == "" || strings.HasPrefix(trim, "#") {
			continue
		}
		if strings.HasPrefix(trim, "- ") {
			c[key] = append(c[key], unquote(trim[2:]))
			continue
		}
		kv := strings.SplitN(trim, ":", 2)
		if len(kv) != 2 {
			fatal("reading %s: not YAML: %s", file, trim)
		}
		appendTo := strings.HasSuffix(kv[0], "+")
		key = strings.TrimSuffix(unquote(kv[0]), "+")
		if !known[key] {
			// k3s passes over what it does not know in a file, and refuses it on the command line (pkg/configfilearg)
			logf("warning", "Unknown flag --%s found in config.yaml, skipping", key)
			key = "skipped"
		}
		if !appendTo {
			c[key] = nil
		}
		if v := strings.TrimSpace(kv[1]); v != "" {
			c[key] = append(c[key], unquote(v))
		}
	}
}

func unquote(s string) string { return strings.Trim(strings.TrimSpace(s), `"'`) }

// children in the order of their start; stopped in reverse.
var children []*exec.Cmd
var stopping bool

func start(name string, logTo string, args ...string) *exec.Cmd {
	cmd := exec.Command(parts+"/"+name, args...)
	// what there is to tell systemd is ours to tell
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "NOTIFY_SOCKET=") {
			cmd.Env = append(cmd.Env, e)
		}
	}
	cmd.Env = append(cmd.Env, "PATH="+parts+":"+os.Getenv("PATH")+":/usr/sbin:/sbin")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out := os.Stderr
	if logTo != "" {
		if f, err := os.OpenFile(logTo, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0600); err == nil {
			out = f
		}
	}
	cmd.Stdout, cmd.Stderr = out, out
	check("starting "+name, cmd.Start())
	children = append(children, cmd)
	go func() {
		err := cmd.Wait()
		if !stopping {
			// as k3s says it, whose parts are functions: the part, and what it returned
			part, why := name, fmt.Sprint(err)
			if part != "kube-proxy" {
				part = strings.TrimPrefix(part, "kube-")
			}
			if b, e := os.ReadFile(logTo); e == nil {
				tail := strings.Split(strings.TrimSpace(string(b)), "\n")
				for _, l := range tail[max(0, len(tail)-5):] {
					if said, ok := strings.CutPrefix(l, "Error: "); ok {
						why = said
					} else {
						logf("error", "%s", l)
					}
				}
			}
			logf("fatal", "%s exited: %s", part, why)
			os.Exit(1)
		}
	}()
	return cmd
}

func stopAll() {
	stopping = true
	for i := len(children) - 1; i >= 0; i-- {
		p := children[i].Process
		p.Signal(syscall.SIGTERM)
		for n := 0; n < 50; n++ {
			if p.Signal(syscall.Signal(0)) != nil {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		p.Kill()
	}
}

func waitForSignal() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM, syscall.SIGINT)
	<-c
	logf("info", "stopping")
	stopAll()
}

func notify(state string) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	if path[0] == '@' {
		path = "\x00" + path[1:]
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err == nil {
		c.Write([]byte(state))
		c.Close()
	}
}

func write(path, content string, mode os.FileMode) {
	check("creating "+filepath.Dir(path), os.MkdirAll(filepath.Dir(path), 0700))
	check("writing "+path, os.WriteFile(path, []byte(content), mode))
	os.Chmod(path, mode)
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

func text(path string) string {
	b, _ := os.ReadFile(path)
	return strings.TrimSpace(string(b))
}

func hostname() string {
	h, _ := os.Hostname()
	return strings.ToLower(h)
}

// defaultAddress is the source address of the default route, as k3s picks it.
func defaultAddress() string {
	routes, _ := os.ReadFile("/proc/net/route")
	ok := false
	for _, l := range strings.Split(string(routes), "\n") {
		f := strings.Fields(l)
		ok = ok || len(f) > 2 && f[1] == "00000000"
	}
	if !ok {
		fatal("no default routes found in \"/proc/net/route\" or \"/proc/net/ipv6_route\"")
	}
	c, err := net.Dial("udp", "192.0.2.1:9")
	check("finding the node's address", err)
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).IP.String()
}
