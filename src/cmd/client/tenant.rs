//! `tenant`: customers with a place of their own in a cluster.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::apps::show;
use super::operation::{Request, options_of, tell};
use super::{Context, Session, cell, printer};
use crate::base::error::{Exit, Failure};
use crate::base::text::is_dns_label;
use crate::cli::{ClusterArgs, FollowArgs, OutputArgs, TenantArgs, TenantCommand};
use crate::client::applications::ClusterReader;
use crate::client::tenants::{self, Tenant, TenantNamespace};
use crate::output::table;

/// # Errors
/// What the control plane or the cluster refuses; exit 11 for a tenant that nobody confirms; as an
/// operation ends.
pub(super) async fn tenant(context: &Context, command: TenantCommand) -> anyhow::Result<Exit> {
    match command {
        TenantCommand::Set(args) => set(context, &args).await,
        TenantCommand::List { cluster, output } => list(context, &cluster, &output).await,
        TenantCommand::Show { name, cluster, output } => {
            show_one(context, &name, &cluster, &output).await
        }
        TenantCommand::Delete { name, yes, timeout, follow, cluster } => {
            delete(context, &name, (yes, timeout), &follow, &cluster).await
        }
    }
}

/// The name of a tenant in a path or a question.
fn checked(name: &str) -> Result<&str, Failure> {
    if is_dns_label(name) && name.len() <= 40 {
        return Ok(name);
    }
    Err(Failure::usage("BAD_NAME", format!("`{name}` is no name of a tenant"))
        .hint("a tenant has 1 to 40 lower-case letters, digits and -, as in acme"))
}

async fn set(context: &Context, args: &TenantArgs) -> anyhow::Result<Exit> {
    let session = Session::open(context, args.cluster.context.as_deref())?;
    let request = request(&session, checked(&args.name)?, spec_of(args), &args.cluster).await?;
    let done = format!("{}: {}", args.name, args.namespace.join(", "));
    carry_out(&session, &request, &args.follow, done).await
}

/// What an operation is asked for.
fn spec_of(args: &TenantArgs) -> Value {
    let quota: BTreeMap<&str, &Value> = args.quota.iter().map(|(k, v)| (*k, v)).collect();
    json!({
        "action": "set", "tenant": args.name, "namespaces": args.namespace, "quota": quota,
        "pod_security": args.pod_security, "hosts": args.host, "egress": args.egress,
        "remove_namespaces": args.remove_namespace, "timeout_s": args.timeout,
    })
}

async fn delete(
    context: &Context,
    name: &str,
    (yes, timeout): (bool, u64),
    follow: &FollowArgs,
    args: &ClusterArgs,
) -> anyhow::Result<Exit> {
    let session = Session::open(context, args.context.as_deref())?;
    let spec = json!({"action": "delete", "tenant": name, "confirm": name, "timeout_s": timeout});
    let request = request(&session, checked(name)?, spec, args).await?;
    if !yes {
        let place = &request.cluster.name;
        let what = format!("delete the tenant {name} on {place} with all data in its namespaces");
        let question = format!("to {what}, type its name:");
        let unasked = format!("to {what}, run again with --yes");
        let mut printer = printer(context, &follow.output);
        context.confirm_by(&mut printer, &question, &unasked, |typed| typed == name).await?;
    }
    carry_out(&session, &request, follow, format!("{name}: deleted")).await
}

async fn request(
    session: &Session<'_>,
    name: &str,
    spec: Value,
    args: &ClusterArgs,
) -> anyhow::Result<Request> {
    Ok(Request {
        cluster: session.cluster(args.cluster.as_deref()).await?,
        title: name.to_owned(),
        kind: "tenant",
        timeout_s: spec["timeout_s"].as_u64().unwrap_or_default(),
        spec,
        look: format!("pipeops tenant show {name}{}", options_of(args)),
    })
}

async fn carry_out(
    session: &Session<'_>,
    request: &Request,
    follow: &FollowArgs,
    done: String,
) -> anyhow::Result<Exit> {
    let mut printer = printer(session.context, &follow.output);
    match request.carry_out(session, &mut printer, follow, tell).await? {
        None => Ok(Exit::Done),
        Some(operation) => request.conclude(&printer, follow, &operation, &[done]),
    }
}

async fn list(context: &Context, args: &ClusterArgs, output: &OutputArgs) -> anyhow::Result<Exit> {
    let session = Session::open(context, args.context.as_deref())?;
    let own = session.login.tenant.as_deref();
    let found = read(&session, own, args).await?;
    let rows: Vec<Vec<String>> = found.iter().flat_map(rows_of).collect();
    let items: Vec<Value> = found.iter().map(|tenant| json!(tenant)).collect();
    let head = ["TENANT", "NAMESPACE", "POD SECURITY", "CPU", "MEMORY", "PODS", "HOSTS"];
    show(&printer(context, output), &items, &head, &rows);
    Ok(Exit::Done)
}

async fn read(
    session: &Session<'_>,
    tenant: Option<&str>,
    args: &ClusterArgs,
) -> anyhow::Result<Vec<Tenant>> {
    let cluster = session.cluster(args.cluster.as_deref()).await?;
    let reader = ClusterReader { api: &session.api, cluster: &cluster.id };
    session.context.unless_stopped(tenants::tenants(&reader, tenant)).await
}

