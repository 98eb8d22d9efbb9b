package main

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

const api = "https://127.0.0.1:6444"

var admin *http.Client

func server(c config) {
	logf("info", "Starting k3s %s", version())
	tlsDir, cred := dataDir+"/server/tls", dataDir+"/server/cred"
	node, ip := c.get("node-name", hostname()), c.get("node-ip", "")
	route := defaultAddress()
	if ip == "" {
		ip = route
	}
	ip = strings.Split(ip, ",")[0]
	for _, port := range []string{":6443", "127.0.0.1:6444", ":10250"} {
		l, err := net.Listen("tcp", port)
		check("Failed to start networking: unable to listen", err)
		l.Close()
	}
	serverCA, clientCA, headerCA := ca(tlsDir, "server-ca"), ca(tlsDir, "client-ca"), ca(tlsDir, "request-header-ca")

	password := c.get("token", "")
	if f := c.get("token-file", ""); f != "" {
		password = text(f)
	}
	if i := strings.LastIndex(password, ":"); i >= 0 {
		password = password[i+1:]
	}
	kept := text(dataDir + "/server/token")
	if kept != "" {
		kept = kept[strings.LastIndex(kept, ":")+1:]
	}
	if password == "" {
		password = kept
	}
	if password == "" {
		password = random(16)
	}
	if mark := text(dataDir + "/server/db/token-hash"); mark != "" && mark != sum([]byte(password)) {
		fatal("starting kubernetes: preparing server: bootstrap data already found and encrypted with different token")
	}
	write(dataDir+"/server/db/token-hash", sum([]byte(password)), 0600)
	full := "K10" + sum(serverCA.pem) + "::server:" + password
	write(dataDir+"/server/token", full+"\n", 0600)
	for _, l := range []string{"node-token", "agent-token"} {
		os.Remove(dataDir + "/server/" + l)
		os.Symlink(dataDir+"/server/token", dataDir+"/server/"+l)
	}

	service := c.get("service-cidr", "10.43.0.0/16")
	first := regexp.MustCompile(`\.\d+/\d+$`).ReplaceAllString(service, ".1")
	sans := append([]string{"127.0.0.1", "::1", "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", first, ip, hostname()}, c.list("tls-san")...)
	serverCA.files(tlsDir+"/serving-kube-apiserver", "kube-apiserver", nil, sans, true)
	clientCA.files(tlsDir+"/client-admin", "system:admin", []string{"system:masters"}, nil, false)
	clientCA.files(tlsDir+"/client-controller", "system:kube-controller-manager", nil, nil, false)
	clientCA.files(tlsDir+"/client-scheduler", "system:kube-scheduler", nil, nil, false)
	clientCA.files(tlsDir+"/client-kube-apiserver", "system:apiserver", []string{"system:masters"}, nil, false)
	headerCA.files(tlsDir+"/client-auth-proxy", "system:auth-proxy", nil, nil, false)
	if !exists(tlsDir + "/service.key") {
		_, key := clientCA.issue("service", nil, nil, false)
		write(tlsDir+"/service.key", key, 0600)
	}
	for _, n := range []string{"admin", "controller", "scheduler"} {
		kubeconfig(cred+"/"+n+".kubeconfig", api, tlsDir+"/server-ca.crt", tlsDir+"/client-"+n+".crt", tlsDir+"/client-"+n+".key")
	}

	logs := dataDir + "/server/logs"
	os.MkdirAll(logs, 0700)
	start("etcd", logs+"/etcd.log", "--data-dir", dataDir+"/server/db/etcd", "--listen-client-urls", "http://127.0.0.1:2379",
		"--advertise-client-urls", "http://127.0.0.1:2379", "--listen-peer-urls", "http://127.0.0.1:2380", "--initial-advertise-peer-urls", "http://127.0.0.1:2380",
		"--initial-cluster", "default=http://127.0.0.1:2380", "--unsafe-no-fsync")
	flags := []string{"--etcd-servers", "http://127.0.0.1:2379", "--secure-port", "6444", "--bind-address", "127.0.0.1", "--advertise-address", ip,
		"--service-cluster-ip-range", service, "--authorization-mode", "Node,RBAC", "--enable-aggregator-routing=true", "--endpoint-reconciler-type", "none", "--enable-admission-plugins", "NodeRestriction", "--allow-privileged=true",
		"--client-ca-file", tlsDir + "/client-ca.crt", "--tls-cert-file", tlsDir + "/serving-kube-apiserver.crt", "--tls-private-key-file", tlsDir + "/serving-kube-apiserver.key",
		"--kubelet-client-certificate", tlsDir + "/client-kube-apiserver.crt", "--kubelet-client-key", tlsDir + "/client-kube-apiserver.key", "--kubelet-preferred-address-types", "InternalIP",
		"--service-account-issuer", "https://kubernetes.default.svc.cluster.local", "--service-account-key-file", tlsDir + "/service.key", "--service-account-signing-key-file", tlsDir + "/service.key",
		"--api-audiences", "https://kubernetes.default.svc.cluster.local,k3s", "--enable-bootstrap-token-auth=true", "--anonymous-auth=false",
		"--requestheader-client-ca-file", tlsDir + "/request-header-ca.crt", "--requestheader-allowed-names", "system:auth-proxy", "--requestheader-username-headers", "X-Remote-User",
		"--requestheader-group-headers", "X-Remote-Group", "--requestheader-extra-headers-prefix", "X-Remote-Extra-",
		"--proxy-client-cert-file", tlsDir + "/client-auth-proxy.crt", "--proxy-client-key-file", tlsDir + "/client-auth-proxy.key"}
	if c.on("secrets-encryption") {
		file := cred + "/encryption-config.json"
		if !exists(file) {
			key := make([]byte, 32)
			rand.Read(key)
			write(file, fmt.Sprintf(`{"kind":"EncryptionConfiguration","apiVersion":"apiserver.config.k8s.io/v1","resources":[{"resources":["secrets"],"providers":[{"aescbc":{"keys":[{"name":"aescbckey","secret":"%s"}]}},{"identity":{}}]}]}`, base64.StdEncoding.EncodeToString(key)), 0600)
		}
		flags = append(flags, "--encryption-provider-config", file)
	}
	for _, a := range c["kube-apiserver-arg"] {
		flags = append(flags, "--"+a)
	}
	start("kube-apiserver", logs+"/kube-apiserver.log", flags...)

	admin = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool(serverCA.pem), Certificates: []tls.Certificate{pair(tlsDir + "/client-admin")}}}}
	go supervise(c, tlsDir, serverCA, clientCA, password)
	logf("info", "Waiting for API server to become available")
	for {
		if r, err := admin.Get(api + "/readyz"); err == nil {
			ok := r.StatusCode == 200
			r.Body.Close()
			if ok {
				break
			}
		}
		time.Sleep(300 * time.Millisecond)
	}
	writeAdmin(c, tlsDir, serverCA)
	start("kube-controller-manager", logs+"/kube-controller-manager.log", "--kubeconfig", cred+"/controller.kubeconfig", "--service-account-private-key-file", tlsDir+"/service.key",
		"--root-ca-file", tlsDir+"/server-ca.crt", "--use-service-account-credentials", "--cluster-cidr", c.get("cluster-cidr", "10.42.0.0/16"), "--allocate-node-cidrs", "--leader-elect=false",
		"--cluster-signing-cert-file", tlsDir+"/client-ca.crt", "--cluster-signing-key-file", tlsDir+"/client-ca.key", "--bind-address", "127.0.0.1", "--controllers", "*,bootstrapsigner,tokencleaner")
	start("kube-scheduler", logs+"/kube-scheduler.log", "--kubeconfig", cred+"/scheduler.kubeconfig", "--leader-elect=false", "--bind-address", "127.0.0.1")

	// the server's own node, by the same certificates that a worker gets
	agentDir := dataDir + "/agent"
	clientCA.files(agentDir+"/client-kubelet", "system:node:"+node, []string{"system:nodes"}, nil, false)
	clientCA.files(agentDir+"/client-kube-proxy", "system:kube-proxy", nil, nil, false)
	serverCA.files(agentDir+"/serving-kubelet", node, nil, []string{node, ip, "127.0.0.1"}, true)
	write(agentDir+"/server-ca.crt", string(serverCA.pem), 0644)
	write(agentDir+"/client-ca.crt", string(clientCA.pem), 0644)
	ensureNodePassword()
	runNode(c, node, ip, "https://127.0.0.1:6443")
	waitNode(node)
	kubectl("label", "--overwrite", "node", node, "node-role.kubernetes.io/control-plane=true", "node-role.kubernetes.io/master=true")
	bundled(c, ip)
	go provision()
	go nodeHosts()
	go forgetPasswords()
	notify("READY=1")
	logf("info", "k3s is up and running")
	waitForSignal()
}

