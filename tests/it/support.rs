//! A sandbox: a directory that stands for the machine, programs that record, a Kubernetes API that
//! remembers.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{RawQuery, State};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

pub(crate) const VERSION: &str = "v1.36.2+k3s1";

/// Programs of the machine, played by shell: they keep state under the root and log how they were
/// called.
const PROGRAMS: &[(&str, &str)] = &[
    (
        "systemctl",
        r#"state=$PIPEOPS_ROOT/run/fake-systemd; mkdir -p "$state"
broken() { [ -e "$PIPEOPS_ROOT/../broken-$1" ] || { [ $1 = k3s.service ] && grep -qs planted-broken "$PIPEOPS_ROOT/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml"; }; }
start() { # what a start of each unit would bring
  case $1 in
    k3s.service|k3s-agent.service)
      echo "x$(cat "$state/$1.starts" 2>/dev/null)" > "$state/$1.starts"
      d=$PIPEOPS_ROOT/var/lib/rancher/k3s; mkdir -p "$d/server/db" "$d/agent" "$PIPEOPS_ROOT/etc/rancher/k3s" "$PIPEOPS_ROOT/var/lib/kubelet/pods"
      printf 'apiVersion: v1\nkind: Config\nclusters:\n- name: default\n  cluster:\n    server: %s\ncontexts:\n- name: default\n  context: {cluster: default, user: default}\ncurrent-context: default\nusers:\n- name: default\n  user: {}\n' "$(cat "$PIPEOPS_ROOT/../api")" > "$d/kubeconfig"
      # as k3s does: it writes the token at each start, and does not start where the file is empty
      if [ $1 = k3s.service ] && [ -e "$d/server/token" ] && [ ! -s "$d/server/token" ]; then return; fi
      if [ $1 = k3s.service ]; then cp "$d/kubeconfig" "$PIPEOPS_ROOT/etc/rancher/k3s/k3s.yaml"; chmod 600 "$PIPEOPS_ROOT/etc/rancher/k3s/k3s.yaml"; echo "K10aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa::server:pw" > "$d/server/token"
      else cp "$d/kubeconfig" "$d/agent/kubelet.kubeconfig"; fi ;;
    pipeops-agent-credential.service) mkdir -p "$PIPEOPS_ROOT/run/pipeops-credential"; echo '{}' > "$PIPEOPS_ROOT/run/pipeops-credential/kubeconfig"; return ;;
  esac
  broken $1 || echo active > "$state/$1.active"
}
case $1 in
  --version) echo "systemd 255 (255.4)" ;;
  show) unit=$4; f=$PIPEOPS_ROOT/etc/systemd/system/$unit
    if [ -e "$f" ]; then echo LoadState=loaded; else echo LoadState=not-found; fi
    if [ -e "$state/$unit.enabled" ]; then echo UnitFileState=enabled; else echo UnitFileState=disabled; fi
    if broken $unit; then
      if [ -e "$PIPEOPS_ROOT/../dies-while-it-writes" ]; then : > "$PIPEOPS_ROOT/var/lib/rancher/k3s/server/token"; fi
      echo ActiveState=activating; echo NRestarts=3
    elif [ -e "$state/$unit.active" ]; then echo ActiveState=active; else echo ActiveState=inactive; fi
    case $unit in *credential.service) echo Type=oneshot; echo Result=success ;; esac ;;
  enable) shift; [ "$1" = --quiet ] && shift; touch "$state/$1.enabled" ;;
  disable) shift; [ "$1" = --quiet ] && shift; rm -f "$state/$1.enabled" ;;
  start|restart) start "$3" ;;
  stop) rm -f "$state/$2.active" ;;
esac"#,
    ),
    ("journalctl", r#"cat "$PIPEOPS_ROOT/../journal.log" 2>/dev/null"#),
    (
        "ip",
        r#"case "$*" in
  *address*) cat "$PIPEOPS_ROOT/../ip-address.json" ;;
  *"-4 route"*) cat "$PIPEOPS_ROOT/../ip-route.json" ;;
  *) echo '[]' ;;
