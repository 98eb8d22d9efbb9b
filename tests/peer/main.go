// Both halves of FRP's protocol version 1 in the language and on the multiplexer of the original (hashicorp/yamux, golang/snappy,
// Go's TLS), with the habits of its generations, for tests that have no genuine frp:
//
//	peer frps -habits 2020|0.5x|new ...   prints the address it listens on
//	peer frpc -habits 2020|0.5x|new -server HOST:PORT -local HOST:PORT ...
package main

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/md5"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/golang/snappy"
	"github.com/hashicorp/yamux"
)

type Login struct {
	Version      string            `json:"version"`
	Hostname     string            `json:"hostname"`
	Os           string            `json:"os"`
	Arch         string            `json:"arch"`
	User         string            `json:"user"`
	PrivilegeKey string            `json:"privilege_key"`
	Timestamp    int64             `json:"timestamp"`
	RunID        string            `json:"run_id"`
	Metas        map[string]string `json:"metas"`
	PoolCount    int               `json:"pool_count"`
}

type LoginResp struct {
	Version       string `json:"version"`
	RunID         string `json:"run_id"`
	ServerUDPPort int    `json:"server_udp_port"`
	Error         string `json:"error"`
}

type NewProxy struct {
	ProxyName      string            `json:"proxy_name"`
	ProxyType      string            `json:"proxy_type"`
	UseEncryption  bool              `json:"use_encryption"`
	UseCompression bool              `json:"use_compression"`
	Group          string            `json:"group"`
	GroupKey       string            `json:"group_key"`
	Metas          map[string]string `json:"metas"`
	RemotePort     int               `json:"remote_port"`
	CustomDomains  []string          `json:"custom_domains"`
	Subdomain      string            `json:"subdomain"`
	Locations      []string          `json:"locations"`
	Headers        map[string]string `json:"headers"`
	Sk             string            `json:"sk"`
	AllowUsers     []string          `json:"allow_users,omitempty"`
}

type NewProxyResp struct {
	ProxyName  string `json:"proxy_name"`
	RemoteAddr string `json:"remote_addr"`
	Error      string `json:"error"`
}

type CloseProxy struct {
	ProxyName string `json:"proxy_name"`
}

type NewWorkConn struct {
	RunID        string `json:"run_id"`
	PrivilegeKey string `json:"privilege_key,omitempty"`
	Timestamp    int64  `json:"timestamp,omitempty"`
}

type ReqWorkConn struct{}

type StartWorkConn struct {
	ProxyName string `json:"proxy_name"`
	SrcAddr   string `json:"src_addr"`
	DstAddr   string `json:"dst_addr"`
	SrcPort   uint16 `json:"src_port"`
	DstPort   uint16 `json:"dst_port"`
	Error     string `json:"error"`
}

type NewVisitorConn struct {
	RunID          string `json:"run_id,omitempty"`
	ProxyName      string `json:"proxy_name"`
	SignKey        string `json:"sign_key"`
	Timestamp      int64  `json:"timestamp"`
	UseEncryption  bool   `json:"use_encryption"`
	UseCompression bool   `json:"use_compression"`
}

type NewVisitorConnResp struct {
	ProxyName string `json:"proxy_name"`
	Error     string `json:"error"`
}

type Ping struct {
	PrivilegeKey string `json:"privilege_key,omitempty"`
	Timestamp    int64  `json:"timestamp,omitempty"`
}

type Pong struct {
	Error string `json:"error,omitempty"`
}

var kinds = map[byte]func() any{
	'o': func() any { return &Login{} }, '1': func() any { return &LoginResp{} },
	'p': func() any { return &NewProxy{} }, '2': func() any { return &NewProxyResp{} }, 'c': func() any { return &CloseProxy{} },
	'w': func() any { return &NewWorkConn{} }, 'r': func() any { return &ReqWorkConn{} }, 's': func() any { return &StartWorkConn{} },
	'v': func() any { return &NewVisitorConn{} }, '3': func() any { return &NewVisitorConnResp{} },
	'h': func() any { return &Ping{} }, '4': func() any { return &Pong{} },
}

func kind(message any) byte {
	for k, fresh := range kinds {
		if fmt.Sprintf("%T", fresh()) == fmt.Sprintf("%T", message) {
			return k
		}
	}
	panic(fmt.Sprintf("%T", message))
}

