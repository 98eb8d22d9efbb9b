//! Which cluster of a control plane is meant.

use serde_json::Value;

use crate::base::error::{Failure, nearest};

/// A cluster, as its control plane lists it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cluster {
    pub id: String,
    pub name: String,
}

/// The cluster of that id or name; without either the only one.
///
/// # Errors
/// Exit 2 with the names, where several are meant or none.
pub fn choose(items: &[Value], wanted: Option<&str>) -> Result<Cluster, Failure> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let all: Vec<Cluster> =
        items.iter().map(|c| Cluster { id: text(&c["id"]), name: text(&c["name"]) }).collect();
    let listed = |some: &[&Cluster]| {
        some.iter().map(|c| format!("{} ({})", c.name, c.id)).collect::<Vec<_>>().join(", ")
    };
    let found: Vec<&Cluster> = match wanted {
        Some(wanted) => match all.iter().find(|c| c.id == wanted) {
            Some(exactly) => vec![exactly],
            None => all.iter().filter(|c| c.name == wanted).collect(),
        },
        None => all.iter().collect(),
    };
    match (&found[..], wanted) {
        ([one], _) => Ok((*one).clone()),
        ([], _) if all.is_empty() => {
            Err(Failure::usage("CLUSTER_UNKNOWN", "this token reaches no cluster").hint(
                "a server registers with the line of `pipeops control-plane token create`; or \
                 the token is for other clusters",
            ))
        }
        ([], wanted) => {
            let wanted = wanted.unwrap_or_default();
            let what = format!("there is no cluster `{wanted}`");
            let near = nearest(wanted, all.iter().map(|c| c.name.as_str()));
            let near = near.map(|near| format!("did you mean `{near}`? ")).unwrap_or_default();
            let all: Vec<&Cluster> = all.iter().collect();
            Err(Failure::usage("CLUSTER_UNKNOWN", what)
                .why(format!("there are: {}", listed(&all)))
                .hint(format!("{near}`pipeops clusters` lists them")))
        }
        (several, Some(name)) => {
            let what = format!("{} clusters are called {name}", several.len());
            Err(Failure::usage("CLUSTER_AMBIGUOUS", what)
                .why(listed(several))
                .hint("give the id with --cluster, as `pipeops clusters` lists it"))
        }
        (several, None) => {
            let what = format!("which of {} clusters is meant?", several.len());
            Err(Failure::usage("CLUSTER_AMBIGUOUS", what).why(listed(several)).hint(
                "say --cluster NAME, as `pipeops clusters` lists it, or once for all: `pipeops \
                 contexts use CONTEXT --cluster NAME`",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_cluster_is_meant_by_its_id_its_name_or_because_it_is_the_only_one() {
        let row = |id: &str, name: &str| json!({"id": id, "name": name});
        let all = [row("c-1", "eu"), row("c-2", "us"), row("c-3", "us")];
        let id = |items: &[Value], wanted| choose(items, wanted).map(|cluster| cluster.id);
        assert_eq!(id(&all, Some("eu")).unwrap(), "c-1");
        assert_eq!(id(&all, Some("c-3")).unwrap(), "c-3");
        assert_eq!(id(&all[..1], None).unwrap(), "c-1");
        for (items, wanted, code, said) in [
            (&all[..], None, "CLUSTER_AMBIGUOUS", "eu (c-1), us (c-2), us (c-3)"),
            (&all[..], Some("us"), "CLUSTER_AMBIGUOUS", "us (c-2), us (c-3)"),
            (&all[..], Some("ue"), "CLUSTER_UNKNOWN", "did you mean"),
            (&[][..], None, "CLUSTER_UNKNOWN", "reaches no cluster"),
            (&[][..], Some("eu"), "CLUSTER_UNKNOWN", "reaches no cluster"),
        ] {
            let failure = choose(items, wanted).unwrap_err();
            assert_eq!((failure.exit.number(), failure.code.as_str()), (2, code), "{wanted:?}");
            assert!(failure.render().contains(said), "{}", failure.render());
        }
    }
}
