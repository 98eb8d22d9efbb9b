//! What both installers do alike: settings, lock and facts, then checks, confirmation, engine and
//! report.

use std::sync::atomic::Ordering;

use serde_json::json;

use super::given;
use super::{Context, UNASKED, secrets};
use crate::base::error::{Exit, Failure};
use crate::base::text::quoted;
use crate::cli::{InstallerArgs, OutputFormat};
use crate::host::paths::LOGS;
use crate::host::{Host, HostWriter, Owner};
use crate::install::checks::{self, InstallTarget};
use crate::install::components::Component;
use crate::install::engine::journal::Journal;
use crate::install::engine::{self, Outcome, Secrets};
use crate::install::facts::Facts;
use crate::install::finding::{Finding, Level, has_errors};
use crate::install::gather::{Probe, gather, gather_configured};
use crate::install::plan::{CheckedPlan, Plan, ProgressEvent};
use crate::install::planner::Release;
use crate::install::release;
use crate::install::settings::{Options, Settings};
use crate::k3s;
use crate::k3s::paths::ADMIN_KUBECONFIG;
use crate::k3s::role::NodeRole;
use crate::kubernetes::client::Cluster;
use crate::output::Printer;

/// Everything that both installers hold on to from their beginning to their end.
pub(super) struct Installer<'a> {
    pub(super) context: &'a Context,
    pub(super) command: &'static str,
    /// What was typed behind the command, for a line that says it again.
    pub(super) typed: Vec<String>,
    pub(super) host: Host,
    pub(super) settings: Settings,
    pub(super) journal: Option<Journal>,
    pub(super) run: InstallerArgs,
    pub(super) printer: Printer,
    pub(super) secrets: Secrets,
    pub(super) facts: Facts,
    /// The lock; none in a run that writes nothing.
    pub(super) writer: Option<HostWriter>,
    /// What `--apply-plan` names.
    pub(super) saved: Option<CheckedPlan>,
    pub(super) started: std::time::Instant,
}

impl InstallerArgs {
    pub(super) fn read_only(&self) -> bool {
        self.dry_run || self.plan_out.is_some()
    }
}

