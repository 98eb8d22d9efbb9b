//! `open`: an application in a browser, at its host.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;

use super::operation::look_at;
use super::{Context, Session};
use crate::base::error::{Exit, Failure};
use crate::cli::ReachArgs;
use crate::client::address::address;
use crate::client::applications::ClusterReader;
use crate::output::Printer;

/// The program of a desktop that opens a URL.
const OPENER: &str = if cfg!(target_os = "macos") { "open" } else { "xdg-open" };

/// Prints the URL of an application, and opens it where somebody sits in front of a desktop.
///
/// # Errors
/// What the control plane or the cluster refuses; exit 13 where the application has no host.
pub(super) async fn open(
    context: &Context,
    name: &str,
    print: bool,
    reach: &ReachArgs,
) -> anyhow::Result<Exit> {
    let session = Session::open(context, reach.cluster.context.as_deref())?;
    let (cluster, namespace) = session.find(name, reach).await?;
    let reader = ClusterReader { api: &session.api, cluster: &cluster.id };
    let Some(found) = context.unless_stopped(address(&reader, &namespace, name)).await? else {
        // one that is not there has no host either
        context.unless_stopped(reader.deployment(&namespace, name)).await?;
        let what = format!("{namespace}/{name} has no host that a browser can open");
        return Err(Failure::new(Exit::Problems, "NO_HOST", what)
            .hint(format!(
                "give it one, `host = {{name = \"NAME\"}}` in pipeops.toml, and run pipeops \
                 deploy; to look: {}",
                look_at(&namespace, name, &reach.cluster)
            ))
            .into());
    };
    let mut printer = Printer::new(false, false, context.no_color());
    printer.data(&found.url);
    if let Some(gateway) = &found.unread_gateway {
        printer.say(&format!(
            "your role may not read the Gateway {gateway}: where it has TLS, it is https"
        ));
    }
    if !print
        && std::io::stdout().is_terminal()
        && has_display(&context.env)
        && let Err(error) = context.host("/").start_on_desktop(OPENER, &[&found.url]).await
    {
        printer.say(&format!("not opened: {error:#}"));
    }
    Ok(Exit::Done)
}

fn has_display(env: &BTreeMap<String, String>) -> bool {
    let set = |name: &&str| env.get(*name).is_some_and(|value| !value.is_empty());
    cfg!(target_os = "macos") || ["DISPLAY", "WAYLAND_DISPLAY"].iter().any(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(not(target_os = "macos"))]
    fn a_display_is_one_that_is_named() {
        let env = |name: &str, value: &str| BTreeMap::from([(name.to_owned(), value.to_owned())]);
        assert!(has_display(&env("DISPLAY", ":0")));
        assert!(has_display(&env("WAYLAND_DISPLAY", "wayland-0")));
        assert!(!has_display(&env("DISPLAY", "")));
        assert!(!has_display(&BTreeMap::new()));
    }
}
