//! `deploy`, `rollback`, `restart`, `scale` and `delete`: an operation is asked for and followed.

use serde_json::{Value, json};

use super::operation::{Request, look_at, tell};
use super::{Context, Session, checked_name, namespace_needed, printer, rollout};
use crate::base::error::{Exit, Failure};
use crate::cli::{ClusterArgs, DeployArgs, OperationArgs, RolloutArgs};
use crate::client::application_file::{self, ApplicationFile};
use crate::client::clusters::Cluster;
use crate::contract::application::Variable;
use crate::contract::types::Operation;
use crate::host::Host;
use crate::host::user_files::unreadable;

/// # Errors
/// Exit 2 for a file that describes no application; else as the operation ends.
pub(super) async fn deploy(context: &Context, args: DeployArgs) -> anyhow::Result<Exit> {
    let ApplicationFile { mut application, cluster } = read(&args)?;
    let reach = &args.operation.reach;
    let session = Session::open(context, reach.cluster.context.as_deref())?;
    let mut place = reach.cluster.clone();
    place.cluster = place.cluster.or(cluster);
    if let Some(namespace) = &reach.namespace {
        application.namespace.clone_from(namespace);
    } else if application.namespace.is_empty() {
        application.namespace = session.login.namespace.clone().unwrap_or_default();
    }
    if application.namespace.is_empty() {
        let hint = format!("say -n NAMESPACE, or `namespace = \"…\"` in {}", args.file);
        if args.rollout.is_given() {
            return Err(namespace_needed(&hint).into());
        }
        application.namespace = session.only_namespace(place.cluster.as_deref(), &hint).await?;
    }
    application.check().map_err(|why| {
        Failure::usage("APPLICATION_INVALID", format!("{}: {why}", args.file))
            .hint("the README lists the fields under Applications")
    })?;
    let cluster = match args.rollout.is_given() {
        true => Cluster::default(),
        false => session.cluster(place.cluster.as_deref()).await?,
    };
    let request = Request {
        cluster,
        title: format!("{}/{}", application.namespace, application.name),
        look: look(&application.namespace, &application.name, &place, &args.rollout),
        kind: "deploy",
        timeout_s: args.operation.timeout,
        spec: json!({
            "application": application, "dry_run": args.dry_run, "take_over": args.take_over,
            "auto_rollback": args.auto_rollback, "timeout_s": args.operation.timeout,
        }),
    };
    carry_out(&session, &request, (&args.operation, &args.rollout)).await
}

/// The command that shows how far it is.
fn look(namespace: &str, name: &str, place: &ClusterArgs, rollout: &RolloutArgs) -> String {
    match rollout.is_given() {
        true => rollout::look(place.context.as_deref()),
        false => look_at(namespace, name, place),
    }
}

/// The file, and what the command line says in its place.
fn read(args: &DeployArgs) -> anyhow::Result<ApplicationFile> {
    let host = Host::new("/", None);
    let text = host.read_user_file(&args.file).map_err(|e| unreadable(&args.file, &e))?;
    let mut file = application_file::parse(&text, &args.file)?;
    if let Some(image) = &args.image {
        file.application.image.clone_from(image);
    }
    for pair in &args.set_env {
        let Some((name, value)) = pair.split_once('=') else {
            let what = format!("--set-env {pair}: a variable is NAME=VALUE");
            return Err(Failure::usage("APPLICATION_INVALID", what).into());
        };
        let value = Variable::Text(value.to_owned());
        file.application.environment.insert(name.to_owned(), value);
    }
    Ok(file)
}

/// # Errors
/// As the operation ends.
pub(super) async fn rollback(
    context: &Context,
    name: &str,
    (to, with_secrets, take_over): (Option<u32>, bool, bool),
    args: (&OperationArgs, &RolloutArgs),
) -> anyhow::Result<Exit> {
    let (session, mut request) = found(context, name, "rollback", args).await?;
    request.spec["with_secrets"] = with_secrets.into();
    request.spec["take_over"] = take_over.into();
    if let Some(to) = to {
        request.spec["revision"] = to.into();
    }
    carry_out(&session, &request, args).await
}