func writeAdmin(c config, tlsDir string, serverCA authority) {
	b64 := func(b []byte) string { return base64.StdEncoding.EncodeToString(b) }
	crt, _ := os.ReadFile(tlsDir + "/client-admin.crt")
	key, _ := os.ReadFile(tlsDir + "/client-admin.key")
	var mode os.FileMode = 0600
	fmt.Sscanf(c.get("write-kubeconfig-mode", "0600"), "%o", &mode)
	write(etc+"/k3s.yaml", fmt.Sprintf(`apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: %s
    server: https://127.0.0.1:6443
  name: default
contexts:
- context:
    cluster: default
    user: default
  name: default
current-context: default
kind: Config
preferences: {}
users:
- name: default
  user:
    client-certificate-data: %s
    client-key-data: %s
`, b64(serverCA.pem), b64(crt), b64(key)), mode)
}

// supervise is what listens on 6443: k3s' own endpoints, everything else goes to the API server.
func supervise(c config, tlsDir string, serverCA, clientCA authority, password string) {
	target, _ := url.Parse(api)
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.FlushInterval = -1
	proxy.ErrorLog = nil
	proxy.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool(serverCA.pem), Certificates: []tls.Certificate{pair(tlsDir + "/client-auth-proxy")}}}
	forward := func(w http.ResponseWriter, r *http.Request) {
		for k := range r.Header {
			if strings.HasPrefix(strings.ToLower(k), "x-remote-") {
				r.Header.Del(k)
			}
		}
		if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
			s := r.TLS.PeerCertificates[0].Subject
			r.Header.Set("X-Remote-User", s.CommonName)
			for _, o := range s.Organization {
				r.Header.Add("X-Remote-Group", o)
			}
		}
		proxy.ServeHTTP(w, r)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/", forward)
	mux.HandleFunc("/ping", func(w http.ResponseWriter, r *http.Request) { w.Write([]byte("pong")) })
	mux.HandleFunc("/cacerts", func(w http.ResponseWriter, r *http.Request) { w.Write(serverCA.pem) })
	authed := func(h http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			switch identify(r, password) {
			case 200:
				h(w, r)
			case 403:
				http.Error(w, "forbidden", 403)
			default:
				http.Error(w, "Unauthorized", 401)
			}
		}
	}
	mux.HandleFunc("/v1-k3s/config", authed(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(map[string]interface{}{"ClusterIPRange": c.get("cluster-cidr", "10.42.0.0/16"), "ServiceIPRange": c.get("service-cidr", "10.43.0.0/16"), "ClusterDNS": clusterDNS(c), "FlannelBackend": c.get("flannel-backend", "vxlan")})
	}))
	mux.HandleFunc("/v1-k3s/server-ca.crt", authed(func(w http.ResponseWriter, r *http.Request) { w.Write(serverCA.pem) }))
	mux.HandleFunc("/v1-k3s/client-ca.crt", authed(func(w http.ResponseWriter, r *http.Request) { w.Write(clientCA.pem) }))
	mux.HandleFunc("/v1-k3s/client-kube-proxy.crt", authed(func(w http.ResponseWriter, r *http.Request) {
		crt, key := clientCA.issue("system:kube-proxy", nil, nil, false)
		io.WriteString(w, crt+key)
	}))
	node := func(issue func(name string, r *http.Request) (string, string)) http.HandlerFunc {
		return authed(func(w http.ResponseWriter, r *http.Request) {
			name := r.Header.Get("k3s-Node-Name")
			if name == "" {
				http.Error(w, "node name not set", 400)
				return
			}
			if !nodePassword(name, r.Header.Get("k3s-Node-Password")) {
				logf("error", "Node password rejected for %s", name)
				http.Error(w, "Node password rejected, duplicate hostname or contents of '/etc/rancher/node/password' may not match server node-passwd entry", 403)
				return
			}
			crt, key := issue(name, r)
			io.WriteString(w, crt+key)
		})
	}
	mux.HandleFunc("/v1-k3s/client-kubelet.crt", node(func(name string, r *http.Request) (string, string) {
		return clientCA.issue("system:node:"+name, []string{"system:nodes"}, nil, false)
	}))
	mux.HandleFunc("/v1-k3s/serving-kubelet.crt", node(func(name string, r *http.Request) (string, string) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		return serverCA.issue(name, nil, []string{name, host, "127.0.0.1"}, true)
	}))
	s := &http.Server{Addr: ":6443", Handler: mux, TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair(tlsDir + "/serving-kube-apiserver")}, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: pool(clientCA.pem)}}
	fatal("supervisor: %v", s.ListenAndServeTLS("", ""))
}

