//! Faults around a real agent, one after the other, each with its times; the agent's four accounts
//! of itself sampled all the while. Runs as root in the VM of the agent: it drops packets with
//! nftables and answers names in place of a DNS server.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pipeops::frp::server::Server;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::fake_control_plane::{FakeControlPlane, Scripted};

/// What stands in front of the FRP server does with connections.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Mode {
    Pass,
    /// Nobody listens, and what was open is cut.
    Gone,
    /// Accepts, and says nothing, not even TLS.
    MuteAtTls,
    /// Finishes TLS and says nothing more.
    MuteAtLogin,
    /// One byte a second each way; what was open stays.
    Slow,
}

pub(crate) async fn front(
    address: SocketAddr,
    back: SocketAddr,
    tls: Arc<rustls::ServerConfig>,
    mut mode: watch::Receiver<Mode>,
) {
    loop {
        let now = *mode.borrow_and_update();
        let flows = |m: Mode| matches!(m, Mode::Pass | Mode::Slow);
        if now == Mode::Gone {
            mode.changed().await.unwrap();
            continue;
        }
        let Ok(listener) = TcpListener::bind(address).await else {
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        };
        let mut open = JoinSet::new();
        loop {
            tokio::select! {
                changed = mode.changed() => {
                    changed.unwrap();
                    if !(flows(now) && flows(*mode.borrow())) {
                        break;
                    }
                }
                Ok((user, _)) = listener.accept() => {
                    let (tls, mode) = (tls.clone(), mode.clone());
                    open.spawn(async move {
                        match now {
                            Mode::MuteAtTls => std::future::pending::<()>().await,
                            Mode::MuteAtLogin => {
                                let held = tokio_rustls::TlsAcceptor::from(tls).accept(user).await;
                                std::future::pending::<()>().await;
                                drop(held);
                            }
                            _ => {
                                let Ok(server) = TcpStream::connect(back).await else { return };
                                let _ = server.set_nodelay(true);
                                let _ = user.set_nodelay(true);
                                let ((ur, uw), (sr, sw)) = (user.into_split(), server.into_split());
                                tokio::select! {
                                    () = pump(ur, sw, mode.clone()) => {}
                                    () = pump(sr, uw, mode) => {}
                                }
                            }
                        }
                    });
                }
            }
        }
    }
}

async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut mode: watch::Receiver<Mode>,
) {
    let mut buffer = vec![0; 32 * 1024];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        let mut rest = &buffer[..n];
        while !rest.is_empty() {
            let slow = *mode.borrow_and_update() == Mode::Slow;
            let (piece, left) = rest.split_at(if slow { 1 } else { rest.len() });
            if to.write_all(piece).await.is_err() {
                return;
            }
            rest = left;
            if slow {
                tokio::select! {
                    () = tokio::time::sleep(Duration::from_secs(1)) => {}
                    _ = mode.changed() => {}
                }
            }
        }
    }
}

/// Answers every question for an A record with one address.
async fn names(socket: UdpSocket, answer: Arc<Mutex<Ipv4Addr>>) {
    let mut packet = [0; 512];
    while let Ok((n, from)) = socket.recv_from(&mut packet).await {
        // RFC 1035 4.1: a header of 12 bytes, then the question up to its type and class
        let Some(end) = packet[12..n]
            .iter()
            .position(|b| *b == 0)
            .map(|at| 12 + at + 5)
            .filter(|end| *end <= n)
        else {
            continue;
        };
        let wanted = packet[end - 3] == 1;
        let mut reply = packet[..end].to_vec();
        (reply[2], reply[3]) = (0x84, 0x00);
        reply[4..12].copy_from_slice(&[0, 1, 0, u8::from(wanted), 0, 0, 0, 0]);
        if wanted {
            reply.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
            reply.extend_from_slice(&answer.lock().unwrap().octets());
        }
        let _ = socket.send_to(&reply, from).await;
    }
}

/// What the agent said at one moment, in four places. Only one that could be read counts.
pub(crate) struct Sample {
    at: Instant,
    ready: Option<bool>,
    metric: Option<bool>,
    info: Option<bool>,
    beat: Option<bool>,
    reason: String,
}

