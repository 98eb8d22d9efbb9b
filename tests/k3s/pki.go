package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"time"
)

type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func serial() *big.Int {
	n, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	return n
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// ca loads an authority from dir, or makes it.
func ca(dir, name string) authority {
	crt, key := dir+"/"+name+".crt", dir+"/"+name+".key"
	if !exists(crt) {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		check("making a key", err)
		now := time.Now()
		t := &x509.Certificate{SerialNumber: serial(), Subject: pkix.Name{CommonName: fmt.Sprintf("k3s-%s@%d", name, now.Unix())},
			NotBefore: now.Add(-time.Minute), NotAfter: now.Add(87600 * time.Hour), IsCA: true, BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment}
		der, err := x509.CreateCertificate(rand.Reader, t, t, &k.PublicKey, k)
		check("making "+crt, err)
		kb, _ := x509.MarshalECPrivateKey(k)
		write(key, string(pemOf("EC PRIVATE KEY", kb)), 0600)
		write(crt, string(pemOf("CERTIFICATE", der)), 0644)
	}
	raw, err := os.ReadFile(crt)
	check("reading "+crt, err)
	block, _ := pem.Decode(raw)
	cert, err := x509.ParseCertificate(block.Bytes)
	check("parsing "+crt, err)
	rawKey, err := os.ReadFile(key)
	check("reading "+key, err)
	kb, _ := pem.Decode(rawKey)
	k, err := x509.ParseECPrivateKey(kb.Bytes)
	check("parsing "+key, err)
	return authority{cert, k, raw}
}

// issue gives certificate and key in PEM.
func (a authority) issue(cn string, groups []string, sans []string, server bool) (string, string) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check("making a key", err)
	usage := x509.ExtKeyUsageClientAuth
	if server {
		usage = x509.ExtKeyUsageServerAuth
	}
	t := &x509.Certificate{SerialNumber: serial(), Subject: pkix.Name{CommonName: cn, Organization: groups}, NotBefore: time.Now().Add(-time.Minute),
		NotAfter: time.Now().Add(365 * 24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment, ExtKeyUsage: []x509.ExtKeyUsage{usage}}
	for _, s := range sans {
		if ip := net.ParseIP(s); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, s)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, &k.PublicKey, a.key)
	check("issuing "+cn, err)
	kb, _ := x509.MarshalECPrivateKey(k)
	return string(pemOf("CERTIFICATE", der)), string(pemOf("EC PRIVATE KEY", kb))
}

// files issues into PATH.crt and PATH.key.
func (a authority) files(path, cn string, groups, sans []string, server bool) {
	crt, key := a.issue(cn, groups, sans, server)
	write(path+".crt", crt, 0644)
	write(path+".key", key, 0600)
}

func pair(path string) tls.Certificate {
	c, err := tls.LoadX509KeyPair(path+".crt", path+".key")
	check("loading "+path, err)
	return c
}

func pool(pems ...[]byte) *x509.CertPool {
	p := x509.NewCertPool()
	for _, b := range pems {
		p.AppendCertsFromPEM(b)
	}
	return p
}

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

func random(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return hex.EncodeToString(b)
}

func kubeconfig(path, server, caFile, crt, key string) {
	write(path, fmt.Sprintf(`apiVersion: v1
kind: Config
clusters:
- name: local
  cluster:
    server: %s
    certificate-authority: %s
contexts:
- name: Default
  context:
    cluster: local
    user: user
current-context: Default
users:
- name: user
  user:
    client-certificate: %s
    client-key: %s
`, server, caFile, crt, key), 0600)
}
