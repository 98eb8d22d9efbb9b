//! What the defaults of `deploy` are fit for: a namespace that enforces `restricted` Pod Security.
//! Where the image does not allow it, the operation says which field.

use serde_json::{Value, json};

use crate::deploys::Deploys;
use crate::gate::in_vm;
use crate::seen::Seen;

impl Deploys {
    /// Writes the objects that were made to DIR/objects.json, for kube-score.
    pub(crate) async fn restricted(&mut self, dir: &str) {
        let enforce = |level: &str| {
            let line = format!(
                "kubectl label --overwrite namespace production \
                 pod-security.kubernetes.io/enforce={level}"
            );
            in_vm("a1", &line, "").unwrap_or_else(|why| panic!("{why}"));
        };
        enforce("restricted");
        for (planted, security, state, reason, named) in [
            (
                "a deploy with defaults where `restricted` is enforced",
                json!({"user": 1000}),
                "succeeded",
                "",
                "",
            ),
            (
                "the same of an image that runs as root",
                json!({}),
                "failed",
                "runs_as_root",
                "runs as root",
            ),
            (
                "the same with allow_root",
                json!({"allow_root": true}),
                "failed",
                "pod_security",
                "runAsNonRoot",
            ),
        ] {
            let name = self.name("secure");
            let application = self.application(&name, |a| {
                a["security"] = security;
                a["resources"] = json!({"requests": {"cpu": "5m", "memory": "4Mi"},
                    "limits": {"cpu": "500m", "memory": "32Mi"}});
            });
            let mut ended = self.deploy(application).await;
            let seen = Seen::of(&name);
            ended.told(state, reason);
            let message = ended.end["message"].as_str().unwrap_or_default().to_owned();
            ended.demand(message.contains(named), &format!("it does not name {named}"));
            ended.demand(
                seen.is_complete() == (state == "succeeded"),
                "the cluster has it otherwise",
            );
            if state == "succeeded" {
                let kept =
                    seen.kind("ConfigMap").first().map(|kept| kept["data"]["objects.json"].clone());
                let objects = kept.as_ref().and_then(Value::as_str).unwrap_or("[]");
                let list =
                    format!("{{\"apiVersion\":\"v1\",\"kind\":\"List\",\"items\":{objects}}}");
                std::fs::write(format!("{dir}/objects.json"), list).unwrap();
            }
            self.row(planted, &ended, &seen.summary());
            self.forget(&name);
        }
        // as the installer makes it
        enforce("baseline");
    }
}
