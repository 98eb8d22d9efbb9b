//! What is no operation, and who may ask for one.

use serde_json::json;

use super::*;

fn caller(role: Role, namespaces: Option<&[&str]>) -> Caller {
    let namespaces = namespaces.map(|n| n.iter().map(|s| (*s).to_owned()).collect());
    Caller {
        subject: "r-1".into(),
        role,
        namespaces,
        tenant: None,
        token_id: "t".into(),
        operation: None,
    }
}

fn verdict(text: &str) -> Result<&'static str, String> {
    OperationRequest::parse(text.as_bytes(), &caller(Role::Operator, None))
        .map(|w| w.kind())
        .map_err(|(_, code, why)| format!("{code}: {why}"))
}

#[test]
fn what_is_no_operation_is_refused_by_name() {
    let web = r#"{"apiVersion":"apps/v1","kind":"Deployment","name":"web","namespace":"beta"}"#;
    assert_eq!(
        verdict(&format!(r#"{{"kind":"scale","spec":{{"object":{web},"replicas":3}}}}"#)),
        Ok("scale")
    );
    assert_eq!(
        verdict(concat!(
            r#"{"kind":"apply","spec":{"objects":[{"apiVersion":"v1","kind":"ConfigMap","#,
            r#""metadata":{"name":"c","namespace":"b"}}]}}"#
        )),
        Ok("apply")
    );
    for (text, expected) in [
        ("", "no operation"),
        ("[]", "no operation"),
        (r#"{"kind":"dance","spec":{}}"#, "unknown variant `dance`"),
        (r#"{"kind":"apply","spec":{"objects":[]}}"#, "1 to 200"),
        (r#"{"kind":"apply","spec":{"objects":[{}]}}"#, "without apiVersion"),
        (r#"{"kind":"apply","spec":{"objects":[],"colour":"red"}}"#, "unknown field `colour`"),
        (
            concat!(
                r#"{"kind":"apply","spec":{"objects":[{"apiVersion":"v1","kind":"Pod","#,
                r#""metadata":{"name":"../x"}}]}}"#
            ),
            "characters",
        ),
        (
            concat!(
                r#"{"kind":"apply","spec":{"objects":[{"apiVersion":"a/b/c","kind":"Pod","#,
                r#""metadata":{"name":"x"}}]}}"#
            ),
            "characters",
        ),
        (
            concat!(
                r#"{"kind":"delete","spec":{"objects":["#,
                r#"{"apiVersion":"v1","kind":"Pod","name":".."}]}}"#
            ),
            "characters",
        ),
        (
            concat!(
                r#"{"kind":"restart","spec":{"object":{"apiVersion":"v1","kind":"Pod","#,
                r#""name":"p","namespace":"b"}}}"#
            ),
            "can be restarted",
        ),
        (r#"{"kind":"cordon","spec":{"node":"a/b"}}"#, "name of a node"),
    ] {
        let said = verdict(text).unwrap_err();
        assert!(said.contains(expected), "{text}: {said}");
    }
    // whatever is wrong with a value, it is not quoted
    for (spec, expected) in [
        (r#""planted-canary-2231-in-plain-text""#, "invalid type: string"),
        (r#"{"data":"planted-canary-2231-in-plain-text"}"#, "invalid type: string"),
        (r#"{"data":{"a":22317713982231771}}"#, "invalid type: integer, expected a string"),
        (r#"{"data":{"a":"x"},"wait":"planted-canary-2231-in-plain-text"}"#, "a boolean"),
        (r#"{"data":{"a":"x"},"timeout_s":0}"#, "timeout_s is 1 to 3600"),
        (r#"{"data":{"a b":"planted-canary-2231-in-plain-text"}}"#, "data: `a b` is no key"),
        (r#"{"data":{"a":"x"},"dat":{}}"#, "unknown field `dat`"),
    ] {
        let head = r#"{"action":"set","namespace":"beta","name":"db","#;
        let spec = spec.strip_prefix('{').map_or(spec.to_owned(), |s| format!("{head}{s}"));
        for kind in ["secret", "configmap"] {
            let said = verdict(&format!(r#"{{"kind":"{kind}","spec":{spec}}}"#)).unwrap_err();
            assert!(said.contains(expected), "{spec}: {said}");
            assert!(!said.contains("2231-in-plain-text"), "{spec}: {said}");
        }
    }
    let long = format!(r#"{{"kind":"restart","spec":{{"object":{web},"timeout_s":0}}}}"#);
    assert!(verdict(&long).unwrap_err().contains("1 to 3600"));
    for (role, namespaces) in [(Role::Deployer, None), (Role::Operator, Some(&["beta"][..]))] {
        for kind in ["cordon", "uncordon", "drain", "remove"] {
            let request = format!(r#"{{"kind":"{kind}","spec":{{"node":"n"}}}}"#);
            let refused = OperationRequest::parse(request.as_bytes(), &caller(role, namespaces))
                .map(|_| ())
                .unwrap_err();
            assert_eq!((refused.0, refused.1), (403, "role_exceeded"), "{kind}");
        }
    }
}

#[test]
fn a_tenant_is_for_operators_of_the_whole_cluster() {
    let set = r#"{"kind":"tenant","spec":{"action":"set","tenant":"a","namespaces":["a"]}}"#;
    let delete = r#"{"kind":"tenant","spec":{"action":"delete","tenant":"a","confirm":"a"}}"#;
    for request in [set, delete] {
        assert_eq!(verdict(request), Ok("tenant"));
        let of_tenant = Caller { tenant: Some("a".into()), ..caller(Role::Operator, None) };
        for refused in
            [caller(Role::Deployer, None), caller(Role::Operator, Some(&["a"])), of_tenant.clone()]
        {
            let end = OperationRequest::parse(request.as_bytes(), &refused).err().unwrap();
            assert_eq!((end.0, end.1), (403, "role_exceeded"), "{refused:?}");
        }
        let cordon = r#"{"kind":"cordon","spec":{"node":"n"}}"#;
        assert!(OperationRequest::parse(cordon.as_bytes(), &of_tenant).is_err());
    }
    let said = verdict(&delete.replace(r#""confirm":"a""#, r#""confirm":"b""#)).unwrap_err();
    assert!(said.contains("spec.confirm"), "{said}");
    let parsed = OperationRequest::parse(set.as_bytes(), &caller(Role::Operator, None));
    let parsed = parsed.map_err(|(_, _, why)| why).unwrap();
    assert_eq!((parsed.is_resumable(), parsed.timeout_s()), (true, 300));
    // one at a time changes a tenant
    assert_eq!(parsed.application().as_deref(), Some("Tenant a"));
}

#[test]
fn what_holds_values_of_a_secret_is_not_resumed() {
    let applied = |object: Value| {
        let mut object = object;
        object["apiVersion"] = "v1".into();
        object["metadata"] = json!({"name": "x"});
        let request = json!({"kind": "apply", "spec": {"objects": [object], "timeout_s": 7}});
        let parsed =
            OperationRequest::parse(request.to_string().as_bytes(), &caller(Role::Deployer, None));
        let parsed = parsed.map_err(|(_, _, why)| why).unwrap();
        assert_eq!(parsed.timeout_s(), 7);
        parsed.is_resumable()
    };
    let inner = json!({"kind": "Secret", "stringData": {"a": "b"}});
    let reference = json!({"kind": "Secret", "name": "tls"});
    for (object, resumable) in [
        (json!({"kind": "ConfigMap", "data": {"a": "b"}}), true),
        (json!({"kind": "Secret", "data": {"a": "b"}}), false),
        (json!({"kind": "Secret"}), false),
        (json!({"kind": "List", "items": []}), false),
        (json!({"kind": "SecretList"}), false),
        (json!({"kind": "Wrapped", "spec": {"manifests": [inner]}}), false),
        // a reference names it and holds nothing of it
        (json!({"kind": "Gateway", "spec": {"certificateRefs": [reference]}}), true),
    ] {
        assert_eq!(applied(object.clone()), resumable, "{object}");
    }
    for kind in ["cordon", "uncordon", "drain", "remove"] {
        let request = format!(r#"{{"kind":"{kind}","spec":{{"node":"n"}}}}"#);
        let parsed = OperationRequest::parse(request.as_bytes(), &caller(Role::Operator, None));
        let parsed = parsed.map_err(|(_, _, why)| why).unwrap();
        assert_eq!((parsed.kind(), parsed.is_resumable()), (kind, true));
        assert_eq!(parsed.timeout_s(), 300);
    }
}

#[test]
fn what_is_no_application_is_refused_with_its_field() {
    for (text, expected) in [
        (
            r#"{"kind":"deploy","spec":{"application":{"name":"web","replicas":"3"}}}"#,
            "spec.application.replicas: ",
        ),
        (
            r#"{"kind":"deploy","spec":{"application":{"ports":[{"container_port":70000}]}}}"#,
            "spec.application.ports[0].container_port: ",
        ),
        (r#"{"kind":"deploy","spec":{"application":{"name":"Web"}}}"#, "spec.application.name: "),
        (r#"{"kind":"deploy","spec":{"application":{},"wait":true}}"#, "unknown field `wait`"),
        (r#"{"kind":"rollback","spec":{"namespace":"a/b","name":"web"}}"#, "spec.namespace: "),
        (r#"{"kind":"delete_application","spec":{"namespace":"b","name":""}}"#, "spec.name: "),
        (r#"{"kind":"job","spec":{"namespace":"b"}}"#, "spec.name: "),
        (r#"{"kind":"job","spec":{"namespace":"b","cronjob":"c","args":["x"]}}"#, "one of"),
        (
            concat!(
                r#"{"kind":"cronjob","spec":{"schedule":" ","application":"#,
                r#"{"name":"c","namespace":"b","image":"i"}}}"#
            ),
            "spec.schedule: ",
        ),
        (r#"{"kind":"drain","spec":{"node":"a/b"}}"#, "name of a node"),
        (r#"{"kind":"drain","spec":{"node":"n","grace_period_s":0}}"#, "1 to 3600"),
        (r#"{"kind":"drain","spec":{"node":"n","evict":true}}"#, "unknown field `evict`"),
        (r#"{"kind":"remove","spec":{"node":".."}}"#, "name of a node"),
    ] {
        let said = verdict(text).unwrap_err();
        assert!(said.contains(expected), "{text}: {said}");
    }
}
