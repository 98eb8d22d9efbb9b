package main

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"time"
)

// nodeClient asks the API server with one of the node's certificates; what it gives says nil where there is no answer.
func nodeClient(server, certificate string) func(path string) map[string]any {
	conf := &tls.Config{RootCAs: pool([]byte(text(agentDir + "/server-ca.crt"))), Certificates: []tls.Certificate{pair(agentDir + "/" + certificate)}}
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{TLSClientConfig: conf}}
	return func(path string) map[string]any {
		r, err := client.Get(server + path)
		if err != nil {
			return nil
		}
		defer r.Body.Close()
		var out map[string]any
		if r.StatusCode != 200 || json.NewDecoder(r.Body).Decode(&out) != nil {
			return nil
		}
		return out
	}
}

type aNode struct{ name, ip, pods string }

func nodeOf(o map[string]any) (n aNode) {
	b, _ := json.Marshal(o)
	var v struct {
		Metadata struct{ Name string }
		Spec     struct{ PodCIDR string }
		Status   struct {
			Addresses []struct{ Type, Address string }
		}
	}
	json.Unmarshal(b, &v)
	n.name, n.pods = v.Metadata.Name, v.Spec.PodCIDR
	for _, a := range v.Status.Addresses {
		if a.Type == "InternalIP" && n.ip == "" {
			n.ip = a.Address
		}
	}
	return n
}

func nodesOf(list map[string]any) (nodes []aNode) {
	items, _ := list["items"].([]any)
	for _, i := range items {
		if n := nodeOf(i.(map[string]any)); n.ip != "" {
			nodes = append(nodes, n)
		}
	}
	return nodes
}

// flannel is the pod network: this node's range as its Node has it, and a VXLAN to those of the others, made as flannel makes it.
func flannel(get func(path string) map[string]any, node, ip, cni string) {
	var own aNode
	for own.pods == "" {
		own = nodeOf(get("/api/v1/nodes/" + node))
		time.Sleep(200 * time.Millisecond)
	}
	base := strings.TrimSuffix(own.pods, "/24")
	run("link", "add", "flannel.1", "address", macOf(ip), "mtu", "1450", "type", "vxlan", "id", "1", "dev", deviceOf(ip), "local", ip, "dstport", "8472", "nolearning")
	run("addr", "replace", base+"/32", "dev", "flannel.1")
	run("link", "set", "flannel.1", "up")
	write(cni+"/10-flannel.conflist", fmt.Sprintf(`{"cniVersion":"1.0.0","name":"cbr0","plugins":[{"type":"bridge","bridge":"cni0","mtu":1450,"isGateway":true,"ipMasq":true,"hairpinMode":true,"ipam":{"type":"host-local","dataDir":"/var/lib/cni/networks","ranges":[[{"subnet":%q}]],"routes":[{"dst":"0.0.0.0/0"}]}},{"type":"portmap","capabilities":{"portMappings":true}}]}`, own.pods), 0600)
	known := map[string]aNode{}
	for ; ; time.Sleep(2 * time.Second) {
		list := get("/api/v1/nodes")
		if list == nil {
			continue
		}
		gone := known
		known = map[string]aNode{}
		for _, n := range nodesOf(list) {
			if n.name == node || n.pods == "" {
				continue
			}
			known[n.name] = n
			if gone[n.name] != n {
				first := strings.TrimSuffix(n.pods, "/24")
				run("neigh", "replace", first, "lladdr", macOf(n.ip), "dev", "flannel.1", "nud", "permanent")
				exec.Command("bridge", "fdb", "replace", macOf(n.ip), "dev", "flannel.1", "dst", n.ip).Run()
				run("route", "replace", n.pods, "via", first, "dev", "flannel.1", "onlink")
			}
			delete(gone, n.name)
		}
		for _, n := range gone {
			run("route", "del", n.pods, "dev", "flannel.1")
		}
	}
}

// run is one call of ip; what is there already is fine.
func run(args ...string) {
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil && !strings.Contains(string(out), "File exists") {
		logf("error", "ip %s: %s", strings.Join(args, " "), strings.TrimSpace(string(out)))
	}
}

// macOf is the address of a node's end of the VXLAN, the same for all who know the node's address.
func macOf(ip string) string {
	a := net.ParseIP(ip).To4()
	return fmt.Sprintf("02:42:%02x:%02x:%02x:%02x", a[0], a[1], a[2], a[3])
}

func deviceOf(ip string) string {
	all, _ := net.Interfaces()
	for _, i := range all {
		addrs, _ := i.Addrs()
		for _, a := range addrs {
			if strings.HasPrefix(a.String(), ip+"/") {
				return i.Name
			}
		}
	}
	return "host0"
}