/// # Errors
/// As the operation ends.
pub(super) async fn restart(
    context: &Context,
    name: &str,
    args: (&OperationArgs, &RolloutArgs),
) -> anyhow::Result<Exit> {
    let (session, mut request) = found(context, name, "restart", args).await?;
    request.spec = of_deployment(&request.spec);
    carry_out(&session, &request, args).await
}

/// # Errors
/// As the operation ends.
pub(super) async fn scale(
    context: &Context,
    name: &str,
    pods: u32,
    args: (&OperationArgs, &RolloutArgs),
) -> anyhow::Result<Exit> {
    let (session, mut request) = found(context, name, "scale", args).await?;
    request.spec = of_deployment(&request.spec);
    request.spec["replicas"] = pods.into();
    carry_out(&session, &request, args).await
}

/// The spec of an operation that knows objects, and no applications.
fn of_deployment(spec: &Value) -> Value {
    json!({
        "object": {
            "apiVersion": "apps/v1", "kind": "Deployment", "namespace": spec["namespace"],
            "name": spec["name"],
        },
        "timeout_s": spec["timeout_s"],
    })
}

/// # Errors
/// Exit 11 where data would go, or many clusters are meant, and nobody says yes; else as the
/// operation ends.
pub(super) async fn delete(
    context: &Context,
    name: &str,
    (volumes, yes): (bool, bool),
    args: (&OperationArgs, &RolloutArgs),
) -> anyhow::Result<Exit> {
    let (session, mut request) = found(context, name, "delete_application", args).await?;
    request.spec["volumes"] = volumes.into();
    let (operation, many) = args;
    let data = if volumes { " with all data of its volumes" } else { "" };
    let (clusters, place) = match many.is_given() && !yes {
        true => {
            let clusters = rollout::meant(&session, many).await?;
            let place = match clusters.len() {
                1 => "1 cluster".to_owned(),
                count => format!("{count} clusters"),
            };
            (Some(clusters), place)
        }
        false => (None, request.cluster.name.clone()),
    };
    if !yes && (volumes || many.is_given()) {
        let what = format!("delete {} on {place}", request.title);
        let question = format!("{what}{data}?");
        let unasked = format!("to {what}{data}, run again with --yes");
        let mut printer = printer(context, &operation.follow.output);
        context.confirm(&mut printer, &question, &unasked).await?;
    }
    if many.is_given() {
        let how = (many, &operation.follow);
        return rollout::carry_out(&session, &request, clusters, how).await;
    }
    carry_out(&session, &request, args).await
}

/// A change of an application that is there: its spec names the application and the time for it.
/// On many clusters it is not looked for.
///
/// # Errors
/// Exit 2 for many clusters without a namespace.
pub(super) async fn found<'a>(
    context: &'a Context,
    name: &str,
    kind: &'static str,
    (args, many): (&OperationArgs, &RolloutArgs),
) -> anyhow::Result<(Session<'a>, Request)> {
    checked_name(name)?;
    let session = Session::open(context, args.reach.cluster.context.as_deref())?;
    let (cluster, namespace) = match many.is_given() {
        true => {
            let namespace = session.namespace(args.reach.namespace.as_deref())?;
            let hint = "on many clusters it is not looked for: say -n NAMESPACE";
            let namespace = namespace.ok_or_else(|| namespace_needed(hint))?;
            (Cluster::default(), namespace.to_owned())
        }
        false => session.find(name, &args.reach).await?,
    };
    let request = Request {
        cluster,
        title: format!("{namespace}/{name}"),
        kind,
        spec: json!({"namespace": namespace, "name": name, "timeout_s": args.timeout}),
        timeout_s: args.timeout,
        look: look(&namespace, name, &args.reach.cluster, many),
    };
    Ok((session, request))
}

