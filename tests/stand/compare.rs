//! The version before beside the one at hand. Each figure is taken of both in turn, so that what
//! disturbs the machine disturbs both, and the first of a round changes from round to round.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::bench::{self, BULK, Rig, download, load, median};
use crate::{fleet, tunnel};

/// Callers at once.
const CALLERS: usize = 50;
const LENGTH: Duration = Duration::from_secs(3);
const PODS: &str = "/k8s/api/v1/namespaces/beta/pods";

/// What is better of a figure.
#[derive(Clone, Copy)]
enum Better {
    More,
    Less,
}

struct Figure {
    name: String,
    better: Better,
    /// Of the version before, and of the one at hand.
    values: [Vec<f64>; 2],
}

#[derive(Default)]
struct Figures(Vec<Figure>);

impl Figures {
    fn add(&mut self, name: &str, better: Better, side: usize, value: f64) {
        if !self.0.iter().any(|figure| figure.name == name) {
            self.0.push(Figure { name: name.to_owned(), better, values: Default::default() });
        }
        let figure = self.0.iter_mut().find(|figure| figure.name == name).unwrap();
        figure.values[side].push(value);
    }

    /// A line a figure: medians, their ratio, the same ratio between every other run of the version
    /// before and the rest of its runs, which is noise, and all values.
    fn print(&self) {
        for Figure { name, better, values: [before, after] } in &self.0 {
            let every_other = |start: usize| -> Vec<f64> {
                before.iter().skip(start).step_by(2).copied().collect()
            };
            let noise = median(every_other(1)) / median(every_other(0));
            let (old, new) = (median(before.clone()), median(after.clone()));
            let better = match better {
                Better::More => "more is better",
                Better::Less => "less is better",
            };
            println!(
                "{name}: before {old:.1}, after {new:.1}; ratio {:.3} ({better}), before beside itself {noise:.3}",
                new / old
            );
            println!("  raw: before {before:.1?}\n  raw: after {after:.1?}");
        }
    }
}

/// Both sides, the first of them another one each round.
fn turns(round: usize) -> [usize; 2] {
    if round.is_multiple_of(2) { [0, 1] } else { [1, 0] }
}

/// `runs` rounds of each figure of `parts` (all where it is empty), after one that warms up.
pub(crate) async fn compare(before: &str, after: &str, runs: usize, parts: &[&str]) {
    let programs = [before, after];
    let mut figures = Figures::default();
    let wanted = |part: &str| parts.is_empty() || parts.contains(&part);
    if wanted("cli") {
        help(programs, runs, &mut figures);
    }
    if wanted("k8s") {
        pass_through(programs, runs, &mut figures).await;
        memory(programs, runs, &mut figures).await;
    }
    if wanted("tunnel") {
        match std::env::var_os("PIPEOPS_BENCH_FRP") {
            Some(dir) => behind_frps(programs, Path::new(&dir), runs, &mut figures).await,
            None => println!("NOT RUN: behind a genuine frps (PIPEOPS_BENCH_FRP names none)"),
        }
        both_halves(programs, runs, &mut figures).await;
    }
    if wanted("control-plane") {
        agents(programs, runs, &mut figures).await;
    }
    figures.print();
}

fn help(programs: [&str; 2], runs: usize, figures: &mut Figures) {
    for round in 0..=runs {
        for side in turns(round) {
            let begun = Instant::now();
            for _ in 0..10 {
                let done = std::process::Command::new(programs[side]).arg("--help").output();
                assert!(done.unwrap().status.success());
            }
            if round > 0 {
                let each = begun.elapsed().as_secs_f64() * 1000.0 / 10.0;
                figures.add("--help, ms", Better::Less, side, each);
            }
        }
    }
}

async fn pass_through(programs: [&str; 2], runs: usize, figures: &mut Figures) {
    let rigs = [Rig::new(programs[0]).await, Rig::new(programs[1]).await];
    let tokens = rigs.each_ref().map(Rig::deployer);
    for round in 0..=runs {
        for side in turns(round) {
            let (rig, token) = (&rigs[side], tokens[side].as_str());
            let cpu = rig.cpu_seconds();
            let run = load(CALLERS, LENGTH, || rig.client(), "localhost", PODS, token).await;
            let cpu = rig.cpu_seconds() - cpu;
            let bulk = bench::bulk(rig, 256 << 20, token).await / 1e6;
            let (_, beside) = tokio::join!(
                bench::bulk(rig, 1 << 30, token),
                load(CALLERS, LENGTH, || rig.client(), "localhost", PODS, token)
            );
            if round > 0 {
                let mut add = |name: &str, better, value| figures.add(name, better, side, value);
                add("pass-through, requests/s", Better::More, run.rate());
                add("pass-through, p99 ms", Better::Less, run.p99_ms());
                let a_second = run.rate() * run.seconds() / cpu;
                add("pass-through, requests a CPU second", Better::More, a_second);
                add("pass-through, one bulk stream, MB/s", Better::More, bulk);
                add("callers beside bulk, p99 ms", Better::Less, beside.p99_ms());
            }
        }
    }
}

