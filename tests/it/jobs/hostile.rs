//! 300 bodies that nobody would write, each with a token that is good for it, or with one that was
//! changed: the control plane refuses them, does nothing, and repeats nothing.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{CANARY, Jobs, restart, text};

/// The same numbers in each run (Marsaglia, Xorshift RNGs).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % below
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        let at = self.next(from.len());
        &from[at]
    }

    /// A value of any type, some of which hold more of them.
    fn value(&mut self, depth: usize) -> Value {
        match self.next(if depth == 0 { 8 } else { 11 }) {
            0 => Value::Null,
            1 => json!(self.next(2) == 0),
            2 => json!(-1),
            3 => json!(u64::MAX),
            4 => json!(1e300),
            5 => json!(CANARY),
            6 => json!(format!("\u{202e}{CANARY}\u{0}\n")),
            7 => json!({"sealed": self.pick(&["", "AAAA", "%", CANARY])}),
            8 => (0..self.next(4)).map(|_| self.value(depth - 1)).collect(),
            9 => {
                let kind = *self.pick(&["Secret", "List", "Deployment"]);
                json!({"kind": kind, "data": self.value(depth - 1),
                    "metadata": self.value(depth - 1), "items": self.value(depth - 1)})
            }
            _ => json!({"spec": self.value(depth - 1), "sealed": self.value(depth - 1)}),
        }
    }

    /// A job for a cluster that is not there, with something odd in it.
    fn body(&mut self) -> String {
        const FIELDS: [&str; 10] = [
            "cluster", "clusters", "selector", "waves", "kind", "spec", "ttl_s", "token", "opened",
            "Kind",
        ];
        let mut job = json!({"cluster": "nope", "kind": "apply",
            "spec": {"objects": [{"kind": "ConfigMap", "data": {"a": CANARY}}]}});
        for _ in 0..=self.next(3) {
            let field = *self.pick(&FIELDS);
            job[field] = match field {
                "spec" => json!({"objects": self.value(3), "name": self.value(1)}),
                "kind" => json!(self.pick(&["secret", "apply", "dance", ""])),
                // what these name is quoted
                "cluster" | "clusters" | "selector" | "waves" => match self.next(4) {
                    0 => Value::Null,
                    1 => json!(["nope", "", "nope"]),
                    2 => json!({"a": -1}),
                    _ => json!(self.pick(&["", "a/b", "nope", "\u{202e}", "a=b", "0%"])),
                },
                _ => self.value(2),
            };
        }
        let mut text: Vec<char> = job.to_string().chars().collect();
        match self.next(6) {
            0 => text.truncate(self.next(text.len())),
            1 => {
                let at = self.next(text.len());
                text[at] = *self.pick(&['{', '}', '[', ']', ',', '\\', '\u{1}', '\u{fffd}']);
            }
            2 => text = text.repeat(2),
            3 => text.splice(0..0, "[".repeat(500).chars()).for_each(drop),
            _ => {}
        }
        text.into_iter().collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_hundred_hostile_jobs_do_nothing_and_are_quoted_nowhere() {
    let jobs = Jobs::new().await;
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let mut codes = BTreeMap::<String, usize>::new();
    for n in 0..300 {
        let body = numbers.body();
        let mut token = jobs.token(&body).await;
        if n % 5 == 0 {
            let at = numbers.next(token.len());
            let other = ["", "A", ".", "=", "\u{e9}"][numbers.next(5)];
            token.replace_range(at..=at, other);
        }
        let mut request = json!({"token": token, "message": body});
        if n % 7 == 0 {
            request["opened"] = json!({CANARY: CANARY, "AAAA": CANARY});
        }
        if n % 3 == 0 {
            (request["direct"], request["redelivered"]) = (json!(true), json!(true));
        }
        let (status, answer) = jobs.bring_as(&jobs.runner, request).await;
        // before anything is opened
        if answer["state"] == "sealed" {
            continue;
        }
        assert!((400..500).contains(&status), "{n}: {status} {answer} for {body}");
        let code = text(&answer["code"]);
        assert!(!answer.to_string().contains(CANARY), "{n}: {answer} for {body}");
        *codes.entry(code).or_default() += 1;
    }
    // and a body as long as one may be, and longer
    for size in [1 << 20, (1 << 20) + 1, 2 << 20] {
        let body = format!("{{\"kind\": \"{}\"}}", "x".repeat(size - 12));
        let (status, answer) = jobs.bring(&jobs.token(&body).await, &body).await;
        assert_eq!((status, &answer["code"]), (400, &json!("bad_job")), "{size}: {answer}");
        assert!(answer.to_string().len() < 1000, "{size}");
    }
    assert!(codes.len() >= 3 && codes.contains_key("bad_job"), "{codes:?}");
    assert!(jobs.asked().is_empty(), "{codes:?}");
    let log = jobs.log();
    assert!(!log.contains(CANARY) && !log.contains("panicked"), "{log}");
    assert_eq!(jobs.control_plane.try_get("/api/v1/health", "").await.status(), 200);
    // and a good one is done after them
    let body = restart(&jobs.agent.cluster).to_string();
    assert_eq!(jobs.bring(&jobs.token(&body).await, &body).await.0, 202);
}
