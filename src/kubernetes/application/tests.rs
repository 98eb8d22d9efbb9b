//! Objects of applications, from the smallest to one that uses everything.

use super::*;

fn application(value: Value) -> Application {
    let application: Application = serde_json::from_value(value).unwrap();
    application.check().unwrap();
    application
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    objects.iter().find(|object| object["kind"] == kind).unwrap_or(&Value::Null)
}

fn kinds(objects: &[Value]) -> Vec<&str> {
    objects.iter().filter_map(|object| object["kind"].as_str()).collect()
}

fn full() -> Application {
    application(json!({
        "name": "web", "namespace": "production", "image": "r.example/web:1",
        "ports": [{"container_port": 8080, "name": "http", "service_port": 80}],
        "environment": {"MODE": "fast", "URL": {"secret": "db", "key": "url"},
            "LEVEL": {"config": "settings", "key": "level"}},
        "environment_from": [{"secret": "db"}, {"config": "theirs"}],
        "autoscaling": {"min_replicas": 2, "max_replicas": 5},
        "resources": {"requests": {"cpu": "100m"}, "limits": {"memory": "64Mi"}},
        "probes": {"readiness": {"path": "/ready"}, "liveness": {"port": 8080, "period_s": 5},
            "startup": {"command": ["/up"]}},
        "volumes": [{"mount_path": "/secrets", "secret": "db", "read_only": true},
            {"mount_path": "/theirs", "config": "theirs"}, {"mount_path": "/tmp", "empty": true}],
        "host": {"name": "shop.example.com"},
        "labels": {"team": "a"}, "annotations": {"example.com/a": "b"},
        "image_pull_secrets": ["registry"], "security": {"user": 1000, "read_only_root": true}
    }))
}

fn sets() -> ConfigSets {
    let keys = |all: &[(&str, &str)]| {
        all.iter().map(|(key, object)| ((*key).to_owned(), (*object).to_owned())).collect()
    };
    ConfigSets::from([
        (ConfigSource::Secret("db".into()), keys(&[("url", "db-2"), ("password", "db-1")])),
        (ConfigSource::Config("settings".into()), keys(&[("level", "settings-7")])),
    ])
}

#[test]
fn the_smallest_one_is_a_deployment_that_restricted_pod_security_takes() {
    let smallest = json!({"name": "web", "namespace": "beta", "image": "web"});
    let objects = objects(&application(smallest), &ConfigSets::new(), &HostDefaults::default());
    assert_eq!(kinds(&objects), ["Deployment"]);
    let deployment = &objects[0];
    assert!(deployment["spec"].get("replicas").is_none(), "as many as there are");
    assert_eq!(deployment["spec"]["minReadySeconds"], 5);
    assert_eq!(
        deployment["spec"]["strategy"]["rollingUpdate"],
        json!({"maxSurge": "25%", "maxUnavailable": "25%"}),
        "a default that is not ours could not be taken away again"
    );
    assert_eq!(
        deployment["spec"]["template"]["spec"]["containers"][0]["imagePullPolicy"],
        "Always"
    );
    // kubernetes.io/docs/concepts/security/pod-security-standards
    let pod = &deployment["spec"]["template"]["spec"];
    assert_eq!(
        pod["securityContext"],
        json!({"seccompProfile": {"type": "RuntimeDefault"}, "runAsNonRoot": true})
    );
    assert_eq!(
        pod["containers"][0]["securityContext"],
        json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}})
    );
    assert_eq!(pod["automountServiceAccountToken"], false);
    assert_eq!(
        deployment["spec"]["selector"]["matchLabels"],
        json!({"app": "web"}),
        "the first PipeOps agent selected by it"
    );
}

#[test]
fn what_an_image_needs_beyond_that_is_said_by_the_application() {
    let rooted = json!({"name": "web", "namespace": "beta", "image": "web",
        "security": {"allow_root": true}, "service_account": "web"});
    let objects = objects(&application(rooted), &ConfigSets::new(), &HostDefaults::default());
    let pod = &objects[0]["spec"]["template"]["spec"];
    assert_eq!(pod["securityContext"], json!({"seccompProfile": {"type": "RuntimeDefault"}}));
    let context = &pod["containers"][0]["securityContext"];
    assert_eq!(
        *context,
        json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["NET_RAW"]}})
    );
    assert_eq!(
        (&pod["automountServiceAccountToken"], &pod["serviceAccountName"]),
        (&json!(true), &json!("web"))
    );
}