impl<'a> Installer<'a> {
    /// Reads settings, takes the lock, gathers the facts.
    pub(super) async fn begin(
        context: &'a Context,
        command: &'static str,
        mut flags: Options,
        mut run: InstallerArgs,
        role: NodeRole,
    ) -> anyhow::Result<Installer<'a>> {
        let host = context.existing_host(&run.root)?;
        run.root = host.absolute_user_path(&run.root);
        let named = [&mut run.config, &mut run.plan_out, &mut run.apply_plan];
        let named = named.into_iter().flatten().chain(flags.paths_mut());
        named.for_each(|path| *path = host.absolute_user_path(path));
        let saved =
            run.apply_plan.as_deref().map(|path| secrets::saved_plan(&host, path)).transpose()?;
        run.config = run.config.or_else(|| saved.as_ref()?.plan.inputs.get("config").cloned());
        let settings = given::settings(context, &host, &flags, &run, role, saved.as_ref())?;
        let root = !host.is_running_machine() || nix::unistd::geteuid().is_root();
        let writer = if run.read_only() || !root { None } else { Some(host.lock()?) };
        let journal = if root { Journal::load(&host)? } else { None };
        let installed_role = journal.as_ref().map(|j| j.role);
        let probe = if writer.is_some() { Probe::Disk } else { Probe::ReadOnly };
        let mut facts = gather(&host, installed_role, &context.env, probe).await;
        // a node keeps its name, whatever the machine is called today or is asked to be
        if let Some(node) = journal
            .as_ref()
            .map(|j| j.node.clone())
            .filter(|node| !node.is_empty() && settings.node_name(&facts.hostname) != *node)
        {
            facts.current_hostname = Some(std::mem::replace(&mut facts.hostname, node));
        }
        gather_configured(&host, &mut facts, &settings);
        let printer = Printer::new(
            run.output == OutputFormat::Json,
            run.events.is_some(),
            context.no_color(),
        );
        let mut installer = Installer {
            context,
            command,
            typed: given::typed(&flags, &run),
            host,
            settings,
            journal,
            run,
            printer,
            secrets: Secrets::new(),
            facts,
            writer,
            saved,
            started: std::time::Instant::now(),
        };
        installer.secrets =
            secrets::load(context, &installer.host, &installer.settings, &installer.facts).await?;
        let readable = secrets::find_readable(
            &installer.host,
            installer.writer.as_ref(),
            &installer.run,
            &installer.settings.options,
            &installer.secrets,
        )?;
        installer.facts.readable_secrets.extend(readable);
        if installed_role == Some(NodeRole::Server) && installer.facts.k3s.active {
            installer.facts.retired_ingress = retired_ingress(&installer.host).await;
            installer.facts.bundled_traefik = traefik(&installer.host).await;
        }
        Ok(installer)
    }

    /// The files of a version of k3s and their digests; what is to be said of them is shown.
    pub(super) async fn resolve(
        &mut self,
        version: k3s::version::Version,
    ) -> anyhow::Result<Release> {
        let journal = self.journal.as_ref();
        let resolved = release::resolve(&self.host, &self.settings, &self.facts, journal, version);
        let resolved = self.context.unless_stopped(resolved).await?;
        resolved.notes.iter().for_each(|n| self.printer.say(&format!("note: {n}")));
        Ok(resolved.release)
    }

    /// Runs the checks, shows what they found, and stops when one says so.
    pub(super) fn check(
        &mut self,
        version: Option<&k3s::version::Version>,
        components: &[&'static Component],
    ) -> anyhow::Result<Vec<Finding>> {
        let target = InstallTarget { settings: &self.settings, version, components };
        let findings = checks::run(&self.facts, &target);
        self.printer.findings(&findings);
        if !has_errors(&findings) {
            return Ok(findings);
        }
        let codes: Vec<&str> =
            findings.iter().filter(|f| f.level == Level::Error).map(|f| f.code.as_str()).collect();
        self.printer.document(&json!({
            "schema": "pipeops.result/v1",
            "command": self.command,
            "result": "blocked",
            "exit": 3,
            "findings": findings,
        }));
        Err(Failure::new(
            Exit::Preflight,
            "PREFLIGHT",
            format!(
                "preflight found {} that must be fixed first: {}",
                plural(codes.len(), "problem"),
                codes.join(", ")
            ),
        )
        .why("nothing was changed")
        .hint(way_on(&codes))
        .into())
    }

    /// Check, show, confirm, apply. `None` when the run ends before the engine starts.
    pub(super) async fn carry_out(
        &mut self,
        plan: Plan,
        findings: Vec<Finding>,
    ) -> anyhow::Result<Option<Outcome>> {
        let check = engine::check(&self.host, plan, self.journal.as_ref(), &self.secrets, findings);
        let mut checked = self.context.unless_stopped(check).await?;
        checked.plan.inputs = secrets::input_files(&self.host, &self.run, &self.settings.options);
        if let Some(then) = self.saved.take() {
            checked = self.context.unless_stopped(self.saved(then, checked)).await?;
        }
        if let Some(path) = &self.run.plan_out {
            let text = format!("{}\n", serde_json::to_string_pretty(&checked)?);
            self.host.write_user_file(path, &text)?;
            let token = self.context.agent_token.as_ref().map_or("", |_| "AGENT_TOKEN=… ");
            let mut words = vec![format!("{token}pipeops {}", self.command)];
            words.extend(self.typed.iter().cloned());
            words.push(format!("--apply-plan {}", quoted(path)));
            self.printer.say(&format!(
                "the plan is in {path} (mode 0600, without secrets); carry it out with:\n  {}",
                words.join(" ")
            ));
        }
        if checked.done() {
            self.printer.data("nothing to do: everything is as wanted");
            self.report(&checked, "unchanged", &Outcome::default());
            self.settle(&checked)?;
            return Ok(None);
        }
        let changes = checked.changes();
        self.printer.say(&format!("{} on {}:", self.command, checked.plan.node));
        self.printer.plan(&checked);
        if self.run.read_only() {
            self.printer
                .data(&format!("{} would be made; nothing was written", plural(changes, "change")));
            self.report(&checked, "dry_run", &Outcome::default());
            return Ok(None);
        }
        self.ask(&checked).await?;
        let Some(writer) = &self.writer else { anyhow::bail!("no lock is held") };
        let mut journal = self.journal.take().unwrap_or_else(|| {
            Journal::new(self.settings.role, &checked.plan.node, &checked.plan.k3s_version)
        });
        let printer = &mut self.printer;
        let mut on_event = |event: ProgressEvent| printer.event(&event);
        let result = engine::apply(
            writer,
            &checked.plan,
            &self.secrets,
            &mut journal,
            &self.context.stop,
            &mut on_event,
        )
        .await;
        self.journal = Some(journal);
        let result = result.map_err(|error| self.explain(error));
        match &result {
            Ok(outcome) => {
                let word = if outcome.failed.is_empty() { "done" } else { "partial" };
                self.report(&checked, word, outcome);
                for (title, why) in &outcome.failed {
                    self.printer.say(&format!("left for later: {title} – {why}"));
                }
                if !outcome.failed.is_empty() {
                    self.printer
                        .say("the base is healthy; run the same command again to finish the rest");
                }
            }
            // main prints it; it belongs in the log too
            Err(error) => self.printer.log_only(&Failure::from_error(error).render()),
        }
        self.write_log();
        result.map(Some)
    }

    /// A finished plan whose journal was not closed, for example after a crash at the very end.
    fn settle(&mut self, checked: &CheckedPlan) -> anyhow::Result<()> {
        let (Some(writer), Some(journal)) = (&self.writer, self.journal.as_mut()) else {
            return Ok(());
        };
        // an earlier pipeops may have put it another way, with secrets in it
        let mut changed =
            journal.scrubbed || !journal.complete || journal.options != checked.plan.options;
        for step in &checked.plan.steps {
            if let Some(entry) =
                journal.entries.iter_mut().find(|e| e.id == step.id && e.want != step.want)
            {
                entry.want = step.want.clone();
                changed = true;
            }
        }
        if changed {
            journal.complete = true;
            journal.options.clone_from(&checked.plan.options);
            journal.save(writer)?;
        }
        Ok(())
    }

    /// Once the engine runs, an interruption leaves a journal that the next run goes on from.
    fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let mut failure = Failure::from_error(&error);
        match failure.exit {
            Exit::Interrupted => {
                failure.hint = Some(format!(
                    "the journal is closed; run the same command again to go on, or `pipeops \
                     uninstall` to go back ({} is recorded)",
                    plural(self.journal.as_ref().map_or(0, |j| j.entries.len()), "step")
                ));
            }
            // a step that the machine did not carry out; those before it are done
            Exit::Internal => {
                failure.exit = Exit::Partial;
                failure.code = "STEP_FAILED".into();
                failure.hint.get_or_insert(format!(
                    "run the same command again: it resumes. The log is in {LOGS}"
                ));
            }
            _ => {}
        }
        failure.into()
    }

    /// A saved plan is carried out only where and when it was made for.
    async fn saved(&self, then: CheckedPlan, now: CheckedPlan) -> anyhow::Result<CheckedPlan> {
        let stale = |code: &str, what: &str, why: String| {
            Failure::new(Exit::Preflight, code, what)
                .why(why)
                .why("nothing was changed")
                .hint("look at a new plan with --dry-run and save it with --plan-out")
        };
        let named = then.plan.options.get("node-name").cloned();
        let node = named.unwrap_or_else(|| self.settings.node_name(&self.facts.hostname));
        if then.plan.node != node {
            return Err(stale(
                "PLAN_OTHER_HOST",
                "this plan was made for a node of another name",
                format!("for {}; this machine would be {node}", then.plan.node),
            )
            .into());
        }
        if then.plan.machine_id != self.facts.machine_id || then.plan.command != self.command {
            return Err(stale(
                "PLAN_OTHER_HOST",
                "this plan was made for another machine or command",
                format!("{} for machine {}", then.plan.command, then.plan.machine_id),
            )
            .into());
        }
        if secrets::holds_plain_secrets(&then) {
            return Err(stale(
                "PLAN_STALE",
                "this plan was made by an earlier pipeops, which wrote secrets into plans",
                "it is carried out no more: they would go on into the journal".into(),
            )
            .into());
        }
        let again = engine::check(
            &self.host,
            then.plan.clone(),
            self.journal.as_ref(),
            &self.secrets,
            now.findings,
        )
        .await?;
        if again.checks != then.checks || again.remove != then.remove || again.drift != then.drift {
            let differs = then
                .plan
                .steps
                .iter()
                .zip(then.checks.iter().zip(&again.checks))
                .find(|(_, (a, b))| a != b)
                .map(|(s, _)| s.title.clone());
            return Err(stale(
                "PLAN_STALE",
                "the machine has changed since the plan was made",
                format!(
                    "first difference: {}",
                    differs.unwrap_or_else(|| "what is taken back".into())
                ),
            )
            .into());
        }
        Ok(again)
    }

    /// Shows options that are about to go, then asks once.
    async fn ask(&mut self, checked: &CheckedPlan) -> anyhow::Result<()> {
        if let Some(journal) = &self.journal {
            for (key, was) in &journal.options {
                match checked.plan.options.get(key) {
                    // without the option k3s is not changed: `release::version`
                    None if ["k3s-version", "channel"].contains(&key.as_str()) => {
                        let verb = if journal.k3s_version == checked.plan.k3s_version {
                            "stays at"
                        } else {
                            "becomes"
                        };
                        self.printer.say(&format!(
                            "  ! {key} was `{was}` and is not given now: k3s {verb} {}",
                            checked.plan.k3s_version
                        ));
                    }
                    // the node keeps it: NODE_RENAMED
                    None if key == "node-name" => {}
                    None => self.printer.say(&format!(
                        "  ! {key} was `{was}` and is not given now: it returns to its default"
                    )),
                    Some(now) if now != was => {
                        self.printer.say(&format!("  ! {key} was `{was}`, becomes `{now}`"))
                    }
                    Some(_) => {}
                }
            }
        }
        if self.run.yes || self.run.apply_plan.is_some() {
            return Ok(());
        }
        self.context.confirm(&mut self.printer, "go on?", UNASKED).await
    }

    fn report(&self, checked: &CheckedPlan, result: &str, outcome: &Outcome) {
        let failed: Vec<_> =
            outcome.failed.iter().map(|(step, why)| json!({"step": step, "why": why})).collect();
        let steps = checked.plan.steps.iter().zip(&checked.checks);
        let plan: Vec<_> = steps
            .map(|(s, c)| json!({"id": s.id, "title": s.title, "why": s.why, "check": c}))
            .collect();
        self.printer.document(&json!({
            "schema": "pipeops.result/v1",
            "command": self.command,
            "result": result,
            "node": checked.plan.node,
            "k3s_version": checked.plan.k3s_version,
            "duration_ms": u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            "changes": outcome.changed,
            "failed": failed,
            "findings": checked.findings,
            "drift": checked.drift,
            "plan": plan,
        }));
    }

    /// What was said goes into a log that uninstall leaves.
    fn write_log(&mut self) {
        let Some(writer) = &self.writer else { return };
        let stamp = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
        let text = crate::base::secret::mask_registered(&self.printer.take_log());
        let path = format!("{LOGS}/{stamp}-{}.log", self.command);
        if let Err(error) = writer
            .mkdir(LOGS, 0o700)
            .and_then(|_| writer.write(&path, text.as_bytes(), 0o600, Owner::default()))
        {
            self.printer.say(&format!("note: the log could not be written: {error:#}"));
        }
    }

    /// Reports what went wrong, and gives the lock back.
    pub(super) fn end(self, result: anyhow::Result<Exit>) -> anyhow::Result<Exit> {
        if let Err(error) = &result {
            let failure = Failure::from_error(error);
            let terminated = self.context.terminated.load(Ordering::Relaxed);
            let (command, exit) = (self.command, super::exit_of(&failure, terminated).number());
            self.printer.document(&json!({
                "schema": "pipeops.result/v1",
                "command": command,
                "result": "failed",
                "exit": exit,
                "error": failure,
            }));
        }
        result
    }
}