// identify: a node's own certificate, the password by basic auth, or a bootstrap token.
func identify(r *http.Request, password string) int {
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 && strings.HasPrefix(r.TLS.PeerCertificates[0].Subject.CommonName, "system:node:") {
		return 200
	}
	if user, pass, ok := r.BasicAuth(); ok {
		if pass == password && (user == "node" || user == "server") {
			return 200
		}
		return 401
	}
	token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	id, secret, ok := strings.Cut(token, ".")
	if !ok {
		return 401
	}
	s := object("GET", "/api/v1/namespaces/kube-system/secrets/bootstrap-token-"+id, nil)
	data, _ := s["data"].(map[string]interface{})
	field := func(k string) string {
		v, _ := data[k].(string)
		b, _ := base64.StdEncoding.DecodeString(v)
		return string(b)
	}
	if data == nil || field("token-secret") != secret {
		return 401
	}
	if e := field("expiration"); e != "" {
		if t, err := time.Parse(time.RFC3339, e); err != nil || time.Now().After(t) {
			return 401
		}
	}
	return 200
}

func nodePassword(name, password string) bool {
	password = strings.TrimSpace(password)
	path := "/api/v1/namespaces/kube-system/secrets/" + name + ".node-password.k3s"
	have := object("GET", path, nil)
	if data, ok := have["data"].(map[string]interface{}); ok {
		b, _ := base64.StdEncoding.DecodeString(fmt.Sprint(data["hash"]))
		return string(b) == sum([]byte(password))
	}
	object("POST", "/api/v1/namespaces/kube-system/secrets", map[string]interface{}{"apiVersion": "v1", "kind": "Secret",
		"metadata": map[string]interface{}{"name": name + ".node-password.k3s"}, "stringData": map[string]interface{}{"hash": sum([]byte(password))}})
	return true
}