#[test]
fn every_field_has_its_place() {
    let defaults = HostDefaults { class: Some("nginx".into()), issuer: Some("pipeops-ca".into()) };
    let objects = objects(&full(), &sets(), &defaults);
    assert_eq!(
        kinds(&objects),
        ["Service", "Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "Ingress"]
    );
    let labels = json!({"team": "a", "app": "web", "app.kubernetes.io/name": "web",
        "app.kubernetes.io/managed-by": "pipeops", "pipeops.io/application": "web"});
    for object in &objects {
        assert_eq!(object["metadata"]["labels"], labels, "{object}");
        assert_eq!(object["metadata"]["namespace"], "production");
    }
    let ports = json!([{"name": "http", "protocol": "TCP", "port": 80, "targetPort": "http"}]);
    assert_eq!(of_kind(&objects, "Service")["spec"]["ports"], ports);
    let deployment = &of_kind(&objects, "Deployment")["spec"];
    assert!(deployment.get("minReadySeconds").is_none(), "a readiness probe says more");
    let pod = &deployment["template"]["spec"];
    assert_eq!(deployment["template"]["metadata"]["annotations"], json!({"example.com/a": "b"}));
    assert_eq!(pod["securityContext"]["fsGroup"], 1000);
    assert_eq!(pod["imagePullSecrets"], json!([{"name": "registry"}]));
    let container = &pod["containers"][0];
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
    assert_eq!(container["readinessProbe"], json!({"httpGet": {"path": "/ready", "port": 8080}}));
    assert_eq!(
        container["livenessProbe"],
        json!({"tcpSocket": {"port": 8080}, "periodSeconds": 5})
    );
    assert_eq!(container["startupProbe"], json!({"exec": {"command": ["/up"]}}));
    assert_eq!(
        of_kind(&objects, "HorizontalPodAutoscaler")["spec"]["metrics"],
        json!([{"type": "Resource", "resource": {
            "name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}
        }}])
    );
    let ingress = of_kind(&objects, "Ingress");
    assert_eq!(
        ingress["metadata"]["annotations"],
        json!({"cert-manager.io/cluster-issuer": "pipeops-ca",
            "acme.cert-manager.io/http01-edit-in-place": "true"})
    );
    assert_eq!(
        ingress["spec"],
        json!({
            "rules": [{"host": "shop.example.com", "http": {"paths": [{
                "path": "/", "pathType": "Prefix",
                "backend": {"service": {"name": "web", "port": {"number": 80}}}
            }]}}],
            "ingressClassName": "nginx",
            "tls": [{"hosts": ["shop.example.com"], "secretName": "web-tls"}]
        })
    );
}

#[test]
fn each_key_of_a_config_set_comes_from_the_object_that_holds_it() {
    let objects = objects(&full(), &sets(), &HostDefaults::default());
    let pod = &of_kind(&objects, "Deployment")["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let secret = |name: &str, object: &str, key: &str| json!({"name": name, "valueFrom": {"secretKeyRef": {"name": object, "key": key}}});
    assert_eq!(container["envFrom"], json!([{"configMapRef": {"name": "theirs"}}]), "not ours");
    assert_eq!(
        container["env"],
        json!([
            secret("password", "db-1", "password"),
            secret("url", "db-2", "url"),
            {"name": "LEVEL",
                "valueFrom": {"configMapKeyRef": {"name": "settings-7", "key": "level"}}},
            {"name": "MODE", "value": "fast"},
            secret("URL", "db-2", "url"),
        ])
    );
    assert_eq!(
        pod["volumes"],
        json!([
            {"name": "volume-0", "projected": {"sources": [
                {"secret": {"name": "db-1", "items": [{"key": "password", "path": "password"}]}},
                {"secret": {"name": "db-2", "items": [{"key": "url", "path": "url"}]}},
            ]}},
            {"name": "volume-1", "configMap": {"name": "theirs"}},
            {"name": "volume-2", "emptyDir": {}},
        ])
    );
    let named = sources(&full());
    assert_eq!(named.len(), 4, "{named:?}");
    assert_eq!(named[&ConfigSource::Secret("db".into())], ["url"]);
}

#[test]
fn data_has_one_writer_and_a_gateway_gets_a_route() {
    let stateful = application(json!({
        "name": "db", "namespace": "beta", "image": "db:1", "replicas": 1,
        "ports": [{"container_port": 5432}],
        "volumes": [{"mount_path": "/data", "name": "data", "size": "1Gi",
            "storage_class": "local-path"}],
        "host": {"name": "db.example.com", "path": "/api", "gateway": "infra/edge"}
    }));
    let objects = objects(&stateful, &ConfigSets::new(), &HostDefaults::default());
    assert_eq!(kinds(&objects), ["PersistentVolumeClaim", "Service", "Deployment", "HTTPRoute"]);
    assert_eq!(objects[0]["metadata"]["name"], "db.data");
    let deployment = &objects[2]["spec"];
    assert_eq!(deployment["strategy"], json!({"type": "Recreate"}));
    assert_eq!(
        deployment["template"]["spec"]["volumes"],
        json!([{"name": "data", "persistentVolumeClaim": {"claimName": "db.data"}}])
    );
    assert_eq!(
        objects[3]["spec"],
        json!({
            "parentRefs": [{"namespace": "infra", "name": "edge"}],
            "hostnames": ["db.example.com"],
            "rules": [{
                "matches": [{"path": {"type": "PathPrefix", "value": "/api"}}],
                "backendRefs": [{"name": "db", "port": 5432}]
            }]
        })
    );
}

#[test]
fn a_command_of_its_own_gets_the_surroundings_and_not_the_arguments() {
    let application = application(json!({
        "name": "web", "namespace": "beta", "image": "web", "command": ["/web"], "args": ["serve"],
        "ports": [{"container_port": 80}], "environment": {"MODE": "fast"},
        "probes": {"readiness": {"path": "/"}}
    }));
    let labels = json!({"job": "x"});
    let words = |command: &[&str]| -> Vec<String> {
        command.iter().map(|word| (*word).to_owned()).collect()
    };
    let template =
        job_template(&application, &labels, &ConfigSets::new(), &words(&["/migrate"]), &[]);
    assert_eq!(template["metadata"]["labels"], labels, "a Service must not find it");
    assert_eq!(template["spec"]["restartPolicy"], "Never");
    let container = &template["spec"]["containers"][0];
    assert_eq!(container["command"], json!(["/migrate"]));
    assert_eq!(container["env"], json!([{"name": "MODE", "value": "fast"}]));
    for absent in ["args", "ports", "readinessProbe"] {
        assert!(container.get(absent).is_none(), "{absent}");
    }
    let template = job_template(&application, &labels, &ConfigSets::new(), &[], &words(&["once"]));
    let container = &template["spec"]["containers"][0];
    assert_eq!((&container["command"], &container["args"]), (&json!(["/web"]), &json!(["once"])));
}