impl Sample {
    fn up(&self) -> Vec<&'static str> {
        [
            ("readyz", self.ready),
            ("metrics", self.metric),
            ("cluster-info", self.info),
            ("heartbeat", self.beat),
        ]
        .into_iter()
        .filter(|(_, up)| *up == Some(true))
        .map(|(name, _)| name)
        .collect()
    }
}

async fn ask(path: &str) -> Option<String> {
    let mut stream = UnixStream::connect("/run/pipeops/agent.sock").await.ok()?;
    stream
        .write_all(
            format!("GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n").as_bytes(),
        )
        .await
        .ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await.ok()?;
    Some(text)
}

async fn status() -> Value {
    let text = ask("/status").await.unwrap_or_default();
    text.split_once("\r\n\r\n")
        .and_then(|(_, body)| serde_json::from_str(body).ok())
        .unwrap_or_default()
}

async fn sample(control_plane: Arc<FakeControlPlane>, samples: Arc<Mutex<Vec<Sample>>>) {
    let (mut turn, mut beats) = (0, control_plane.calls("/heartbeat").len());
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        turn += 1;
        let ready = ask("/readyz").await.map(|t| t.starts_with("HTTP/1.1 200"));
        let metric = ask("/metrics").await.map(|t| t.contains("\npipeops_tunnel_connected 1\n"));
        let reason = status().await["tunnel_reason"].as_str().unwrap_or_default().to_owned();
        let info = if turn % 4 == 0 {
            let out = tokio::process::Command::new("pipeops")
                .args(["cluster-info", "-o", "json"])
                .output()
                .await
                .unwrap();
            let info: Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
            info["agent"]["tunnel"].as_str().map(|t| t == "up")
        } else {
            None
        };
        let all = control_plane.calls("/heartbeat");
        let beat =
            (all.len() > beats).then(|| all.last().is_some_and(|c| c.2["tunnel"]["state"] == "up"));
        beats = all.len();
        samples.lock().unwrap().push(Sample {
            at: Instant::now(),
            ready,
            metric,
            info,
            beat,
            reason,
        });
    }
}

pub(crate) struct Faults {
    pub(crate) control_plane: Arc<FakeControlPlane>,
    pub(crate) frps: Server,
    pub(crate) mode: watch::Sender<Mode>,
    pub(crate) port: u16,
    /// Where the FRP server itself listens.
    pub(crate) back: SocketAddr,
    /// Faults of the link whose name holds this.
    pub(crate) only: Mutex<String>,
    pub(crate) out: Mutex<(String, u32)>,
    pub(crate) samples: Arc<Mutex<Vec<Sample>>>,
}

