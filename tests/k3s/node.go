package main

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

const agentDir = dataDir + "/agent"

func ensureNodePassword() string {
	file := "/etc/rancher/node/password"
	if !exists(file) {
		write(file, random(16)+"\n", 0600)
	}
	return text(file)
}

// agent joins the server that the settings name.
func agent(c config) {
	logf("info", "Starting k3s agent %s", version())
	node, ip := c.get("node-name", hostname()), c.get("node-ip", "")
	if ip == "" {
		ip = defaultAddress()
	}
	ip = strings.Split(ip, ",")[0]
	master := strings.TrimSuffix(c.get("server", ""), "/")
	token := c.get("token", "")
	if f := c.get("token-file", ""); f != "" {
		token = text(f)
	}
	if master == "" || token == "" {
		fatal("--server and --token are required")
	}
	u, err := url.Parse(master)
	check("parsing --server", err)
	go balance(u.Host)

	var pinned *http.Client
	for {
		ca, err := caOf(master, token)
		if err == nil {
			write(agentDir+"/server-ca.crt", string(ca), 0644)
			conf := &tls.Config{RootCAs: pool(ca)}
			// a node that joined before is known by its own certificate: the token may have expired since
			if exists(agentDir + "/client-kubelet.crt") {
				conf.Certificates = []tls.Certificate{pair(agentDir + "/client-kubelet")}
			}
			pinned = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: conf}}
			break
		}
		logf("error", "failed to get CA certs: %v", err)
		time.Sleep(2 * time.Second)
	}
	password := ensureNodePassword()
	get := func(path string) []byte {
		for {
			body, code, err := fetch(pinned, master+path, token, node, password)
			if err == nil && code == 200 {
				return body
			}
			if code == 403 && strings.Contains(string(body), "Node password") {
				fatal("Node password rejected, duplicate hostname or contents of '/etc/rancher/node/password' may not match server node-passwd entry")
			}
			logf("error", "Failed to retrieve agent configuration: %s: %d %s %v", master+path, code, http.StatusText(code), err)
			time.Sleep(2 * time.Second)
		}
	}
	var said struct{ ClusterDNS string }
	json.Unmarshal(get("/v1-k3s/config"), &said)
	c["cluster-dns"] = []string{said.ClusterDNS}
	write(agentDir+"/client-ca.crt", string(get("/v1-k3s/client-ca.crt")), 0644)
	for _, name := range []string{"client-kubelet", "serving-kubelet", "client-kube-proxy"} {
		both := string(get("/v1-k3s/" + name + ".crt"))
		at := strings.Index(both, "-----BEGIN EC PRIVATE KEY")
		write(agentDir+"/"+name+".crt", both[:at], 0644)
		write(agentDir+"/"+name+".key", both[at:], 0600)
	}
	runNode(c, node, ip, "https://127.0.0.1:6444")
	for get := nodeClient("https://127.0.0.1:6444", "client-kubelet"); get("/api/v1/nodes/"+node) == nil; {
		time.Sleep(500 * time.Millisecond)
	}
	notify("READY=1")
	logf("info", "k3s agent is up and running")
	waitForSignal()
}

func caOf(master, token string) ([]byte, error) {
	blind := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	r, err := blind.Get(master + "/cacerts")
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	ca, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	if hash, _, ok := strings.Cut(strings.TrimPrefix(token, "K10"), "::"); ok && hash != "" && hash != sum(ca) {
		fatal("Error: token CA hash does not match the Cluster CA certificate hash: %s != %s", hash, sum(ca))
	}
	return ca, nil
}

