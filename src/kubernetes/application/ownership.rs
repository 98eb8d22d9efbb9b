//! Who owns which field of an object (kubernetes.io/docs/reference/using-api/server-side-apply).

use serde_json::{Map, Value};

/// The entries of `managedFields` in which what `manager` owns by updates is its own by applies. By
/// an update alone it would own fields that no later apply can take away. None where nothing
/// changes. As kubernetes/client-go `util/csaupgrade` does it.
///
/// Marks on pods, such as that of a restart, are not taken: the next apply would take them away, and
/// so replace the pods.
pub fn applied(entries: &[Value], manager: &str) -> Option<Vec<Value>> {
    let is_by = |entry: &Value, operation: &str| {
        entry["manager"] == manager
            && entry["operation"] == operation
            && entry["subresource"].is_null()
    };
    let updates: Vec<&Value> = entries.iter().filter(|entry| is_by(entry, "Update")).collect();
    let mut all: Vec<Value> =
        entries.iter().filter(|entry| !is_by(entry, "Update")).cloned().collect();
    let own = all.iter_mut().find(|entry| is_by(entry, "Apply"))?;
    if updates.is_empty() {
        return None;
    }
    for update in updates {
        let mut fields = update["fieldsV1"].clone();
        if let Some(template) =
            fields.pointer_mut("/f:spec/f:template").and_then(Value::as_object_mut)
        {
            template.remove("f:metadata");
        }
        if let (Some(own), Some(fields)) = (own["fieldsV1"].as_object_mut(), fields.as_object()) {
            unite(own, fields);
        }
    }
    Some(all)
}

fn unite(one: &mut Map<String, Value>, other: &Map<String, Value>) {
    for (field, below) in other {
        match (one.get_mut(field).and_then(Value::as_object_mut), below.as_object()) {
            (Some(one), Some(other)) => unite(one, other),
            (None, _) => {
                one.insert(field.clone(), below.clone());
            }
            (Some(_), None) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_was_changed_by_updates_can_be_taken_away_by_applies() {
        let entry = |manager: &str, operation: &str, fields: Value| json!({"manager": manager, "operation": operation, "fieldsV1": fields});
        let ours = entry("us", "Apply", json!({"f:spec": {"f:a": {}}}));
        let theirs = entry("them", "Update", json!({"f:spec": {"f:b": {}}}));
        let scaled = json!({"manager": "us", "operation": "Update", "subresource": "scale",
            "fieldsV1": {"f:spec": {"f:replicas": {}}}});
        let rotated = entry(
            "us",
            "Update",
            json!({"f:spec": {"f:a": {"f:name": {}}, "f:template": {
                "f:metadata": {"f:annotations": {"f:restartedAt": {}}}, "f:spec": {"f:c": {}}
            }}}),
        );
        let before = [ours.clone(), theirs.clone(), scaled.clone()];
        assert_eq!(applied(&before, "us"), None);
        assert_eq!(applied(std::slice::from_ref(&rotated), "us"), None, "nothing was applied yet");
        let before = [ours, theirs.clone(), rotated, scaled.clone()];
        let united = entry(
            "us",
            "Apply",
            json!({"f:spec": {"f:a": {"f:name": {}}, "f:template": {"f:spec": {"f:c": {}}}}}),
        );
        assert_eq!(applied(&before, "us"), Some(vec![united, theirs, scaled]));
    }
}