func write(to io.Writer, message any) error {
	body, _ := json.Marshal(message)
	head := binary.BigEndian.AppendUint64([]byte{kind(message)}, uint64(len(body)))
	_, err := to.Write(append(head, body...))
	return err
}

func read(from io.Reader) (any, error) {
	var head [9]byte
	if _, err := io.ReadFull(from, head[:]); err != nil {
		return nil, err
	}
	fresh, length := kinds[head[0]], int64(binary.BigEndian.Uint64(head[1:]))
	if fresh == nil || length < 0 || length > 10240 {
		return nil, fmt.Errorf("no message: %q", head)
	}
	body := make([]byte, length)
	if _, err := io.ReadFull(from, body); err != nil {
		return nil, err
	}
	message := fresh()
	return message, json.Unmarshal(body, message)
}

func digest(secret string, timestamp int64) string {
	sum := md5.Sum([]byte(secret + strconv.FormatInt(timestamp, 10)))
	return hex.EncodeToString(sum[:])
}

// cfb is the cipher of the control channel and of work connections: an IV before the first byte of each direction.
type cfb struct {
	net.Conn
	key     []byte
	in, out cipher.Stream
	writing sync.Mutex
}

func encrypted(conn net.Conn, secret string) net.Conn {
	key, err := pbkdf2.Key(sha1.New, secret, []byte("frp"), 64, aes.BlockSize)
	if err != nil {
		panic(err)
	}
	return &cfb{Conn: conn, key: key}
}

func (c *cfb) Read(p []byte) (int, error) {
	if c.in == nil {
		iv := make([]byte, aes.BlockSize)
		if _, err := io.ReadFull(c.Conn, iv); err != nil {
			return 0, err
		}
		block, _ := aes.NewCipher(c.key)
		c.in = cipher.NewCFBDecrypter(block, iv)
	}
	n, err := c.Conn.Read(p)
	c.in.XORKeyStream(p[:n], p[:n])
	return n, err
}

func (c *cfb) Write(p []byte) (int, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	if c.out == nil {
		iv := make([]byte, aes.BlockSize)
		_, _ = rand.Read(iv)
		block, _ := aes.NewCipher(c.key)
		c.out = cipher.NewCFBEncrypter(block, iv)
		if _, err := c.Conn.Write(iv); err != nil {
			return 0, err
		}
	}
	coded := make([]byte, len(p))
	c.out.XORKeyStream(coded, p)
	return c.Conn.Write(coded)
}

type compressed struct {
	net.Conn
	r *snappy.Reader
	w *snappy.Writer
}

func (c compressed) Read(p []byte) (int, error)  { return c.r.Read(p) }
func (c compressed) Write(p []byte) (int, error) { return c.w.Write(p) }

func layered(conn net.Conn, secret string, encryption, compression bool) net.Conn {
	if encryption {
		conn = encrypted(conn, secret)
	}
	if compression {
		//nolint:staticcheck // the unbuffered writer is what frp uses
		conn = compressed{conn, snappy.NewReader(conn), snappy.NewWriter(conn)}
	}
	return conn
}

// join copies until either end is done, and closes both: frp does not half-close.
func join(a, b net.Conn) {
	var both sync.WaitGroup
	pipe := func(to, from net.Conn) {
		defer both.Done()
		defer to.Close()
		defer from.Close()
		_, _ = io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, 16*1024))
	}
	both.Add(2)
	go pipe(a, b)
	go pipe(b, a)
	both.Wait()
}

var (
	habits = flag.String("habits", "new", "2020, 0.5x or new")
	token  = flag.String("token", "", "")
	mux    = flag.Bool("mux", true, "")
	secure = flag.Bool("tls", true, "frpc: use TLS")
	listen = flag.String("listen", "127.0.0.1:0", "frps: where")
	web    = flag.String("http", "", "frps: where its http proxy is reached")
	server = flag.String("server", "", "frpc: of whom")
	local  = flag.String("local", "", "frpc: what is behind its proxies")
	remote = flag.Int("remote", 0, "frpc: port of its tcp proxy")
	visit  = flag.String("visit", "", "frpc: where its visitor listens")
)

