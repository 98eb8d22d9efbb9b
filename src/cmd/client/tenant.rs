//! `tenant`: customers with a place of their own in a cluster.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::apps::show;
use super::operation::{Request, options_of, tell};
use super::tenant_change::{line_that_sets, losses, spec_of};
use super::{Context, Session, cell, printer};
use crate::base::error::{Exit, Failure};
use crate::cli::{ClusterArgs, FollowArgs, OutputArgs, TenantArgs, TenantCommand};
use crate::client::applications::ClusterReader;
use crate::client::clusters::Cluster;
use crate::client::tenants::{self, Tenant, TenantNamespace};
use crate::contract::tenant::is_tenant_name;
use crate::output::{Printer, table};

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
    if is_tenant_name(name) {
        return Ok(name);
    }
    Err(Failure::usage("BAD_NAME", format!("`{name}` is no name of a tenant"))
        .hint("a tenant has 1 to 40 lower-case letters, digits and -, as in acme"))
}

async fn set(context: &Context, args: &TenantArgs) -> anyhow::Result<Exit> {
    let session = Session::open(context, args.cluster.context.as_deref())?;
    let request = request(&session, checked(&args.name)?, spec_of(args), &args.cluster).await?;
    if let Some(there) = one(&session, &request.cluster, &args.name).await? {
        let mut printer = printer(context, &args.follow.output);
        agree(context, &mut printer, args, &there, &request.cluster.name).await?;
    }
    let done = format!("{}: {}", args.name, args.namespace.join(", "));
    carry_out(&session, &request, &args.follow, done).await
}

/// Says what a request takes away, and asks where somebody has to mean it.
///
/// # Errors
/// Exit 11, where nobody does.
async fn agree(
    context: &Context,
    printer: &mut Printer,
    args: &TenantArgs,
    there: &Tenant,
    place: &str,
) -> anyhow::Result<()> {
    let name = &args.name;
    let losses = losses(there, args);
    if !losses.is_empty() {
        printer.say(&format!("for the tenant {name} on {place} this takes away or loosens:"));
        losses.iter().for_each(|line| printer.say(&format!("  {line}")));
    }
    let names = there.namespaces.iter().map(|namespace| &*namespace.name);
    let gone: Vec<&str> =
        names.filter(|name| args.remove_namespace.iter().any(|gone| gone == name)).collect();
    if args.yes || (gone.is_empty() && losses.is_empty()) {
        return Ok(());
    }
    if gone.is_empty() {
        let unasked = "to change it so, run again with --yes";
        return context.confirm(printer, "change it so?", unasked).await;
    }
    let gone = gone.join(", ");
    let what = format!("delete {gone} of the tenant {name} on {place} with all data in there");
    let question = format!("to {what}, type the name of the tenant:");
    let unasked = format!("to {what}, run again with --yes");
    context.confirm_by(printer, &question, &unasked, |typed| typed == name).await
}

async fn delete(
    context: &Context,
    name: &str,
    (yes, timeout): (bool, u64),
    follow: &FollowArgs,
    args: &ClusterArgs,
) -> anyhow::Result<Exit> {
    let session = Session::open(context, args.context.as_deref())?;
    let mut printer = printer(context, &follow.output);
    let spec = json!({"action": "delete", "tenant": name, "confirm": name, "timeout_s": timeout});
    let request = request(&session, checked(name)?, spec, args).await?;
    let found = one(&session, &request.cluster, name).await?;
    let found = found.ok_or_else(|| tenants::unknown(name))?;
    if !yes {
        let names: Vec<&str> = found.namespaces.iter().map(|place| &*place.name).collect();
        let (names, place) = (names.join(", "), &request.cluster.name);
        let what = format!(
            "delete the tenant {name} on {place}: {names} with all data in there, while its \
             tokens stay valid"
        );
        let question = format!("to {what}, type its name:");
        let unasked = format!("to {what}, run again with --yes");
        context.confirm_by(&mut printer, &question, &unasked, |typed| typed == name).await?;
    }
    let ended = carry_out(&session, &request, follow, format!("{name}: deleted")).await?;
    printer.say(&format!(
        "tokens of {name} stay valid, also for a later tenant of that name: `pipeops \
         control-plane user list` and `runner list` show them, `revoke` ends one"
    ));
    Ok(ended)
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
    let cluster = session.cluster(args.cluster.as_deref()).await?;
    let found = read(&session, &cluster, own).await?;
    if let Some(own) = own.filter(|_| found.is_empty()) {
        return Err(tenants::unknown(own).into());
    }
    let rows: Vec<Vec<String>> = found.iter().flat_map(rows_of).collect();
    let items: Vec<Value> = found.iter().map(|tenant| json!(tenant)).collect();
    let head = ["TENANT", "NAMESPACE", "POD SECURITY", "CPU", "MEMORY", "PODS", "HOSTS"];
    show(&printer(context, output), &items, &head, &rows);
    Ok(Exit::Done)
}