fn sh(command: &str) -> String {
    let out = Command::new("sh").args(["-c", command]).output().unwrap();
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

impl Faults {
    fn say(&self, fine: bool, text: &str) {
        let mut out = self.out.lock().unwrap();
        let _ = writeln!(out.0, "{} {text}", if fine { "ok    " } else { "WRONG " });
        out.1 += u32::from(!fine);
    }

    fn agent(&self) -> String {
        self.control_plane.calls("/register").last().unwrap().2["agent"]["id"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    /// One request through the tunnel, and its status.
    async fn request(&self, method: &str, path: &str, body: &str) -> Option<String> {
        let token = self.control_plane.token(&self.agent(), "deployer", None);
        let go = async {
            let mut io = self
                .control_plane
                .tls(self.frps.dial("agent").await.ok()?, b"http/1.1")
                .await
                .ok()?;
            let head = format!(
                "{method} {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
            io.write_all(head.as_bytes()).await.ok()?;
            io.flush().await.ok()?;
            let mut answer = Vec::new();
            let _ = io.read_to_end(&mut answer).await;
            Some(String::from_utf8_lossy(&answer).into_owned())
        };
        tokio::time::timeout(Duration::from_secs(2), go).await.ok().flatten()
    }

    async fn through(&self) -> bool {
        self.request("GET", "/healthz", "").await.is_some_and(|a| a.starts_with("HTTP/1.1 200"))
    }

    async fn until(&self, longest: u64, mut met: impl AsyncFnMut() -> bool) -> Option<Duration> {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(longest) {
            if met().await {
                return Some(begun.elapsed());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        None
    }

    /// A fault of the link: begins, holds, ends; when it was noticed, when a request came through
    /// again, and whether anything lied.
    async fn link(
        &self,
        name: &str,
        hold: u64,
        budget: f64,
        begin: impl FnOnce(),
        end: impl FnOnce(),
    ) {
        if !name.contains(&self.only.lock().unwrap()[..]) {
            return;
        }
        if self.until(60, async || self.through().await).await.is_none() {
            return self.say(false, &format!("{name}: the tunnel was not up before"));
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        let from = Instant::now();
        begin();
        tokio::time::sleep(Duration::from_secs(hold)).await;
        let (noticed, reasons, lies) = {
            let samples = self.samples.lock().unwrap();
            let during: Vec<&Sample> = samples.iter().filter(|s| s.at > from).collect();
            let noticed = during
                .iter()
                .find(|s| s.metric == Some(false))
                .map(|s| (s.at - from).as_secs_f64());
            let mut reasons: Vec<String> =
                during.iter().map(|s| s.reason.clone()).filter(|r| !r.is_empty()).collect();
            reasons.dedup();
            // a second for the sampler's own way
            let lies: Vec<String> = during
                .iter()
                .filter(|s| s.at - from > Duration::from_secs(16) && !s.up().is_empty())
                .map(|s| format!("{:.0} s: {}", (s.at - from).as_secs_f64(), s.up().join(", ")))
                .collect();
            (noticed, reasons, lies)
        };
        end();
        let back = self.until(60, async || self.through().await).await.map(|d| d.as_secs_f64());
        let text = format!(
            "{name} for {hold} s: noticed after {}, back {} after its end (budget {budget:.0}){}{}",
            noticed.map_or("-".into(), |n| format!("{n:.1} s")),
            back.map_or("never".into(), |b| format!("{b:.2} s")),
            reasons.last().map_or(String::new(), |r| format!("; said: {r}")),
            if lies.is_empty() {
                String::new()
            } else {
                format!("; CALLED UP {} times, first at {}", lies.len(), lies[0])
            },
        );
        self.say(lies.is_empty() && back.is_some_and(|b| b <= budget), &text);
    }

    /// A fault of the control plane: which state it becomes, how soon, whether the tunnel stays,
    /// how soon it heals.
    async fn state(&self, name: &str, wanted: &str, begin: impl FnOnce(), end: impl FnOnce()) {
        let control = async |state: &str| status().await["control"] == state;
        let _ = self.until(60, async || control("online").await).await;
        begin();
        let named = self.until(60, async || control(wanted).await).await;
        let why = status().await["control_reason"].as_str().unwrap_or_default().to_owned();
        let through = self.through().await;
        end();
        let healed = self.until(120, async || control("online").await).await;
        let time =
            |d: Option<Duration>| d.map_or("never".into(), |d| format!("{:.1} s", d.as_secs_f64()));
        self.say(
            named.is_some() && through && healed.is_some(),
            &format!(
                "{name}: {wanted} after {} ({why}), requests {} meanwhile, online again {} after",
                time(named),
                if through { "pass" } else { "DO NOT PASS" },
                time(healed)
            ),
        );
    }

    async fn retry_after(&self, code: u16) {
        let _ = self.until(60, async || status().await["control"] == "online").await;
        let headers = vec![("retry-after", "6".to_owned())];
        let body = json!({"code": "busy", "message": "later"});
        self.control_plane.script.lock().unwrap().push(Scripted {
            path: "/heartbeat",
            status: code,
            body,
            headers,
            times: 1,
        });
        let _ = self
            .until(20, async || {
                self.control_plane.script.lock().unwrap().last().is_some_and(|s| s.times == 0)
            })
            .await;
        let calls = self.control_plane.calls("/heartbeat").len();
        let quiet = self
            .until(30, async || self.control_plane.calls("/heartbeat").len() > calls)
            .await
            .unwrap_or_default()
            .as_secs_f64();
        self.say(
            quiet >= 5.9,
            &format!("{code} with Retry-After 6: the next heartbeat after {quiet:.1} s"),
        );
    }

    pub(crate) async fn all(self: Arc<Self>, only: &str) -> String {
        only.clone_into(&mut self.only.lock().unwrap());
        let sampler = tokio::spawn(sample(self.control_plane.clone(), self.samples.clone()));
        let port = self.port;
        let drop = |rules: &str| {
            sh(&format!(
                "nft delete table inet faults 2>/dev/null; nft -f - <<EOF\ntable inet faults {{ chain c {{ type filter hook output priority 0;\n{rules}\n}}\n}}\nEOF"
            ));
        };

        let (out, back) = (format!("tcp dport {port} drop"), format!("tcp sport {port} drop"));
        self.link(
            "server killed",
            3,
            1.0,
            || set(&self.mode, Mode::Gone),
            || set(&self.mode, Mode::Pass),
        )
        .await;
        for (name, rules) in [
            ("no packets either way", format!("{out}\n{back}")),
            ("no packets to the server", out),
            ("no packets from the server", back),
        ] {
            for hold in [10, 120] {
                // what is not noticed yet goes on; what is has to come back
                self.link(name, hold, 5.0, || drop(&rules), heal).await;
            }
        }
        for (name, mode) in [
            ("server mute at TLS", Mode::MuteAtTls),
            ("server mute at login", Mode::MuteAtLogin),
            ("one byte a second", Mode::Slow),
        ] {
            self.link(name, 60, 35.0, || set(&self.mode, mode), || set(&self.mode, Mode::Pass))
                .await;
        }
        // a part of them by its name; `states` is all but the link
        if only.is_empty() || only == "states" {
            self.control_plane().await;
        }
        if only.is_empty() || only == "states" || only == "node" {
            self.kubernetes().await;
            self.disk().await;
        }
        sampler.abort();
        let out = self.out.lock().unwrap();
        format!("{}{} WRONG\n", out.0, out.1)
    }

    async fn control_plane(&self) {
        self.names().await;
        self.retry_after(429).await;
        self.retry_after(503).await;
        let control_plane = &self.control_plane;
        self.state(
            "clock an hour off",
            "skewed",
            || *control_plane.clock.lock().unwrap() = 3600,
            || *control_plane.clock.lock().unwrap() = 0,
        )
        .await;
        let conflict = Scripted {
            path: "/heartbeat",
            status: 409,
            body: json!({"code": "duplicate_identity", "message": "another machine"}),
            headers: vec![],
            times: 1,
        };
        self.state(
            "409",
            "conflict",
            || control_plane.script.lock().unwrap().push(conflict),
            || {},
        )
        .await;
        // the agent still holds the token that let it in: that is refused as well, until a person
        // sees to it
        let body = json!({"code": "token_unknown", "message": "revoked"});
        let refused =
            Scripted { path: "/register", status: 401, body, headers: vec![], times: usize::MAX };
        let revoke = || {
            control_plane.script.lock().unwrap().push(refused);
            control_plane.revoke();
        };
        let again = || {
            control_plane.script.lock().unwrap().clear();
            sh(&format!(
                "printf %s '{}' > /etc/pipeops/agent-token; systemctl restart pipeops-agent",
                crate::fake_control_plane::TOKEN
            ));
        };
        self.state(
            "token revoked (healed by another one and a restart)",
            "unauthorized",
            revoke,
            again,
        )
        .await;
    }

    /// The server moves, and its name with it.
    async fn names(&self) {
        let answer = Arc::new(Mutex::new(Ipv4Addr::new(127, 0, 0, 1)));
        let Ok(socket) = UdpSocket::bind("127.0.0.1:53").await else {
            return self.say(false, "DNS that changes: port 53 is taken");
        };
        let server = tokio::spawn(names(socket, answer.clone()));
        sh("cp /etc/resolv.conf /tmp/resolv.faults; echo nameserver 127.0.0.1 > /etc/resolv.conf");
        let tell = |server: &str| {
            let mut config = self.control_plane.config.lock().unwrap();
            config["tunnel"]["server"] = server.into();
            config["config_version"] = (config["config_version"].as_u64().unwrap() + 1).into();
        };
        tell("tunnel.test");
        tokio::time::sleep(Duration::from_secs(5)).await;
        let elsewhere = Ipv4Addr::new(127, 0, 0, 7);
        // the old address is gone for good; a relay at the new one
        let (moved, at) =
            (watch::Sender::new(Mode::Gone), SocketAddr::from((elsewhere, self.port)));
        let (tls, _) = crate::fake_control_plane::identity();
        let relay = tokio::spawn(front(at, self.back, tls, moved.subscribe()));
        let change = || {
            *answer.lock().unwrap() = elsewhere;
            moved.send_replace(Mode::Pass);
        };
        self.link(
            "DNS that changes, the old address dead",
            3,
            5.0,
            || set(&self.mode, Mode::Gone),
            change,
        )
        .await;
        // no name server at all, and a connection that has to be made anew
        server.abort();
        let _ = server.await;
        let answer_again = answer.clone();
        self.link(
            "no DNS",
            30,
            35.0,
            || set(&moved, Mode::Gone),
            || {
                moved.send_replace(Mode::Pass);
                tokio::spawn(async move {
                    names(UdpSocket::bind("127.0.0.1:53").await.unwrap(), answer_again).await
                });
            },
        )
        .await;
        tell("127.0.0.1");
        set(&self.mode, Mode::Pass);
        tokio::time::sleep(Duration::from_secs(5)).await;
        relay.abort();
        sh("cp /tmp/resolv.faults /etc/resolv.conf");
    }

    async fn kubernetes(&self) {
        let waiting = async || status().await["kubernetes"] == "waiting";
        let _ = self.until(60, async || self.through().await).await;
        sh("systemctl stop k3s");
        let named = self.until(40, async || waiting().await).await;
        let answer = self.request("GET", "/k8s/version", "").await.unwrap_or_default();
        // with a Retry-After kubectl would repeat in silence instead of saying why
        let told = answer.starts_with("HTTP/1.1 503")
            && !answer.to_ascii_lowercase().contains("retry-after:");
        sh("systemctl start k3s");
        let back = self
            .until(90, async || {
                self.request("GET", "/k8s/version", "")
                    .await
                    .is_some_and(|a| a.starts_with("HTTP/1.1 200"))
            })
            .await;
        let time =
            |d: Option<Duration>| d.map_or("never".into(), |d| format!("{:.1} s", d.as_secs_f64()));
        self.say(
            named.is_some() && told && back.is_some(),
            &format!("API server stopped: waiting after {}, 503 without Retry-After: {told}, back {} after its start", time(named), time(back)),
        );
    }

    /// The agent's state on a disk of its own that fills up.
    async fn disk(&self) {
        let state = "/var/lib/pipeops-agent";
        sh(&format!(
            "systemctl stop pipeops-agent; cp -a {state} /root/state; mount -t tmpfs -o size=1m,mode=0700 tmpfs {state}; cp -a /root/state/. {state}/; chown --reference=/root/state {state}; systemctl start pipeops-agent"
        ));
        let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"generateName": "fault-"}}).to_string();
        let create = async || {
            let answer = self
                .request("POST", "/k8s/api/v1/namespaces/beta/configmaps", &map)
                .await
                .unwrap_or_default();
            answer.split(' ').nth(1).unwrap_or("-").to_owned()
        };
        let before = self.until(60, async || create().await == "201").await.is_some();
        sh(&format!("dd if=/dev/zero of={state}/filler bs=1k 2>&1; sync"));
        // records that still fit in the last block
        let full = self.until(30, async || create().await == "507").await.is_some();
        let read = self
            .request("GET", "/k8s/version", "")
            .await
            .is_some_and(|a| a.starts_with("HTTP/1.1 200"));
        self.control_plane.script.lock().unwrap().push(Scripted {
            path: "/status",
            status: 503,
            body: json!({}),
            headers: vec![],
            times: 8,
        });
        tokio::time::sleep(Duration::from_secs(15)).await;
        let alive = status().await["control"] == "online";
        sh(&format!("rm {state}/filler"));
        let after = self.until(60, async || create().await == "201").await;
        let reports = self.control_plane.calls("/status").len();
        let flowing = self
            .until(60, async || self.control_plane.calls("/status").len() > reports + 1)
            .await
            .is_some();
        self.say(
            before && full && read && alive && after.is_some() && flowing,
            &format!(
                "disk full: writes pass before: {before}, 507 when full: {full}, reads pass: {read}, online with a queue that cannot be written: {alive}, \
                 writes pass {} after there is room, reports flow again: {flowing}",
                after.map_or("never".into(), |d| format!("{:.1} s", d.as_secs_f64()))
            ),
        );
        sh(&format!("systemctl stop pipeops-agent; umount {state}; systemctl start pipeops-agent"));
    }
}

fn set(mode: &watch::Sender<Mode>, to: Mode) {
    mode.send_replace(to);
}

fn heal() {
    sh("nft delete table inet faults");
}