// nodeHosts keeps the names of the nodes where CoreDNS reads them.
func nodeHosts() {
	for said := ""; ; time.Sleep(5 * time.Second) {
		var lines []string
		for _, n := range nodesOf(object("GET", "/api/v1/nodes", nil)) {
			lines = append(lines, n.ip+" "+n.name)
		}
		hosts := strings.Join(lines, "\n") + "\n"
		patch, _ := json.Marshal(map[string]any{"data": map[string]string{"NodeHosts": hosts}})
		if hosts == said {
			continue
		}
		if _, err := kubectl("-n", "kube-system", "patch", "configmap", "coredns", "--type=merge", "-p", string(patch)); err == nil {
			said = hosts
		}
	}
}

// forgetPasswords drops a node's password once its Node was there and is gone, as the owner reference does in k3s.
func forgetPasswords() {
	seen := map[string]bool{}
	for {
		now := map[string]bool{}
		items, ok := object("GET", "/api/v1/nodes", nil)["items"].([]interface{})
		for _, i := range items {
			n := i.(map[string]interface{})["metadata"].(map[string]interface{})["name"].(string)
			now[n], seen[n] = true, true
		}
		for n := range seen {
			if ok && !now[n] {
				object("DELETE", "/api/v1/namespaces/kube-system/secrets/"+n+".node-password.k3s", nil)
				delete(seen, n)
			}
		}
		time.Sleep(time.Second)
	}
}

// object is one request as admin; nil on any failure.
func object(method, path string, body interface{}) map[string]interface{} {
	var reader io.Reader
	if body != nil {
		b, _ := json.Marshal(body)
		reader = bytes.NewReader(b)
	}
	r, _ := http.NewRequest(method, api+path, reader)
	r.Header.Set("Content-Type", "application/json")
	answer, err := admin.Do(r)
	if err != nil {
		return nil
	}
	defer answer.Body.Close()
	out := map[string]interface{}{}
	json.NewDecoder(answer.Body).Decode(&out)
	if answer.StatusCode >= 300 {
		return nil
	}
	return out
}