async fn read(
    session: &Session<'_>,
    cluster: &Cluster,
    tenant: Option<&str>,
) -> anyhow::Result<Vec<Tenant>> {
    let reader = ClusterReader { api: &session.api, cluster: &cluster.id };
    session.context.unless_stopped(tenants::tenants(&reader, tenant)).await
}

/// A tenant, where the cluster has a namespace of it.
async fn one(
    session: &Session<'_>,
    cluster: &Cluster,
    name: &str,
) -> anyhow::Result<Option<Tenant>> {
    Ok(read(session, cluster, Some(name)).await?.into_iter().next())
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
            if namespace.terminating {
                format!("{} (Terminating)", namespace.name)
            } else {
                text(&namespace.name)
            },
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
    let cluster = session.cluster(args.cluster.as_deref()).await?;
    let tenant = one(&session, &cluster, name).await?.ok_or_else(|| tenants::unknown(name))?;
    let printer = printer(context, output);
    printer.document(&tenant);
    lines_of(&tenant).iter().for_each(|line| printer.data(line));
    if let Some(line) = line_that_sets(&tenant) {
        printer.data(&format!("\n{line}{}", options_of(args)));
    }
    Ok(Exit::Done)
}

fn lines_of(tenant: &Tenant) -> Vec<String> {
    let hosts: Vec<&str> = tenant.hosts.iter().map(String::as_str).collect();
    let egress: BTreeSet<&str> = tenant
        .namespaces
        .iter()
        .flat_map(|place| place.egress.iter().map(String::as_str))
        .collect();
    let egress: Vec<&str> = egress.into_iter().collect();
    let mut lines = vec![
        format!("tenant     {}", tenant.name),
        format!("hosts      {}", cell(&json!(hosts.join(", ")))),
        format!("egress     {}", cell(&json!(egress.join(", ")))),
    ];
    for namespace in &tenant.namespaces {
        let level = cell(&json!(namespace.pod_security));
        lines.push(String::new());
        lines.push(if namespace.terminating {
            format!("{} (Terminating)", namespace.name)
        } else {
            format!("{} (Pod Security {level})", namespace.name)
        });
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
pub(super) mod tests {
    use std::collections::BTreeMap;

    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, ClientCommand, Command};
    use crate::client::tenants::QuotaUse;

    pub(in crate::cmd::client) fn parsed(args: &[&str]) -> Result<TenantCommand, clap::Error> {
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
            egress: BTreeSet::new(),
            terminating: false,
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

    #[test]
    fn a_namespace_that_is_being_deleted_is_shown_as_such() {
        let shop = TenantNamespace {
            name: "shop".into(),
            pod_security: "restricted".into(),
            quota: BTreeMap::new(),
            egress: ["10.1.0.0/16".to_owned()].into(),
            terminating: false,
        };
        let old = TenantNamespace { name: "old".into(), terminating: true, ..shop.clone() };
        let name = "acme".into();
        let acme = Tenant { name, hosts: BTreeSet::new(), namespaces: vec![shop, old] };
        assert_eq!(rows_of(&acme)[1][1], "old (Terminating)");
        let text = lines_of(&acme).join("\n");
        assert!(text.contains("\negress     10.1.0.0/16\n"), "{text}");
        assert!(text.ends_with("\nold (Terminating)"), "{text}");
    }
}