esac"#,
    ),
    ("iptables", r#"echo "iptables v1.8.9 (nf_tables)""#),
    (
        "nft",
        r#"case $1 in list) [ -e "$PIPEOPS_ROOT/run/fake-nft" ] && echo "table inet pipeops";; -f) touch "$PIPEOPS_ROOT/run/fake-nft";; delete) rm "$PIPEOPS_ROOT/run/fake-nft";; esac"#,
    ),
    (
        "useradd",
        r#"for n; do :; done
grep -q "^$n:" "$PIPEOPS_ROOT/etc/group" && case "$*" in *--gid*) ;; *) echo "useradd: group $n exists - if you want to add this user to that group, use -g." >&2; exit 9 ;; esac
echo "$n:x:997:997::/var/lib/$n:/usr/sbin/nologin" >> "$PIPEOPS_ROOT/etc/passwd"
grep -q "^$n:" "$PIPEOPS_ROOT/etc/group" || echo "$n:x:997:" >> "$PIPEOPS_ROOT/etc/group""#,
    ),
    (
        "userdel",
        r#"for f in passwd group; do grep -v "^$1:" "$PIPEOPS_ROOT/etc/$f" > "$PIPEOPS_ROOT/etc/$f.n"; mv "$PIPEOPS_ROOT/etc/$f.n" "$PIPEOPS_ROOT/etc/$f"; done"#,
    ),
    (
        "groupadd",
        r#"for n; do :; done; g=997; case "$*" in *--gid*) g=${*#*--gid }; g=${g%% *} ;; esac; echo "$n:x:$g:" >> "$PIPEOPS_ROOT/etc/group""#,
    ),
    ("groupdel", r#"f=$PIPEOPS_ROOT/etc/group; grep -v "^$1:" "$f" > "$f.n"; mv "$f.n" "$f""#),
    ("modprobe", ":"),
    ("mount", ":"),
    ("umount", ":"),
];

/// k3s as an offline directory carries it.
const K3S: &str = r#"#!/bin/sh
case "$1 $2" in
  "--version ") echo "k3s version v1.36.2+k3s1 (0000000)" ;;
  "token create") echo "K10aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa::abcdef.0123456789abcdef" ;;
esac
"#;

#[derive(Clone, Default)]
pub(crate) struct Api {
    pub(crate) objects: Arc<Mutex<BTreeMap<String, Value>>>,
    pub(crate) writes: Arc<Mutex<Vec<String>>>,
    /// So many of the next requests find nobody behind the proxy in front, as while k3s begins or
    /// ends.
    pub(crate) faltering: Arc<Mutex<usize>>,
    /// Who else set which fields, as server-side apply keeps it.
    pub(crate) fields: Arc<Mutex<crate::fields::Fields>>,
}

pub(crate) struct Sandbox {
    dir: tempfile::TempDir,
    pub(crate) api: Api,
    /// What is run here.
    pub(crate) program: PathBuf,
}

/// What a run said and how it ended.
pub(crate) struct RunOutput {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl RunOutput {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out)
            .unwrap_or_else(|e| panic!("stdout is not JSON ({e}):\n{}\n{}", self.out, self.err))
    }

    #[track_caller]
    pub(crate) fn ended(self, code: i32) -> RunOutput {
        assert_eq!(self.code, code, "stdout:\n{}\nstderr:\n{}", self.out, self.err);
        self
    }
}

/// The program under test without its debug information: it is copied and hashed many times. Made
/// once for each build, and put in place by a rename, because several runs may want it at the same
/// time.
pub(crate) fn program() -> &'static Path {
    static SLIM: OnceLock<PathBuf> = OnceLock::new();
    SLIM.get_or_init(|| {
        let full = Path::new(env!("CARGO_BIN_EXE_pipeops"));
        let built = fs::metadata(full).unwrap();
        let slim = full.with_file_name("pipeops-slim");
        let current = |slim: &Path| {
            fs::metadata(slim)
                .is_ok_and(|made| made.modified().unwrap() >= built.modified().unwrap())
        };
        if current(&slim) {
            return slim;
        }
        let fresh = full.with_file_name(format!("pipeops-slim-{}", std::process::id()));
        let stripped = Command::new("strip").arg("-o").arg(&fresh).arg(full).status();
        if !stripped.is_ok_and(|s| s.success()) {
            return full.to_owned();
        }
        fs::rename(&fresh, &slim).unwrap();
        slim
    })
}