/// Carries it out, and ends as it ended.
async fn carry_out(
    session: &Session<'_>,
    request: &Request,
    (args, many): (&OperationArgs, &RolloutArgs),
) -> anyhow::Result<Exit> {
    if many.is_given() {
        return rollout::carry_out(session, request, None, (many, &args.follow)).await;
    }
    let mut printer = printer(session.context, &args.follow.output);
    match request.carry_out(session, &mut printer, &args.follow, tell).await? {
        None => Ok(Exit::Done),
        Some(operation) => {
            request.conclude(&printer, &args.follow, &operation, &summary(request, &operation))
        }
    }
}

/// What has come of it, on standard output.
fn summary(request: &Request, operation: &Operation) -> Vec<String> {
    let title = &request.title;
    if request.spec["dry_run"] == true {
        let would =
            |o: &crate::contract::types::ObjectOutcome| format!("{} {}", o.object, o.outcome);
        return operation.objects.iter().map(would).collect();
    }
    let revision = operation.revision.map(|n| format!("revision {n}")).unwrap_or_default();
    vec![match request.kind {
        "deploy" => format!("{title}: {revision} runs"),
        "rollback" => format!("{title}: runs as {revision}"),
        "restart" => format!("{title}: restarted"),
        "scale" => format!("{title}: {} pods", request.spec["replicas"]),
        _ => format!("{title}: deleted"),
    }]
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, ClientCommand, Command};
    use crate::client::clusters::Cluster;
    use crate::contract::types::ObjectOutcome;

    #[test]
    fn the_command_line_stands_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("app.toml").display().to_string();
        let text = "name = \"web\"\nimage = \"web:1\"\n[environment]\nMODE = \"slow\"\n";
        Host::new("/", None).write_user_file(&path, text).unwrap();
        let parsed = |more: &[&str]| {
            let args = [&["pipeops", "deploy", &path][..], more].concat();
            match Cli::try_parse_from(args).unwrap().command {
                Command::Client(ClientCommand::Deploy(args)) => read(&args),
                other => panic!("{other:?}"),
            }
        };
        let more = ["--image", "web:2", "--set-env", "MODE=fast", "--set-env", "X=a=b"];
        let application = parsed(&more).unwrap().application;
        assert_eq!(application.image, "web:2");
        let text = |value: &str| Variable::Text(value.into());
        assert_eq!(application.environment["MODE"], text("fast"));
        assert_eq!(application.environment["X"], text("a=b"));
        assert_eq!(parsed(&[]).unwrap().application.image, "web:1");
        let wrong = Failure::from_error(&parsed(&["--set-env", "MODE"]).unwrap_err());
        assert_eq!((wrong.exit, wrong.code.as_str()), (Exit::Usage, "APPLICATION_INVALID"));
    }

    #[test]
    fn the_last_line_says_what_has_come_of_it() {
        let request = |kind, spec| Request {
            cluster: Cluster { id: "c-1".into(), name: "eu".into() },
            title: "beta/web".into(),
            kind,
            spec,
            timeout_s: 300,
            look: String::new(),
        };
        let operation = Operation {
            revision: Some(4),
            objects: vec![ObjectOutcome {
                object: "Deployment beta/web".into(),
                outcome: "applied".into(),
            }],
            ..Operation::default()
        };
        for (kind, spec, said) in [
            ("deploy", json!({}), "beta/web: revision 4 runs"),
            ("deploy", json!({"dry_run": true}), "Deployment beta/web applied"),
            ("rollback", json!({}), "beta/web: runs as revision 4"),
            ("restart", json!({}), "beta/web: restarted"),
            ("scale", json!({"replicas": 3}), "beta/web: 3 pods"),
            ("delete_application", json!({}), "beta/web: deleted"),
        ] {
            assert_eq!(summary(&request(kind, spec), &operation), [said]);
        }
    }
}
