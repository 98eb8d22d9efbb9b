//! What `deploy` costs more than `kubectl apply` and `kubectl rollout status` of the same objects,
//! both in turn: the one through control plane and tunnel, the other straight to the API server.
//!
//! DIR holds what a Runner is given, as for the outcomes, and `kubeconfig` of an administrator that
//! names the API server itself.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::caller::Runner;
use crate::deploys::has_ended;

/// Longest time of one, seconds.
const TIMEOUT_S: u32 = 120;

fn application(name: &str, image: &str) -> Value {
    json!({
        "name": name, "namespace": "production", "image": image, "replicas": 1,
        "command": ["sh", "-c", "trap 'exit 0' TERM; sleep 3600 & wait"],
        "ports": [{"container_port": 8080}], "security": {"user": 1000},
        "probes": {"readiness": {"command": ["true"], "period_s": 1}},
        "resources": {"requests": {"cpu": "5m", "memory": "4Mi"}, "limits": {"memory": "32Mi"}}
    })
}

struct Kubectl {
    program: String,
    kubeconfig: String,
}

impl Kubectl {
    /// # Errors
    /// What it said.
    fn run(&self, args: &[&str], input: &str) -> Result<(), String> {
        let run = || {
            let mut child = Command::new(&self.program)
                .args(["--kubeconfig", &self.kubeconfig, "-n", "production"])
                .args(args)
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()?;
            child.stdin.take().unwrap().write_all(input.as_bytes())?;
            child.wait_with_output()
        };
        let out = tokio::task::block_in_place(run).map_err(|e| format!("kubectl: {e}"))?;
        if out.status.success() {
            return Ok(());
        }
        Err(format!("kubectl {args:?}: {}", String::from_utf8_lossy(&out.stderr)))
    }

    fn deploy(&self, name: &str, objects: &str) -> Result<Duration, String> {
        let begun = Instant::now();
        self.run(&["apply", "-f", "-"], objects)?;
        let (deployment, timeout) =
            (format!("deployment/{name}"), format!("--timeout={TIMEOUT_S}s"));
        self.run(&["rollout", "status", &deployment, &timeout], "")?;
        Ok(begun.elapsed())
    }

    fn delete(&self, name: &str) -> Result<(), String> {
        let label = format!("pipeops.io/application={name}");
        let kinds = "deployments,services,configmaps";
        self.run(&["delete", kinds, "-l", &label, "--wait=true", "--cascade=foreground"], "")
    }
}

/// As `pipeops deploy` does: submitted to the control plane, followed through the gateway.
async fn deploy(runner: &Runner, key: &str, name: &str, image: &str) -> Result<Duration, String> {
    let spec = json!({"application": application(name, image), "timeout_s": TIMEOUT_S});
    let body = json!({"kind": "deploy", "spec": spec});
    let begun = Instant::now();
    let (status, taken) = runner.at_control_plane("POST", "", key, &body).await;
    let id = taken["id"].as_str().ok_or_else(|| format!("{status} {taken}"))?;
    runner.followed(id).await?;
    let took = begun.elapsed();
    let path = format!("/api/v1/operations/{id}");
    let end = runner.call("GET", &path, "", &Value::Null).await.1;
    if has_ended(&end) && end["state"] == "succeeded" {
        return Ok(took);
    }
    Err(format!("{name}: {end}"))
}

pub(crate) fn figures(what: &str, took: &mut [Duration]) -> [f64; 2] {
    let raw: Vec<String> = took.iter().map(|t| t.as_millis().to_string()).collect();
    took.sort_unstable();
    let at = |part: f64| {
        let rank = (part * took.len() as f64).ceil() as usize;
        took[rank.clamp(1, took.len()) - 1].as_secs_f64() * 1000.0
    };
    let (p50, p99) = (at(0.5), at(0.99));
    println!("{what:<44} p50 {p50:>6.0} ms  p99 {p99:>6.0} ms  raw: {}", raw.join(" "));
    [p50, p99]
}

async fn measured(
    runner: &Runner,
    kubectl: &Kubectl,
    image: &str,
    runs: usize,
) -> Result<[Vec<Duration>; 2], String> {
    let run = jiff::Timestamp::now().as_second();
    // the objects are those that a deploy has made
    let pattern = format!("pattern-{run}");
    deploy(runner, &pattern, &pattern, image).await?;
    let path = format!("/k8s/api/v1/namespaces/production/configmaps/{pattern}.revision-1");
    let kept = runner.call("GET", &path, "", &Value::Null).await.1;
    let objects = kept["data"]["objects.json"].as_str().ok_or("there is no revision")?.to_owned();
    kubectl.delete(&pattern)?;
    let list = format!("{{\"apiVersion\":\"v1\",\"kind\":\"List\",\"items\":{objects}}}");
    let [mut ours, mut theirs] = [Vec::new(), Vec::new()];
    for n in 0..runs {
        for side in [n % 2, (n + 1) % 2] {
            let name = format!("{}-{run}-{n}", ["ours", "theirs"][side]);
            if side == 0 {
                ours.push(deploy(runner, &name, &name, image).await?);
            } else {
                theirs.push(kubectl.deploy(&name, &list.replace(&pattern, &name))?);
            }
            // its pods are gone before the next ones start
            kubectl.delete(&name)?;
        }
    }
    Ok([ours, theirs])
}

/// Prints both with raw numbers and their ratio. The result is the exit code.
pub(crate) async fn overhead(dir: &str, image: &str, program: &str, runs: usize) -> i32 {
    let runner = Runner::open(dir);
    let kubectl = Kubectl { program: program.into(), kubeconfig: format!("{dir}/kubeconfig") };
    let [mut ours, mut theirs] = match measured(&runner, &kubectl, image, runs).await {
        Ok(measured) => measured,
        Err(why) => {
            println!("deploy: FAILED: {why}");
            return 1;
        }
    };
    let [p50, p99] = figures("deploy, through control plane and tunnel", &mut ours);
    let [their_p50, their_p99] = figures("kubectl apply, kubectl rollout status", &mut theirs);
    println!(
        "ratio {:.2} at p50, {:.2} at p99; {:.0} ms and {:.0} ms more, of {runs} each, in turn",
        p50 / their_p50,
        p99 / their_p99,
        p50 - their_p50,
        p99 - their_p99
    );
    0
}