/// What can be done about errors of these codes.
fn way_on(codes: &[&str]) -> String {
    let (ignored, firm): (Vec<&str>, Vec<&str>) =
        codes.iter().copied().partition(|code| checks::can_be_ignored(code));
    let mut hint = "fix them and run again".to_owned();
    if !ignored.is_empty() {
        hint.push_str("; a finding can be overruled with --ignore CODE");
    }
    if !firm.is_empty() {
        hint.push_str(&format!("; --ignore has no effect on {}", firm.join(", ")));
    }
    hint
}

pub(super) fn plural(count: usize, word: &str) -> String {
    if count == 1 { format!("1 {word}") } else { format!("{count} {word}s") }
}

/// Whether k3s' own traefik is in the cluster, and no settings of ours turn it off.
async fn traefik(host: &Host) -> bool {
    let path = "/apis/helm.cattle.io/v1/namespaces/kube-system/helmcharts/traefik";
    let Ok(cluster) = Cluster::open(host, ADMIN_KUBECONFIG) else { return false };
    !host.text(crate::host::paths::DROP_IN).contains("traefik")
        && cluster.get(path).await.is_ok_and(|chart| chart.is_some())
}

/// Ingresses with annotations of the retired controller, when that controller runs in the cluster.
async fn retired_ingress(host: &Host) -> Option<u32> {
    let cluster = Cluster::open(host, ADMIN_KUBECONFIG).ok()?;
    let classes = cluster.list("/apis/networking.k8s.io/v1/ingressclasses").await.ok()?;
    classes.iter().find(|c| c["spec"]["controller"] == "k8s.io/ingress-nginx")?;
    let ingresses = cluster.list("/apis/networking.k8s.io/v1/ingresses").await.unwrap_or_default();
    let annotated = ingresses.iter().filter(|i| {
        i["metadata"]["annotations"]
            .as_object()
            .is_some_and(|a| a.keys().any(|k| k.starts_with("nginx.ingress.kubernetes.io/")))
    });
    Some(u32::try_from(annotated.count()).unwrap_or(u32::MAX))
}