/// Of fresh agents: idle, and with held streams.
async fn memory(programs: [&str; 2], runs: usize, figures: &mut Figures) {
    for round in 0..runs {
        for side in turns(round) {
            let rig = Rig::new(programs[side]).await;
            figures.add("idle, RSS kB", Better::Less, side, rig.rss_kib());
            let [tls, watches] = bench::hold(&rig, &rig.deployer()).await;
            figures.add("1,000 held streams, RSS kB", Better::Less, side, tls);
            figures.add("1,000 held watches, RSS kB", Better::Less, side, watches);
        }
    }
}

async fn behind_frps(programs: [&str; 2], dir: &Path, runs: usize, figures: &mut Figures) {
    let sites = [tunnel::Site::new().await, tunnel::Site::new().await];
    let one = tunnel::Behind::start(&sites[0], programs[0], dir).await;
    let other = tunnel::Behind::start(&sites[1], programs[1], dir).await;
    let both = [one, other];
    for round in 0..=runs {
        for side in turns(round) {
            let (caller, http) = (|| both[side].tcp(), || both[side].http());
            let token = both[side].token();
            let tcp = load(CALLERS, LENGTH, caller, "localhost", "/healthz", token).await;
            let http = load(CALLERS, LENGTH, http, "ours.test", "/healthz", token).await;
            let bulk = download(caller, "localhost", BULK, 256 << 20, token).await / 1e6;
            let copies = async {
                loop {
                    download(caller, "localhost", BULK, 256 << 20, token).await;
                }
            };
            let beside = tokio::select! {
                () = copies => unreachable!("it never ends"),
                beside = load(CALLERS, LENGTH, caller, "localhost", "/healthz", token) => beside,
            };
            if round > 0 {
                let mut add = |name: &str, better, value| figures.add(name, better, side, value);
                add("tcp with TLS inside behind frps, requests/s", Better::More, tcp.rate());
                add("tcp with TLS inside behind frps, p99 ms", Better::Less, tcp.p99_ms());
                add("http behind frps, requests/s", Better::More, http.rate());
                add("http behind frps, p99 ms", Better::Less, http.p99_ms());
                add("one bulk stream behind frps, MB/s", Better::More, bulk);
                add("callers beside bulk behind frps, requests/s", Better::More, beside.rate());
                add("callers beside bulk behind frps, p99 ms", Better::Less, beside.p99_ms());
            }
        }
    }
}

async fn both_halves(programs: [&str; 2], runs: usize, figures: &mut Figures) {
    let sites = [tunnel::Site::new().await, tunnel::Site::new().await];
    let agents = [
        tunnel::own_halves(&sites[0], programs[0]).await,
        tunnel::own_halves(&sites[1], programs[1]).await,
    ];
    for round in 0..=runs {
        for side in turns(round) {
            let agent = &agents[side];
            let connect = || agent.caller();
            let run = load(CALLERS, LENGTH, connect, "localhost", "/healthz", agent.token()).await;
            if round > 0 {
                figures.add("both halves, requests/s", Better::More, side, run.rate());
                figures.add("both halves, p99 ms", Better::Less, side, run.p99_ms());
            }
        }
    }
}

async fn agents(programs: [&str; 2], runs: usize, figures: &mut Figures) {
    for round in 0..runs {
        for side in turns(round) {
            let run = fleet::fleet(programs[side], 1000).await;
            let mut add = |name: &str, better, value| figures.add(name, better, side, value);
            add("registrations/s", Better::More, run.registrations);
            add("registrations, p99 ms", Better::Less, run.registrations_p99_ms);
            add("heartbeats/s", Better::More, run.heartbeats);
            add("heartbeats, p99 ms", Better::Less, run.heartbeats_p99_ms);
            add("control plane, KiB an agent", Better::Less, run.kib_an_agent);
            add("1,000 agents back after a restart, s", Better::Less, run.back_s);
        }
    }
}