func muxConfig() *yamux.Config {
	config := yamux.DefaultConfig()
	config.LogOutput = os.Stderr
	if *habits != "2020" {
		config.MaxStreamWindowSize = 6 * 1024 * 1024
	}
	return config
}

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "peer frps|frpc")
		os.Exit(2)
	}
	_ = flag.CommandLine.Parse(os.Args[2:])
	run := map[string]func() error{"frps": frps, "frpc": frpc}[os.Args[1]]
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}

// ---- server

type session struct {
	runID string
	out   net.Conn
	work  chan net.Conn
}

var (
	lock     sync.Mutex
	sessions = map[string]*session{}
	proxies  = map[string]struct {
		session *session
		asked   *NewProxy
	}{}
)

func certificate() tls.Certificate {
	bits := 2048
	if *habits != "new" {
		bits = 1024
	}
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		panic(err)
	}
	template := x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func frps() error {
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	config := &tls.Config{Certificates: []tls.Certificate{certificate()}}
	if *web != "" {
		vhost, err := net.Listen("tcp", *web)
		if err != nil {
			return err
		}
		go accept(vhost, func(user net.Conn) { serve(user, func(p *NewProxy) bool { return p.ProxyType == "http" }) })
	}
	fmt.Println(listener.Addr())
	accept(listener, func(conn net.Conn) {
		if conn, err := opened(conn, config); err == nil {
			connection(conn)
		}
	})
	return nil
}

func accept(listener net.Listener, take func(net.Conn)) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go take(conn)
	}
}

// prefixed gives back what was read to look at it.
type prefixed struct {
	net.Conn
	from io.Reader
}

func (p prefixed) Read(b []byte) (int, error) { return p.from.Read(b) }

// opened judges the first bytes: ten must come before anything else happens.
func opened(conn net.Conn, config *tls.Config) (net.Conn, error) {
	_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	first := make([]byte, 10)
	if _, err := io.ReadFull(conn, first); err != nil {
		conn.Close()
		return nil, err
	}
	_ = conn.SetReadDeadline(time.Time{})
	rest := prefixed{conn, io.MultiReader(bytes.NewReader(first), conn)}
	switch {
	case first[0] == 0x17:
		_, _ = rest.Read(first[:1])
		return tls.Server(rest, config), nil
	case first[0] == 0x16 && *habits != "2020":
		return tls.Server(rest, config), nil
	}
	return rest, nil
}

func connection(conn net.Conn) {
	if !*mux {
		hello(conn)
		return
	}
	session, err := yamux.Server(conn, muxConfig())
	if err != nil {
		return
	}
	for {
		stream, err := session.AcceptStream()
		if err != nil {
			session.Close()
			return
		}
		go hello(stream)
	}
}

func hello(conn net.Conn) {
	_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	message, err := read(conn)
	if err != nil {
		fmt.Fprintln(os.Stderr, "peer: first message:", err)
		conn.Close()
		return
	}
	_ = conn.SetReadDeadline(time.Time{})
	switch m := message.(type) {
	case *Login:
		control(conn, m)
	case *NewWorkConn:
		lock.Lock()
		s := sessions[m.RunID]
		lock.Unlock()
		if s == nil {
			_ = write(conn, &StartWorkConn{Error: "no client control found for run id"})
			conn.Close()
			return
		}
		select {
		case s.work <- conn:
		default:
			_ = write(conn, &StartWorkConn{Error: "work connection pool is full, discarding"})
			conn.Close()
		}
	case *NewVisitorConn:
		lock.Lock()
		p, ok := proxies[m.ProxyName]
		lock.Unlock()
		resp := &NewVisitorConnResp{ProxyName: m.ProxyName}
		if !ok || p.asked.ProxyType != "stcp" {
			resp.Error = fmt.Sprintf("custom listener for [%s] doesn't exist", m.ProxyName)
		} else if digest(p.asked.Sk, m.Timestamp) != m.SignKey {
			resp.Error = fmt.Sprintf("visitor connection of [%s] auth failed", m.ProxyName)
		}
		_ = write(conn, resp)
		if resp.Error != "" {
			conn.Close()
			return
		}
		conn = layered(conn, p.asked.Sk, m.UseEncryption, m.UseCompression)
		serve(conn, func(asked *NewProxy) bool { return asked.ProxyName == m.ProxyName })
	default:
		conn.Close()
	}
}