func kubectl(args ...string) (string, error) {
	cmd := exec.Command(parts+"/kubectl", append([]string{"--kubeconfig", dataDir + "/server/cred/admin.kubeconfig"}, args...)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func waitNode(node string) {
	for n := 0; n < 240; n++ {
		if object("GET", "/api/v1/nodes/"+node, nil) != nil {
			return
		}
		time.Sleep(500 * time.Millisecond)
	}
	fatal("node %s did not register", node)
}

// bundled applies what k3s brings along, less what is disabled.
func bundled(c config, ip string) {
	off := map[string]bool{}
	for _, name := range c.list("disable") {
		off[name] = true
	}
	docs := []string{fmt.Sprintf(ownEndpoint, ip), helmCRDs}
	for _, b := range []struct {
		name  string
		parts []string
	}{
		{"coredns", []string{fmt.Sprintf(coreDNS, clusterDNS(c))}},
		{"metrics-server", []string{metricsServer}},
		{"local-storage", []string{fmt.Sprintf(sleeper, "local-path-provisioner"), storageClass}},
		{"traefik", []string{fmt.Sprintf(sleeper, "traefik")}},
	} {
		if !off[b.name] {
			docs = append(docs, b.parts...)
		}
	}
	file := dataDir + "/server/manifests/bundled.yaml"
	write(file, strings.Join(docs, "\n---\n"), 0600)
	for n := 0; n < 30; n++ {
		out, err := kubectl("apply", "-f", file)
		if err == nil {
			return
		}
		logf("warning", "applying manifests: %s", strings.TrimSpace(out))
		time.Sleep(time.Second)
	}
}

// provision makes local-path volumes: a directory of the node for each claim that has been scheduled.
func provision() {
	for {
		time.Sleep(time.Second)
		items, _ := object("GET", "/api/v1/persistentvolumeclaims", nil)["items"].([]interface{})
		for _, i := range items {
			pvc := i.(map[string]interface{})
			meta, spec := pvc["metadata"].(map[string]interface{}), pvc["spec"].(map[string]interface{})
			notes, _ := meta["annotations"].(map[string]interface{})
			node, _ := notes["volume.kubernetes.io/selected-node"].(string)
			if spec["storageClassName"] != "local-path" || spec["volumeName"] != nil || node == "" {
				continue
			}
			name := fmt.Sprintf("pvc-%s", meta["uid"])
			path := filepath.Join(dataDir, "storage", fmt.Sprintf("%s_%s_%s", name, meta["namespace"], meta["name"]))
			os.MkdirAll(path, 0777)
			os.Chmod(path, 0777)
			object("POST", "/api/v1/persistentvolumes", map[string]interface{}{"apiVersion": "v1", "kind": "PersistentVolume", "metadata": map[string]interface{}{"name": name, "annotations": map[string]string{"pv.kubernetes.io/provisioned-by": "rancher.io/local-path"}},
				"spec": map[string]interface{}{"capacity": spec["resources"].(map[string]interface{})["requests"], "accessModes": spec["accessModes"], "storageClassName": "local-path", "persistentVolumeReclaimPolicy": "Delete",
					"hostPath": map[string]string{"path": path, "type": "DirectoryOrCreate"}, "claimRef": map[string]interface{}{"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": meta["namespace"], "name": meta["name"], "uid": meta["uid"]},
					"nodeAffinity": map[string]interface{}{"required": map[string]interface{}{"nodeSelectorTerms": []interface{}{map[string]interface{}{"matchExpressions": []interface{}{map[string]interface{}{"key": "kubernetes.io/hostname", "operator": "In", "values": []string{node}}}}}}}}})
		}
	}
}

// tokenCommand: create, list, delete, as far as pipeops uses them.
func tokenCommand(args []string) {
	tlsDir := dataDir + "/server/tls"
	ca, err := os.ReadFile(tlsDir + "/server-ca.crt")
	check("reading the CA", err)
	admin = &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool(ca), Certificates: []tls.Certificate{pair(tlsDir + "/client-admin")}}}}
	flag := func(name, otherwise string) string {
		for i, a := range args {
			if a == "--"+name && i+1 < len(args) {
				return args[i+1]
			}
		}
		return otherwise
	}
	switch {
	case len(args) > 0 && args[0] == "create":
		ttl, err := time.ParseDuration(flag("ttl", "24h"))
		check("parsing --ttl", err)
		id, secret := random(3), random(8)
		data := map[string]string{"token-id": id, "token-secret": secret, "description": flag("description", ""), "usage-bootstrap-authentication": "true", "usage-bootstrap-signing": "true",
			"auth-extra-groups": "system:bootstrappers:k3s:default-node-token", "expiration": time.Now().Add(ttl).UTC().Format(time.RFC3339)}
		made := object("POST", "/api/v1/namespaces/kube-system/secrets", map[string]interface{}{"apiVersion": "v1", "kind": "Secret", "type": "bootstrap.kubernetes.io/token", "metadata": map[string]string{"name": "bootstrap-token-" + id}, "stringData": data})
		if made == nil {
			fatal("cannot create the token")
		}
		fmt.Printf("K10%s::%s.%s\n", sum(ca), id, secret)
	case len(args) > 1 && args[0] == "delete":
		object("DELETE", "/api/v1/namespaces/kube-system/secrets/bootstrap-token-"+args[1], nil)
	default:
		out, err := kubectl("-n", "kube-system", "get", "secrets", "--field-selector", "type=bootstrap.kubernetes.io/token")
		check(out, err)
		fmt.Print(out)
	}
}