impl Sandbox {
    /// A healthy Debian 12 with two processors, 4 GiB and one network interface.
    pub(crate) fn new() -> Sandbox {
        let dir = tempfile::Builder::new().prefix("pipeops-it").tempdir().unwrap();
        let sandbox = Sandbox { dir, api: Api::default(), program: program().to_owned() };
        for (name, script) in PROGRAMS {
            let text = format!(
                "#!/bin/sh\nPATH=/usr/bin:/bin\necho \"{name} $*\" >> \"$PIPEOPS_ROOT/../calls.log\"\n{script}\n"
            );
            sandbox.beside(&format!("bin/{name}"), &text, 0o755);
        }
        for (path, text) in healthy_root() {
            sandbox.put(path, &text);
        }
        fs::create_dir_all(sandbox.root().join("usr/local/bin")).unwrap();
        fs::create_dir_all(sandbox.root().join("var/log")).unwrap();
        fs::create_dir_all(sandbox.root().join("var/lib")).unwrap();
        sandbox.beside("ip-address.json", r#"[{"ifname":"lo","addr_info":[{"family":"inet","local":"127.0.0.1","prefixlen":8}]},{"ifname":"eth0","addr_info":[{"family":"inet","local":"10.0.0.5","prefixlen":24}]}]"#, 0o644);
        sandbox.beside(
            "ip-route.json",
            r#"[{"dst":"default","gateway":"10.0.0.1","dev":"eth0","prefsrc":"10.0.0.5"},{"dst":"10.0.0.0/24","dev":"eth0","prefsrc":"10.0.0.5"}]"#,
            0o644,
        );
        sandbox.beside("api", &serve(sandbox.api.clone()), 0o644);
        sandbox.release();
        sandbox
    }

    /// The same machine with another pipeops.
    pub(crate) fn of(program: &Path) -> Sandbox {
        Sandbox { program: program.to_owned(), ..Sandbox::new() }
    }

    /// An offline directory laid out like a release.
    fn release(&self) {
        self.release_of(K3S);
    }

    /// An offline directory with this program as k3s.
    pub(crate) fn release_of(&self, k3s: &str) {
        self.beside("release/k3s", k3s, 0o755);
        self.beside("release/k3s-airgap-images-amd64.tar", "images", 0o644);
        let list = format!(
            "{}  k3s\n{}  k3s-airgap-images-amd64.tar\n",
            sha256(k3s.as_bytes()),
            sha256(b"images")
        );
        self.beside("release/sha256sum-amd64.txt", &list, 0o644);
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// A file of the machine.
    pub(crate) fn put(&self, path: &str, text: &str) {
        self.beside(&format!("root{path}"), text, 0o644);
    }

    /// A file beside the machine.
    pub(crate) fn beside(&self, path: &str, text: &str, mode: u32) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    pub(crate) fn read(&self, path: &str) -> String {
        fs::read_to_string(self.root().join(path.trim_start_matches('/'))).unwrap_or_default()
    }

    pub(crate) fn calls(&self) -> String {
        fs::read_to_string(self.dir.path().join("calls.log")).unwrap_or_default()
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg(args[0]).arg("--root").arg(self.root()).args(&args[1..]);
        command
            .env_clear()
            .env("PATH", self.dir.path().join("bin"))
            .stdin(std::process::Stdio::null());
        command
    }

    /// The program with `--root` at the end: for verbs below a command.
    pub(crate) fn subcommand(&self, args: &[&str]) -> RunOutput {
        let mut command = Command::new(&self.program);
        command
            .args(args)
            .arg("--root")
            .arg(self.root())
            .env_clear()
            .env("PATH", self.dir.path().join("bin"))
            .stdin(std::process::Stdio::null());
        run_output(command.output().unwrap())
    }

    pub(crate) fn run(&self, args: &[&str]) -> RunOutput {
        run_output(self.command(args).output().unwrap())
    }

    pub(crate) fn run_with(&self, args: &[&str], env: &[(&str, &str)]) -> RunOutput {
        run_output(self.command(args).envs(env.iter().copied()).output().unwrap())
    }

    /// `install-server` from the offline directory.
    pub(crate) fn install(&self, more: &[&str]) -> RunOutput {
        let release = self.path("release");
        let mut args = vec!["install-server", "--offline-dir", &release, "--yes"];
        if !more.contains(&"--timeout") {
            args.extend(["--timeout", "20s"]);
        }
        args.extend(more);
        self.run(&args)
    }

    /// Everything on the machine: path, mode, content; without what a run may leave.
    pub(crate) fn tree(&self) -> BTreeMap<String, String> {
        let mut tree = BTreeMap::new();
        walk(&self.root(), &self.root(), &mut tree);
        tree.retain(|path, _| {
            !["/var/log/pipeops", "/run/fake-", "/var/lib/pipeops/lock"]
                .iter()
                .any(|p| path.starts_with(p))
        });
        tree
    }
}

/// Calls `try_at` with 1, 2, 3… until it says that nothing was killed any more, four at a time; how
/// many points there were.
pub(crate) fn each_kill_point(try_at: impl Fn(u32) -> bool + Sync) -> u32 {
    let (next, end) = (AtomicU32::new(1), AtomicU32::new(200));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= end.load(Ordering::Relaxed) {
                        break;
                    }
                    if !try_at(at) {
                        end.fetch_min(at, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    end.into_inner() - 1
}

/// Two trees are the same, or the test fails with what differs.
#[track_caller]
pub(crate) fn assert_same_tree(
    now: &BTreeMap<String, String>,
    expected: &BTreeMap<String, String>,
    what: &str,
) {
    let gone =
        expected.iter().filter(|(k, v)| now.get(*k) != Some(v)).map(|(k, v)| format!("- {k} {v}"));
    let new =
        now.iter().filter(|(k, v)| expected.get(*k) != Some(v)).map(|(k, v)| format!("+ {k} {v}"));
    let difference: Vec<String> = gone.chain(new).collect();
    assert!(difference.is_empty(), "{what}: the trees differ:\n{}", difference.join("\n"));
}

pub(crate) fn run_output(output: Output) -> RunOutput {
    RunOutput {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn walk(root: &Path, dir: &Path, tree: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        let name = format!("/{}", path.strip_prefix(root).unwrap().display());
        let meta = fs::symlink_metadata(&path).unwrap();
        let mode = meta.permissions().mode() & 0o7777;
        if meta.is_dir() {
            tree.insert(name, format!("dir {mode:o}"));
            walk(root, &path, tree);
        } else if meta.is_symlink() {
            tree.insert(name, format!("link {}", fs::read_link(&path).unwrap().display()));
        } else {
            tree.insert(name, format!("file {mode:o} {}", sha256(&fs::read(&path).unwrap())));
        }
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    pipeops::base::encoding::hex(&sha2::Sha256::digest(bytes))
}

fn healthy_root() -> Vec<(&'static str, String)> {
    vec![
        ("/etc/os-release", "ID=debian\nVERSION_ID=\"12\"\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n".into()),
        ("/etc/machine-id", "0123456789abcdef0123456789abcdef\n".into()),
        ("/etc/passwd", "root:x:0:0:root:/root:/bin/bash\nops:x:1000:1000::/home/ops:/bin/sh\n".into()),
        ("/etc/group", "root:x:0:\n".into()),
        ("/etc/resolv.conf", "nameserver 10.0.0.1\n".into()),
        ("/etc/ssl/certs/ca-certificates.crt", String::new()),
        ("/etc/systemd/system/.keep", String::new()),
        ("/proc/1/comm", "systemd\n".into()),
        ("/proc/sys/kernel/osrelease", "6.1.0-40-amd64\n".into()),
        ("/proc/sys/kernel/arch", "x86_64\n".into()),
        ("/proc/sys/kernel/hostname", "vm1\n".into()),
        ("/proc/meminfo", "MemTotal:        4000000 kB\nSwapTotal:             0 kB\n".into()),
        ("/proc/cpuinfo", "processor\t: 0\n\nprocessor\t: 1\n".into()),
        ("/proc/self/mountinfo", "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n".into()),
        ("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory hugetlb pids\n".into()),
        (
            "/lib/modules/6.1.0-40-amd64/modules.dep",
            "kernel/net/br_netfilter.ko:\nkernel/fs/overlayfs/overlay.ko:\nkernel/net/nf_conntrack.ko:\nkernel/drivers/net/vxlan/vxlan.ko:\n".into(),
        ),
        ("/run/systemd/timesync/synchronized", String::new()),
    ]
}

/// Starts the API on a free port of its own thread; gives its URL.
fn serve(api: Api) -> String {
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            send.send(format!("http://{}", listener.local_addr().unwrap())).unwrap();
            axum::serve(listener, Router::new().fallback(answer).with_state(api)).await.unwrap();
        });
    });
    receive.recv().unwrap()
}

async fn answer(
    State(api): State<Api>,
    method: Method,
    uri: Uri,
    RawQuery(query): RawQuery,
    body: Bytes,
) -> Response {
    let path = uri.path().to_owned();
    let dry = query.unwrap_or_default().contains("dryRun=All");
    if path != "/readyz" {
        let mut left = api.faltering.lock().unwrap();
        if *left > 0 {
            *left -= 1;
            return (StatusCode::BAD_GATEWAY, "").into_response();
        }
    }
    let mut objects = api.objects.lock().unwrap();
    let found = |value: Value| axum::Json(value).into_response();
    let missing = || {
        (
            StatusCode::NOT_FOUND,
            axum::Json(json!({"kind": "Status", "status": "Failure",
                "message": format!("{path} not found"), "reason": "NotFound", "code": 404})),
        )
            .into_response()
    };
    match method {
        Method::GET if path == "/readyz" => "ok".into_response(),
        Method::GET if path == "/version" => found(json!({"gitVersion": VERSION})),
        Method::GET if objects.contains_key(&path) => found(objects[&path].clone()),
        Method::GET if path.starts_with("/api/v1/nodes/") => {
            found(node(path.rsplit('/').next().unwrap()))
        }
        Method::GET if path == "/api/v1/nodes" => {
            found(json!({"kind": "NodeList", "items": [node("vm1")]}))
        }
        Method::GET if path.contains("/kube-system/deployments/") => {
            found(json!({"metadata": {"generation": 1}, "spec": {"replicas": 1},
                "status": {"readyReplicas": 1, "observedGeneration": 1}}))
        }
        Method::GET if path.ends_with("/apiservices/v1beta1.metrics.k8s.io") => {
            found(json!({"status": {"conditions": [{"type": "Available", "status": "True"}]}}))
        }
        Method::GET if path.ends_with("/storageclasses/local-path") => {
            found(json!({"metadata": {"name": "local-path"}}))
        }
        Method::GET if path.ends_with("/secrets") => {
            let items: Vec<Value> = objects
                .iter()
                .filter(|(k, _)| k.contains("/secrets/bootstrap-token-"))
                .map(|(_, v)| v.clone())
                .collect();
            found(json!({"kind": "SecretList", "items": items}))
        }
        Method::PATCH => {
            let mut object: Value = serde_json::from_slice(&body).unwrap();
            let mut fields = api.fields.lock().unwrap();
            let known = objects.get(&path).cloned().unwrap_or_default();
            if let Some(refusal) = fields.conflict(&path, &known, &object) {
                return (StatusCode::CONFLICT, axum::Json(refusal)).into_response();
            }
            fields.keep(&path, &known, &mut object);
            object["metadata"]["uid"] = json!(path);
            if let Some(status) = objects.get(&path).and_then(|known| known.get("status")) {
                object["status"] = status.clone();
            }
            if !dry {
                api.writes.lock().unwrap().push(path.clone());
                let answer = object.clone();
                fields.rewrite(&path, &mut object);
                objects.insert(path, object);
                return found(answer);
            }
            found(object)
        }
        Method::DELETE => {
            api.writes.lock().unwrap().push(format!("DELETE {path}"));
            match objects.remove(&path) {
                Some(object) => found(object),
                None => missing(),
            }
        }
        _ => missing(),
    }
}

fn node(name: &str) -> Value {
    json!({"metadata": {"name": name, "labels": {"node-role.kubernetes.io/control-plane": "true"}},
        "status": {"conditions": [{"type": "Ready", "status": "True", "message": "ok"}],
            "addresses": [{"type": "InternalIP", "address": "10.0.0.5"}],
            "nodeInfo": {"kubeletVersion": VERSION}}})
}
