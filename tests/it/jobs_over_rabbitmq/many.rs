//! Many jobs at once, while Runners, broker and control plane are killed: each has one effect and
//! one answer, those of an application in their order.

use std::collections::HashSet;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use serde_json::json;

use super::{Order, PATIENCE, Runner, Site, consumers, waiting};
use crate::operations::{apply, deployment};

const APPLICATIONS: usize = 40;

impl Site {
    /// So many jobs for each application, those of one application in their order.
    async fn orders(&self, each: usize) -> Vec<Order> {
        let all = (0..each).flat_map(|number| (0..APPLICATIONS).map(move |a| (a, number)));
        futures_util::stream::iter(all)
            .map(|(application, number)| async move {
                self.order(&self.count(application, number)).await
            })
            .buffered(16)
            .collect()
            .await
    }

    /// Waits until so many jobs have had an effect.
    async fn had_effect(&self, count: usize) {
        let begun = Instant::now();
        while self.kube.patched.lock().unwrap().len() < count {
            assert!(begun.elapsed() < PATIENCE, "{} effects", self.counted().len());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Each job was answered as one that succeeded, and had one effect, in its order.
    async fn all_done(&self, orders: &[Order]) {
        let answers = self.answers(orders.len()).await;
        let mut answered = HashSet::new();
        for answer in &answers {
            let body = answer.json();
            assert_eq!(body["state"], "succeeded", "{body}");
            let job = body["job"].as_str().unwrap().to_owned();
            assert_eq!(answer.id, format!("answer-{job}"));
            assert_eq!(answer.correlation, format!("m-{job}"));
            assert!(answered.insert(job));
        }
        let asked: HashSet<String> = orders.iter().map(|order| order.id.clone()).collect();
        assert!(answered == asked && answers.len() == orders.len(), "{}", answers.len());
        let each = orders.len() / APPLICATIONS;
        let counted = self.counted();
        assert_eq!(counted.len(), APPLICATIONS);
        for (application, numbers) in counted {
            assert_eq!(numbers, (0..each).collect::<Vec<_>>(), "{application}");
        }
        // what was lost, or done twice, would lie there
        assert_eq!(waiting(&self.rabbit.url, &self.project.dead).await, 0);
    }
}

fn kill(runners: &mut [Runner], which: usize) {
    tokio::task::block_in_place(|| runners[which].kill_and_restart());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_jobs_have_one_effect_and_one_answer_each_whatever_is_killed() {
    let Some(mut site) = Site::new().await else { return };
    let mut runners = vec![site.runner("").await, site.runner("").await, site.runner("").await];
    site.ready(&site.project, 3).await;
    let orders = site.orders(25).await;
    let begun = Instant::now();
    for (round, part) in orders.chunks(250).enumerate() {
        site.publish(part).await;
        // in the middle of this part
        site.had_effect(round * 250 + 60).await;
        match round {
            0 => kill(&mut runners, 0),
            1 => {
                site.rabbit.script("kill");
                site.rabbit.restart();
            }
            2 => {
                kill(&mut runners, 1);
                kill(&mut runners, 2);
                tokio::task::block_in_place(|| site.control_plane.kill_and_restart());
            }
            // whoever has the partitions by now
            _ => {
                for which in 0..3 {
                    kill(&mut runners, which);
                    let so_far = site.kube.patched.lock().unwrap().len();
                    site.had_effect((so_far + 40).min(1000)).await;
                }
            }
        }
    }
    site.all_done(&orders).await;
    println!("1,000 jobs, 6 Runners, broker and control plane killed: {:?}", begun.elapsed());
    assert!(runners.iter_mut().all(Runner::lives));
}

#[tokio::test(flavor = "multi_thread")]
async fn straight_through_the_tunnel_it_is_the_same() {
    let Some(site) = Site::new().await else { return };
    let mut runners = vec![site.runner("direct = true").await, site.runner("direct = true").await];
    site.ready(&site.project, 2).await;
    let orders = site.orders(4).await;
    site.publish(&orders).await;
    site.had_effect(40).await;
    kill(&mut runners, 0);
    site.had_effect(100).await;
    kill(&mut runners, 1);
    site.all_done(&orders).await;
    // nothing of the Runner's own role, which may change nothing
    let through = site.kube.through();
    let changes = through.iter().filter(|seen| seen.method == "PATCH");
    for change in changes {
        assert_eq!(change.all("impersonate-group"), ["pipeops:deployer"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_runner_had_to_let_go_is_brought_to_its_end() {
    let Some(mut site) = Site::new().await else { return };
    revoked(&site).await;
    away(&mut site).await;
    each_kind_of_end(&site).await;
}

/// The token of a Runner is revoked in the middle of a job: it takes nothing any more, and another
/// one brings the same operation to its end.
async fn revoked(site: &Site) {
    let mut first = site.runner("").await;
    site.ready(&site.project, 1).await;
    let mut body = apply(&[deployment("web")]);
    body["cluster"] = site.cluster.clone().into();
    let order = site.order(&body).await;
    site.publish(std::slice::from_ref(&order)).await;
    // its pods are not ready, and it is waited for them
    site.had_effect(1).await;
    let mut second = site.runner("").await;
    site.ready(&site.project, 2).await;
    let begun = Instant::now();
    let revoke = ["control-plane", "runner", "revoke", &first.id];
    site.control_plane.sandbox.subcommand(&revoke).ended(0);
    while consumers(&site.rabbit.url, &site.project.exchange).await != Some(1) {
        assert!(begun.elapsed() < Duration::from_secs(5), "it goes on: {}", first.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let partitions = (0..8).map(|partition| site.project.partition(partition));
    for queue in partitions.chain([site.project.runners()]) {
        while consumers(&site.rabbit.url, &queue).await != Some(1) {
            assert!(begun.elapsed() < Duration::from_secs(5), "{queue}: {}", first.log());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    first.says("token_revoked", Duration::from_secs(5)).await;
    site.kube.ready.store(true, Relaxed);
    let answer = site.answer_to(&order).await;
    assert_eq!(answer["state"], "succeeded", "{answer}");
    assert_eq!(answer["operation"]["objects"][0]["outcome"], "ready", "{answer}");
    assert_eq!(site.kube.patched.lock().unwrap().len(), 1, "it was done twice");
    assert!(first.lives() && second.lives());
    assert_eq!(waiting(&site.rabbit.url, &site.project.dead).await, 0);
}

/// The control plane is away when a job comes: nothing is given up meanwhile.
async fn away(site: &mut Site) {
    let runner = site.runner("").await;
    site.ready(&site.project, 1).await;
    let order = site.order(&site.count(0, 0)).await;
    site.control_plane.stop();
    site.publish(std::slice::from_ref(&order)).await;
    let begun = Instant::now();
    while waiting(&site.rabbit.url, &site.project.exchange).await > 0 {
        assert!(begun.elapsed() < PATIENCE, "{}", runner.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(waiting(&site.rabbit.url, &site.project.dead).await, 0);
    tokio::task::block_in_place(|| site.control_plane.start_again());
    assert_eq!(site.answer_to(&order).await["state"], "succeeded");
    assert_eq!(site.counted()["app-0"], [0]);
}

/// An operation that fails is an answer, and nothing dead; a job for no cluster in particular is a
/// rollout.
async fn each_kind_of_end(site: &Site) {
    let _runner = site.runner("").await;
    let mut wrong = site.count(0, 1);
    wrong["spec"]["objects"][0]["apiVersion"] = "none/v1".into();
    let answer = site.done(&wrong).await;
    assert_eq!(answer["state"], "failed", "{answer}");
    assert!(answer["message"].as_str().unwrap().contains("none/v1"), "{answer}");
    let mut many = site.count(0, 2);
    many.as_object_mut().unwrap().shift_remove("cluster");
    many["all"] = json!(true);
    let answer = site.done(&many).await;
    assert_eq!(answer["state"], "succeeded", "{answer}");
    assert_eq!(answer["rollout"]["counts"]["succeeded"], 1, "{answer}");
    assert_eq!(site.counted()["app-0"], [0, 2]);
}
