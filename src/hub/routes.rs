//! The table of routes: path, whose token it needs, what it does. What is not in it is not there.

/// Whose token a route needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    Nobody,
    /// An enrolment token, or the credential of the agent that registers again.
    Enrol,
    /// The credential of the agent that the path names.
    Agent,
    Admin,
    /// Whoever can open the socket in the data directory.
    Local,
    /// An administrator, or a Runner whose reach the cluster of the path is in.
    Runner,
    /// The same, or a kubeconfig; never a cookie.
    Gateway,
    /// Whoever has logged in on the page.
    Session,
}

/// What a route does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Health,
    Metrics,
    Backup,
    FrpsConfig,
    FrpHandler,
    Ca,
    Register,
    Config,
    Heartbeat,
    Status,
    OperationResult,
    Rotate,
    Deregister,
    Projects,
    AddProject,
    Tokens,
    AddToken,
    RevokeToken,
    Runners,
    AddRunner,
    RevokeRunner,
    Admins,
    AddAdmin,
    RemoveAdmin,
    Clusters,
    Cluster,
    RevokeCluster,
    RemoveCluster,
    ClusterToken,
    Kubeconfig,
    Operations,
    AskOperation,
    Operation,
    CancelOperation,
    Gateway,
    Page,
    Login,
    Session,
    Logout,
    Changes,
    Inside,
}

/// Method, path, need, call. `{id}` stands for one segment, a `*` at the end for all that follow.
pub const ROUTES: &[(&str, &str, Need, Call)] = &[
    ("GET", "/", Need::Nobody, Call::Page),
    ("GET", "/page.js", Need::Nobody, Call::Page),
    ("GET", "/page.css", Need::Nobody, Call::Page),
    ("GET", "/icon.svg", Need::Nobody, Call::Page),
    ("POST", "/session", Need::Nobody, Call::Login),
    ("GET", "/session", Need::Session, Call::Session),
    ("DELETE", "/session", Need::Session, Call::Logout),
    ("GET", "/api/v1/health", Need::Nobody, Call::Health),
    ("GET", "/api/v1/ca", Need::Nobody, Call::Ca),
    ("GET", "/metrics", Need::Admin, Call::Metrics),
    ("GET", "/api/v1/backup", Need::Local, Call::Backup),
    ("GET", "/api/v1/frps", Need::Local, Call::FrpsConfig),
    // frps has no token to show: its secret stands in the path
    ("POST", "/frp/handler/{secret}", Need::Nobody, Call::FrpHandler),
    ("POST", "/api/v1/agents/register", Need::Enrol, Call::Register),
    ("GET", "/api/v1/agents/{id}/config", Need::Agent, Call::Config),
    ("POST", "/api/v1/agents/{id}/heartbeat", Need::Agent, Call::Heartbeat),
    ("POST", "/api/v1/agents/{id}/status", Need::Agent, Call::Status),
    ("POST", "/api/v1/agents/{id}/operations/{op}/result", Need::Agent, Call::OperationResult),
    ("POST", "/api/v1/agents/{id}/credential", Need::Agent, Call::Rotate),
    ("DELETE", "/api/v1/agents/{id}", Need::Agent, Call::Deregister),
    ("GET", "/api/v1/projects", Need::Admin, Call::Projects),
    ("POST", "/api/v1/projects", Need::Admin, Call::AddProject),
    ("GET", "/api/v1/tokens", Need::Admin, Call::Tokens),
    ("POST", "/api/v1/tokens", Need::Admin, Call::AddToken),
    ("DELETE", "/api/v1/tokens/{id}", Need::Admin, Call::RevokeToken),
    ("GET", "/api/v1/runners", Need::Admin, Call::Runners),
    ("POST", "/api/v1/runners", Need::Admin, Call::AddRunner),
    ("DELETE", "/api/v1/runners/{id}", Need::Admin, Call::RevokeRunner),
    ("GET", "/api/v1/admins", Need::Admin, Call::Admins),
    ("POST", "/api/v1/admins", Need::Admin, Call::AddAdmin),
    ("DELETE", "/api/v1/admins/{id}", Need::Admin, Call::RemoveAdmin),
    ("GET", "/api/v1/clusters", Need::Runner, Call::Clusters),
    ("GET", "/api/v1/clusters/{id}", Need::Runner, Call::Cluster),
    ("POST", "/api/v1/clusters/{id}/revoke", Need::Admin, Call::RevokeCluster),
    ("DELETE", "/api/v1/clusters/{id}", Need::Admin, Call::RemoveCluster),
    ("POST", "/api/v1/clusters/{id}/token", Need::Runner, Call::ClusterToken),
    ("POST", "/api/v1/clusters/{id}/kubeconfig", Need::Runner, Call::Kubeconfig),
    ("GET", "/api/v1/clusters/{id}/operations", Need::Runner, Call::Operations),
    ("POST", "/api/v1/clusters/{id}/operations", Need::Runner, Call::AskOperation),
    ("GET", "/api/v1/clusters/{id}/operations/{op}", Need::Runner, Call::Operation),
    ("DELETE", "/api/v1/clusters/{id}/operations/{op}", Need::Runner, Call::CancelOperation),
    ("GET", "/api/v1/clusters/{id}/inside/{what}", Need::Runner, Call::Inside),
    ("GET", "/api/v1/changes", Need::Runner, Call::Changes),
    ("*", "/clusters/{id}/k8s/*", Need::Gateway, Call::Gateway),
    ("*", "/clusters/{id}/api/*", Need::Gateway, Call::Gateway),
];

/// The segments that a template leaves open.
pub(super) fn matched<'a>(template: &str, path: &'a str) -> Option<Vec<&'a str>> {
    let mut open = Vec::new();
    let mut rest = path.split('/');
    for part in template.split('/') {
        if part == "*" {
            return Some(open);
        }
        let segment = rest.next()?;
        if part.starts_with('{') {
            if segment.is_empty() {
                return None;
            }
            open.push(segment);
        } else if part != segment {
            return None;
        }
    }
    rest.next().is_none().then_some(open)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_finds_its_route_and_no_other() {
        fn find(path: &str) -> Option<(Call, Vec<&str>)> {
            ROUTES.iter().find_map(|r| Some((r.3, matched(r.1, path)?)))
        }
        assert_eq!(find("/api/v1/clusters/c-1"), Some((Call::Cluster, vec!["c-1"])));
        assert_eq!(find("/clusters/c-1/k8s/api/v1/pods"), Some((Call::Gateway, vec!["c-1"])));
        assert_eq!(find("/clusters/c-1/k8s/"), Some((Call::Gateway, vec!["c-1"])));
        for nowhere in
            ["/page", "/api/v1/clusters/", "/api/v1/clusters/c-1/", "/api/v1/clusters//token", "/clusters/c-1/k8sx/api", "/clusters/c-1/secrets"]
        {
            assert_eq!(find(nowhere), None, "{nowhere}");
        }
    }
}
