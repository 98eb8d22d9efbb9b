//! Stands in for what is outside a VM: control plane, FRP server, a gateway for kubectl; and asks a
//! real API server for verdicts.
//!
//!     stand serve DIR           writes DIR/env with PLANE and GATEWAY, then serves
//!     stand rights KUBECONFIG   role × verb × resource × namespace, against what is written here
//!     stand bench PIPEOPS [idle held requests bulk]
//!                               requests, bulk and memory through the real executable, with
//!                               kubectl proxy beside it
//!     stand compare BEFORE AFTER RUNS [cli k8s tunnel control-plane]
//!                               two versions of the program, each figure in turn
//!     stand tunnel PIPEOPS      our client beside frpc behind a genuine frps (PIPEOPS_BENCH_FRP);
//!                               both halves ours beside rathole and two nginx
//!                               (PIPEOPS_BENCH_NGINX, the program, and
//!                               PIPEOPS_BENCH_NGINX_STREAM, the module)
//!     stand fleet PIPEOPS N     N simulated agents at a real control plane
//!     stand jobs PIPEOPS AMQP N N jobs over RabbitMQ through one, two and three Runners, and single
//!                               ones beside the same operation over HTTPS
//!     stand runner DIR IMAGE    beside `pipeops runner`: hears of a cluster, has IMAGE deployed there
//!                               by a job, by the gateway and straight through the tunnel
//!     stand outcomes DIR IMAGE  workloads that can't run: what their operations say
//!     stand applications DIR IMAGE  an application deployed, brought back, superseded, deleted
//!     stand deploys DIR IMAGE   operations of an application while what is around them fails: the agent
//!                               killed at each write, the control plane away, the tunnel cut
//!     stand crowd DIR IMAGE     200 operations of four callers at once
//!     stand overhead DIR IMAGE KUBECTL RUNS  `deploy` beside kubectl apply and rollout status
//!     stand registry            a registry of images that has none
//!     stand soak PIPEOPS N      N forced reconnects and N aborted downloads: what memory and
//!                               descriptors do
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::exit,
    clippy::too_many_lines,
    dead_code,
    reason = "a test program"
)]

mod applications;
mod bench;
mod caller;
mod compare;
mod crowd;
mod deploys;
#[path = "../it/fake_control_plane.rs"]
mod fake_control_plane;
mod faults;
mod fleet;
mod gate;
mod jobs;
mod killed;
mod outcomes;
mod overhead;
mod restricted;
mod rights;
mod runner;
mod seen;
mod tenants;
mod tunnel;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::Query;
use axum::routing::get;
use fake_control_plane::{FRP_TOKEN, FakeControlPlane, identity};
use faults::{Faults, Mode};
use pipeops::base::secret::Secret;
use pipeops::frp::server::{Server, ServerConfig};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[1..] {
        ["serve", dir] => serve(dir).await,
        ["rights", kubeconfig] => std::process::exit(rights::check(kubeconfig).await),
        ["bench", pipeops, ref parts @ ..] => bench::bench(pipeops, parts).await,
        ["compare", before, after, runs, ref parts @ ..] => {
            compare::compare(before, after, runs.parse().unwrap(), parts).await
        }
        ["tunnel", pipeops] => tunnel::tunnel(pipeops).await,
        ["fleet", pipeops, n] => {
            fleet::fleet(pipeops, n.parse().unwrap()).await;
        }
        ["applications", dir, image] => {
            std::process::exit(applications::applications(dir, image).await)
        }
        ["outcomes", dir, image] => std::process::exit(outcomes::outcomes(dir, image).await),
        ["deploys", dir, image] => std::process::exit(deploys::deploys(dir, image).await),
        ["crowd", dir, image] => std::process::exit(crowd::crowd(dir, image).await),
        ["overhead", dir, image, kubectl, runs] => {
            let runs = runs.parse().unwrap();
            std::process::exit(overhead::overhead(dir, image, kubectl, runs).await)
        }
        ["jobs", pipeops, amqp, n] => jobs::jobs(pipeops, amqp, n.parse().unwrap()).await,
        ["registry"] => outcomes::registry().await,
        ["runner", dir, image] => std::process::exit(runner::runner(dir, image).await),
        ["soak", pipeops, n] => std::process::exit(bench::soak(pipeops, n.parse().unwrap()).await),
        _ => {
            eprintln!(
                "usage: stand serve DIR | rights KUBECONFIG | bench PIPEOPS [PART…] | compare BEFORE AFTER RUNS [PART…] | tunnel PIPEOPS | fleet PIPEOPS N | jobs PIPEOPS AMQP N | runner DIR IMAGE | outcomes DIR IMAGE | applications DIR IMAGE | deploys DIR IMAGE | crowd DIR IMAGE | overhead DIR IMAGE KUBECTL RUNS | registry | soak PIPEOPS N"
            );
            std::process::exit(2);
        }
    }
}