/// One row for each namespace.
fn rows_of(tenant: &Tenant) -> Vec<Vec<String>> {
    let hosts: Vec<&str> = tenant.hosts.iter().map(String::as_str).collect();
    let row = |namespace: &TenantNamespace| {
        let used = |name: &str| match namespace.quota.get(name) {
            Some(quantity) => format!("{}/{}", quantity.used, quantity.hard),
            None => "-".into(),
        };
        let text = |text: &str| cell(&json!(text));
        vec![
            text(&tenant.name),
            text(&namespace.name),
            text(&namespace.pod_security),
            used("requests.cpu"),
            used("limits.memory"),
            used("pods"),
            text(&hosts.join(",")),
        ]
    };
    tenant.namespaces.iter().map(row).collect()
}

async fn show_one(
    context: &Context,
    name: &str,
    args: &ClusterArgs,
    output: &OutputArgs,
) -> anyhow::Result<Exit> {
    checked(name)?;
    let session = Session::open(context, args.context.as_deref())?;
    let found = read(&session, Some(name), args).await?;
    let printer = printer(context, output);
    for tenant in &found {
        printer.document(tenant);
        lines_of(tenant).iter().for_each(|line| printer.data(line));
    }
    Ok(Exit::Done)
}

fn lines_of(tenant: &Tenant) -> Vec<String> {
    let hosts: Vec<&str> = tenant.hosts.iter().map(String::as_str).collect();
    let mut lines = vec![
        format!("tenant     {}", tenant.name),
        format!("hosts      {}", cell(&json!(hosts.join(", ")))),
    ];
    for namespace in &tenant.namespaces {
        let level = cell(&json!(namespace.pod_security));
        lines.push(String::new());
        lines.push(format!("{} (Pod Security {level})", namespace.name));
        let quota = &namespace.quota;
        let rows: Vec<Vec<String>> = quota
            .iter()
            .map(|(name, quantity)| {
                vec![name.clone(), quantity.used.clone(), quantity.hard.clone()]
            })
            .collect();
        if !rows.is_empty() {
            let text = table(&["QUOTA", "USED", "HARD"], &rows);
            lines.extend(text.lines().map(str::to_owned));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, ClientCommand, Command};
    use crate::client::tenants::QuotaUse;

    fn parsed(args: &[&str]) -> Result<TenantCommand, clap::Error> {
        let args = [&["pipeops", "tenant"][..], args].concat();
        Cli::try_parse_from(args).map(|cli| match cli.command {
            Command::Client(ClientCommand::Tenant(command)) => command,
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn the_arguments_are_the_spec_of_an_operation() {
        let spec = |args: &[&str]| match parsed(args).unwrap() {
            TenantCommand::Set(args) => spec_of(&args),
            other => panic!("{other:?}"),
        };
        let all = spec(&[
            "set",
            "acme",
            "--namespace",
            "acme,acme-2",
            "-n",
            "acme-3",
            "--quota",
            "cpu=2,memory=4Gi,pods=50,load-balancers=1",
            "--pod-security",
            "restricted",
            "--host",
            "shop.acme.com",
            "--host",
            "*.acme.com",
            "--egress",
            "10.0.0.0/24",
            "--remove-namespace",
            "old",
        ]);
        assert_eq!(
            all,
            json!({"action": "set", "tenant": "acme", "namespaces": ["acme", "acme-2", "acme-3"],
                "quota": {"cpu": "2", "memory": "4Gi", "pods": 50, "load_balancers": 1},
                "pod_security": "restricted", "hosts": ["shop.acme.com", "*.acme.com"],
                "egress": ["10.0.0.0/24"], "remove_namespaces": ["old"], "timeout_s": 300})
        );
        let little = spec(&["set", "acme", "-n", "acme"]);
        assert_eq!((&little["quota"], &little["hosts"]), (&json!({}), &json!([])));
        assert_eq!(little["pod_security"], "baseline");
        for wrong in [
            &["set", "acme"][..],
            &["set", "acme", "-n", "a", "--quota", "disk=1Gi"],
            &["set", "acme", "-n", "a", "--pod-security", "privileged"],
        ] {
            assert!(parsed(wrong).is_err(), "{wrong:?}");
        }
        assert!(checked(&"a".repeat(41)).is_err() && checked("Acme").is_err());
    }

    #[test]
    fn a_tenant_is_shown_with_what_it_uses() {
        let quantity = |used: &str, hard: &str| QuotaUse { used: used.into(), hard: hard.into() };
        let namespace = |name: &str, quota: &[(&str, QuotaUse)]| TenantNamespace {
            name: name.into(),
            pod_security: "baseline".into(),
            quota: quota.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect(),
        };
        let quota = [("pods", quantity("3", "50")), ("requests.cpu", quantity("500m", "2"))];
        let tenant = Tenant {
            name: "acme".into(),
            hosts: ["b.example", "a.example"].map(str::to_owned).into(),
            namespaces: vec![namespace("shop", &quota), namespace("free", &[])],
        };
        let rows = rows_of(&tenant);
        let first = ["acme", "shop", "baseline", "500m/2", "-", "3/50", "a.example,b.example"];
        assert_eq!(rows[0], first);
        assert_eq!(rows[1][3..6], ["-", "-", "-"]);
        let text = lines_of(&tenant).join("\n");
        for line in ["hosts      a.example, b.example\n", "\nshop (Pod Security baseline)\n"] {
            assert!(text.contains(line), "{text}");
        }
        assert!(text.contains("\nrequests.cpu   500m   2"), "{text}");
    }
}