// tooOld is the check that servers had from 0.18 to 0.5x, with its own way to read a version.
func tooOld(version string) bool {
	part := func(n int) int64 {
		parts := strings.Split(version, ".")
		if len(parts) < 3 {
			return 0
		}
		number, _ := strconv.ParseInt(parts[n], 10, 64)
		return number
	}
	return part(0) < 1 && part(1) < 18
}

func control(conn net.Conn, login *Login) {
	refuse := ""
	if *habits != "new" && tooOld(login.Version) {
		refuse = "Please upgrade your frpc version to at least 0.18.0"
	} else if digest(*token, login.Timestamp) != login.PrivilegeKey {
		refuse = "token in login doesn't match token from configuration"
	}
	if refuse != "" {
		_ = write(conn, &LoginResp{Version: "0.0.0", Error: refuse})
		conn.Close()
		return
	}
	if login.RunID == "" {
		id := make([]byte, 8)
		_, _ = rand.Read(id)
		login.RunID = hex.EncodeToString(id)
	}
	pool := min(login.PoolCount, 5)
	s := &session{runID: login.RunID, work: make(chan net.Conn, pool+10)}
	lock.Lock()
	former := sessions[s.runID]
	sessions[s.runID] = s
	lock.Unlock()
	if former != nil {
		former.out.Close()
	}
	_ = write(conn, &LoginResp{Version: "0.0.0", RunID: s.runID})
	s.out = encrypted(conn, *token)
	for range pool {
		_ = write(s.out, &ReqWorkConn{})
	}
	var listeners []net.Listener
	for {
		message, err := read(s.out)
		if err != nil {
			fmt.Fprintln(os.Stderr, "peer: control:", err)
			break
		}
		switch m := message.(type) {
		case *Ping:
			_ = write(s.out, &Pong{})
		case *NewProxy:
			resp := &NewProxyResp{ProxyName: m.ProxyName}
			lock.Lock()
			if p, taken := proxies[m.ProxyName]; taken && p.session.runID != s.runID {
				resp.Error = fmt.Sprintf("proxy [%s] already exists", m.ProxyName)
			} else if m.ProxyType == "tcp" {
				listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", m.RemotePort))
				if err != nil {
					resp.Error = "port unavailable"
				} else {
					resp.RemoteAddr = fmt.Sprintf(":%d", listener.Addr().(*net.TCPAddr).Port)
					listeners = append(listeners, listener)
					name := m.ProxyName
					go accept(listener, func(user net.Conn) { serve(user, func(p *NewProxy) bool { return p.ProxyName == name }) })
				}
			}
			if resp.Error == "" {
				p := proxies[m.ProxyName]
				p.session, p.asked = s, m
				proxies[m.ProxyName] = p
			}
			lock.Unlock()
			_ = write(s.out, resp)
		}
	}
	lock.Lock()
	for name, p := range proxies {
		if p.session == s {
			delete(proxies, name)
		}
	}
	if sessions[s.runID] == s {
		delete(sessions, s.runID)
	}
	lock.Unlock()
	for _, listener := range listeners {
		listener.Close()
	}
	conn.Close()
}

// serve brings a user to the proxy that fits: from the pool, else with a connection that is asked for.
func serve(user net.Conn, fits func(*NewProxy) bool) {
	defer user.Close()
	lock.Lock()
	var s *session
	var asked *NewProxy
	for _, p := range proxies {
		if fits(p.asked) {
			s, asked = p.session, p.asked
		}
	}
	lock.Unlock()
	if s == nil {
		return
	}
	start := &StartWorkConn{ProxyName: asked.ProxyName}
	if from, ok := user.RemoteAddr().(*net.TCPAddr); ok && asked.ProxyType != "http" {
		start.SrcAddr, start.SrcPort, start.DstAddr, start.DstPort = from.IP.String(), uint16(from.Port), "127.0.0.1", 1
	}
	for {
		var work net.Conn
		select {
		case work = <-s.work:
		default:
			_ = write(s.out, &ReqWorkConn{})
			select {
			case work = <-s.work:
			case <-time.After(10 * time.Second):
				fmt.Fprintln(os.Stderr, "peer: timeout trying to get work connection")
				return
			}
		}
		_ = write(s.out, &ReqWorkConn{})
		if write(work, start) == nil {
			join(user, layered(work, *token, asked.UseEncryption, asked.UseCompression))
			return
		}
	}
}