async fn serve(dir: &str) {
    let (tls, pin) = identity();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let back = listener.local_addr().unwrap();
    // agents come through a relay that can be made to misbehave; its port must be free again at
    // once
    let frps_address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mode = watch::Sender::new(Mode::Pass);
    tokio::spawn(faults::front(frps_address, back, tls.clone(), mode.subscribe()));
    let config = ServerConfig {
        token: Secret::new(FRP_TOKEN),
        tls: Some(tls.clone()),
        tcp_mux: true,
        tcp_bind: None,
        heartbeat: Duration::from_secs(30),
        authorizer: None,
    };
    let frps = Server::new(config);
    tokio::spawn({
        let frps = frps.clone();
        async move { frps.serve(listener, CancellationToken::new()).await }
    });
    let state = Arc::new(FakeControlPlane::new(frps_address, &pin));
    let address = state.clone().serve().await;
    let tokens = state.clone();
    let faults = Arc::new(Faults {
        control_plane: state.clone(),
        frps: frps.clone(),
        mode,
        port: frps_address.port(),
        back,
        only: Mutex::default(),
        out: Mutex::default(),
        samples: Arc::default(),
    });
    let router = axum::Router::new().route(
        "/token",
        get(async move |Query(asked): Query<Vec<(String, String)>>| {
            let value = |name: &str| asked.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone());
            let agent = tokens
                .calls("/register")
                .last()
                .map(|c| c.2["agent"]["id"].as_str().unwrap_or_default().to_owned())
                .unwrap_or_default();
            let namespaces = value("namespaces");
            let namespaces: Option<Vec<&str>> =
                namespaces.as_deref().map(|n| n.split(',').collect());
            tokens.token(
                &agent,
                &value("role").unwrap_or_else(|| "viewer".into()),
                namespaces.as_deref(),
            )
        }),
    );
    let router = router.route(
        "/faults",
        get(async move |Query(asked): Query<Vec<(String, String)>>| {
            let only =
                asked.into_iter().find(|(n, _)| n == "only").map(|(_, v)| v).unwrap_or_default();
            let faults = faults.clone();
            let here = tokio::runtime::Handle::current();
            tokio::task::spawn_blocking(move || here.block_on(faults.all(&only))).await.unwrap()
        }),
    );
    let tokens = fake_control_plane::listen(router, ()).await;
    let gateway = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = gateway.local_addr().unwrap().port();
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(
        format!("{dir}/env.new"),
        format!(
            "PLANE=http://{address}\nTOKENS=http://{tokens}\nGATEWAY={port}\nENROL={}\n",
            fake_control_plane::TOKEN
        ),
    )
    .unwrap();
    std::fs::rename(format!("{dir}/env.new"), format!("{dir}/env")).unwrap();
    loop {
        let Ok((user, _)) = gateway.accept().await else { continue };
        let (frps, state, tls) = (frps.clone(), state.clone(), tls.clone());
        tokio::spawn(async move {
            // kubectl sends no token without TLS
            let Ok(mut user) = tokio_rustls::TlsAcceptor::from(tls).accept(user).await else {
                return;
            };
            let Ok(io) = frps.dial("agent").await else { return };
            let Ok(mut agent) = state.tls(io, b"http/1.1").await else { return };
            let _ = tokio::io::copy_bidirectional(&mut user, &mut agent).await;
        });
    }
}