func fetch(client *http.Client, url, token, node, password string) ([]byte, int, error) {
	r, _ := http.NewRequest("GET", url, nil)
	_, secret, ok := strings.Cut(token, "::")
	if !ok {
		secret = token
	}
	if strings.Contains(secret, ".") && !strings.Contains(secret, ":") {
		r.Header.Set("Authorization", "Bearer "+secret)
	} else {
		r.SetBasicAuth("node", secret[strings.Index(secret, ":")+1:])
	}
	r.Header.Set("k3s-Node-Name", node)
	r.Header.Set("k3s-Node-Password", password)
	answer, err := client.Do(r)
	if err != nil {
		return nil, 0, err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	return body, answer.StatusCode, err
}

// balance is k3s' load balancer on 127.0.0.1:6444: bytes to the server.
func balance(server string) {
	if !strings.Contains(server, ":") {
		server += ":443"
	}
	l, err := net.Listen("tcp", "127.0.0.1:6444")
	check("listening on 6444", err)
	for {
		a, err := l.Accept()
		if err != nil {
			continue
		}
		go func() {
			defer a.Close()
			b, err := net.DialTimeout("tcp", server, 5*time.Second)
			if err != nil {
				return
			}
			defer b.Close()
			go func() { io.Copy(b, a); b.Close() }()
			io.Copy(a, b)
		}()
	}
}

// clusterDNS is the address of CoreDNS: the tenth of the service range unless the settings name one.
func clusterDNS(c config) string {
	service := c.get("service-cidr", "10.43.0.0/16")
	return c.get("cluster-dns", regexp.MustCompile(`\.\d+/\d+$`).ReplaceAllString(service, ".10"))
}

// runNode starts containerd, kubelet and kube-proxy with the certificates under agentDir.
func runNode(c config, node, ip, server string) {
	conf := agentDir + "/etc"
	logs := agentDir + "/logs"
	os.MkdirAll(logs, 0700)
	os.MkdirAll(conf+"/cni/net.d", 0700)
	kubeconfig(agentDir+"/kubelet.kubeconfig", server, agentDir+"/server-ca.crt", agentDir+"/client-kubelet.crt", agentDir+"/client-kubelet.key")
	kubeconfig(agentDir+"/kubeproxy.kubeconfig", server, agentDir+"/server-ca.crt", agentDir+"/client-kube-proxy.crt", agentDir+"/client-kube-proxy.key")
	// overlayfs does not stand on overlayfs
	snapshotter := "overlayfs"
	var fs syscall.Statfs_t
	if syscall.Statfs(agentDir, &fs) == nil && fs.Type == 0x794c7630 {
		snapshotter = "native"
	}
	sock := runDir + "/containerd/containerd.sock"
	// nothing may lower an oom_score_adj where CAP_SYS_RESOURCE is missing
	write(conf+"/containerd/config.toml", fmt.Sprintf(`version = 3
root = %q
state = %q
[grpc]
  address = %q
[plugins.'io.containerd.cri.v1.images']
  snapshotter = %q
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = "docker.io/rancher/mirrored-pause:3.6"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = [%q]
    conf_dir = %q
`, agentDir+"/containerd", runDir+"/containerd", sock, snapshotter, parts+"/cni", conf+"/cni/net.d"), 0600)
	start("containerd", logs+"/containerd.log", "--config", conf+"/containerd/config.toml")
	for n := 0; n < 200; n++ {
		if cn, err := net.Dial("unix", sock); err == nil {
			cn.Close()
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	archives, _ := filepath.Glob(agentDir + "/images/*.tar*")
	for _, a := range archives {
		cmd := exec.Command(parts+"/ctr", "--address", sock, "--namespace", "k8s.io", "images", "import", "--local", "--snapshotter", snapshotter, a)
		cmd.Env = append(os.Environ(), "PATH="+parts+":"+os.Getenv("PATH"))
		if out, err := cmd.CombinedOutput(); err != nil {
			logf("error", "importing %s: %s", a, out)
		}
	}
	resolv := c.get("resolv-conf", "/etc/resolv.conf")
	write(conf+"/kubelet.yaml", fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
containerRuntimeEndpoint: "unix://%s"
clusterDomain: cluster.local
clusterDNS: [%q]
resolvConf: %q
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: %q}}
authorization: {mode: Webhook}
tlsCertFile: %q
tlsPrivateKeyFile: %q
healthzBindAddress: 127.0.0.1
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {imagefs.available: "1%%", nodefs.available: "1%%", memory.available: "10Mi"}
protectKernelDefaults: false
`, sock, clusterDNS(c), resolv, agentDir+"/client-ca.crt", agentDir+"/serving-kubelet.crt", agentDir+"/serving-kubelet.key"), 0600)
	args := []string{"--config", conf + "/kubelet.yaml", "--kubeconfig", agentDir + "/kubelet.kubeconfig",
		"--node-ip", ip, "--hostname-override", node, "--cert-dir", agentDir + "/pki", "--root-dir", "/var/lib/kubelet"}
	if l := c.list("node-label"); len(l) > 0 {
		args = append(args, "--node-labels", strings.Join(l, ","))
	}
	if t := c.list("node-taint"); len(t) > 0 {
		args = append(args, "--register-with-taints", strings.Join(t, ","))
	}
	for _, a := range c["kubelet-arg"] {
		args = append(args, "--"+a)
	}
	start("kubelet", logs+"/kubelet.log", args...)
	start("kube-proxy", logs+"/kube-proxy.log", "--kubeconfig", agentDir+"/kubeproxy.kubeconfig", "--cluster-cidr", "10.42.0.0/16", "--hostname-override", node,
		"--conntrack-max-per-core", "0", "--conntrack-tcp-timeout-established", "0s", "--conntrack-tcp-timeout-close-wait", "0s", "--healthz-bind-address", "127.0.0.1:10256", "--metrics-bind-address", "127.0.0.1:10249")
	if c.get("flannel-backend", "vxlan") != "none" {
		go flannel(nodeClient(server, "client-kube-proxy"), node, ip, conf+"/cni/net.d")
	}
}