// ---- client

func frpc() error {
	var session *yamux.Session
	dial := func() (net.Conn, error) {
		if session != nil {
			return session.Open()
		}
		conn, err := net.DialTimeout("tcp", *server, 10*time.Second)
		if err != nil || !*secure {
			return conn, err
		}
		if *habits == "2020" {
			_, _ = conn.Write([]byte{0x17})
		}
		host, _, _ := net.SplitHostPort(*server)
		return tls.Client(conn, &tls.Config{InsecureSkipVerify: true, ServerName: host}), nil
	}
	first, err := dial()
	if err != nil {
		return err
	}
	conn := first
	if *mux {
		if session, err = yamux.Client(first, muxConfig()); err != nil {
			return err
		}
		if conn, err = dial(); err != nil {
			return err
		}
	}
	now := time.Now().Unix()
	version := map[string]string{"2020": "0.34.3", "0.5x": "0.52.3", "new": "0.70.1"}[*habits]
	login := &Login{Version: version, Os: "linux", Arch: "amd64", PrivilegeKey: digest(*token, now), Timestamp: now, PoolCount: 1}
	if err := write(conn, login); err != nil {
		return err
	}
	answer, err := read(conn)
	if err != nil {
		return err
	}
	resp, ok := answer.(*LoginResp)
	if !ok || resp.Error != "" {
		return fmt.Errorf("login: %+v", answer)
	}
	out := encrypted(conn, *token)
	asked := map[string]*NewProxy{
		"t": {ProxyName: "t", ProxyType: "tcp", RemotePort: *remote, UseEncryption: true, UseCompression: true},
		"s": {ProxyName: "s", ProxyType: "stcp", Sk: "sk"},
	}
	for _, proxy := range asked {
		if err := write(out, proxy); err != nil {
			return err
		}
	}
	// since 0.58 a client with the multiplexer pings no more by itself
	if !*mux || *habits != "new" {
		go func() {
			for write(out, &Ping{}) == nil {
				time.Sleep(200 * time.Millisecond)
			}
		}()
	}
	if *visit != "" {
		listener, err := net.Listen("tcp", *visit)
		if err != nil {
			return err
		}
		go accept(listener, func(user net.Conn) {
			defer user.Close()
			conn, err := dial()
			if err != nil {
				return
			}
			now := time.Now().Unix()
			hello := &NewVisitorConn{ProxyName: "s", SignKey: digest("sk", now), Timestamp: now, UseEncryption: true, UseCompression: true}
			if *habits == "new" {
				hello.RunID = resp.RunID
			}
			_ = write(conn, hello)
			answer, err := read(conn)
			if r, ok := answer.(*NewVisitorConnResp); err != nil || !ok || r.Error != "" {
				fmt.Fprintln(os.Stderr, "peer: visitor:", answer, err)
				return
			}
			join(user, layered(conn, "sk", true, true))
		})
	}
	for {
		message, err := read(out)
		if err != nil {
			return fmt.Errorf("control: %w", err)
		}
		switch m := message.(type) {
		case *NewProxyResp:
			if m.Error != "" {
				return errors.New(m.Error)
			}
		case *Pong:
			if m.Error != "" {
				return errors.New("pong: " + m.Error)
			}
		case *ReqWorkConn:
			go func() {
				conn, err := dial()
				if err != nil {
					return
				}
				_ = write(conn, &NewWorkConn{RunID: resp.RunID})
				message, err := read(conn)
				start, ok := message.(*StartWorkConn)
				if err != nil || !ok || start.Error != "" {
					fmt.Fprintln(os.Stderr, "peer: work connection:", message, err)
					conn.Close()
					return
				}
				behind, err := net.Dial("tcp", *local)
				if err != nil {
					conn.Close()
					return
				}
				proxy := asked[start.ProxyName]
				join(behind, layered(conn, *token, proxy.UseEncryption, proxy.UseCompression))
			}()
		}
	}
}
