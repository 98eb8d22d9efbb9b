//! The table of routes: path, whose token it needs, what it does. What is not in it is not there.

/// Whose token a route needs that needs one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// An enrolment token, or the credential of the agent that registers again.
    Enrol,
    /// The credential of the agent that the path names.
    Agent,
    Admin,
    /// An administrator, or a Runner whose reach the cluster of the path is in.
    Runner,
    /// The same, or a kubeconfig; never a cookie.
    Gateway,
    /// Whoever has logged in on the page.
    Session,
}

/// What anybody may call: nobody is known behind such a request, and none of these is told of anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Open {
    Page,
    Login,
    Health,
    Ca,
    /// Its secret stands in the path.
    FrpHandler,
}

/// What only the socket in the data directory answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Local {
    Backup,
    FrpsConfig,
}

/// What somebody calls who has shown who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Metrics,
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
    Session,
    Logout,
    Changes,
    Inside,
}

/// Who may call a route, and what it does: the one decides what the other is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serves {
    Nobody(Open),
    Local(Local),
    Known(Token, Call),
}

impl Serves {
    /// What a caller must show, in a word.
    pub fn need(self) -> String {
        match self {
            Serves::Nobody(_) => "Nobody".into(),
            Serves::Local(_) => "Local".into(),
            Serves::Known(token, _) => format!("{token:?}"),
        }
    }
}

/// Method, path, who and what. `{id}` stands for one segment, a `*` at the end for all that follow.
pub const ROUTES: &[(&str, &str, Serves)] = &[
    ("GET", "/", Serves::Nobody(Open::Page)),
    ("GET", "/page.js", Serves::Nobody(Open::Page)),
    ("GET", "/page.css", Serves::Nobody(Open::Page)),
    ("GET", "/icon.svg", Serves::Nobody(Open::Page)),
    ("POST", "/session", Serves::Nobody(Open::Login)),
    ("GET", "/session", Serves::Known(Token::Session, Call::Session)),
    ("DELETE", "/session", Serves::Known(Token::Session, Call::Logout)),
    ("GET", "/api/v1/health", Serves::Nobody(Open::Health)),
    ("GET", "/api/v1/ca", Serves::Nobody(Open::Ca)),
    ("GET", "/metrics", Serves::Known(Token::Admin, Call::Metrics)),
    ("GET", "/api/v1/backup", Serves::Local(Local::Backup)),
    ("GET", "/api/v1/frps", Serves::Local(Local::FrpsConfig)),
    // frps has no token to show: its secret stands in the path
    ("POST", "/frp/handler/{secret}", Serves::Nobody(Open::FrpHandler)),
    ("POST", "/api/v1/agents/register", Serves::Known(Token::Enrol, Call::Register)),
    ("GET", "/api/v1/agents/{id}/config", Serves::Known(Token::Agent, Call::Config)),
    ("POST", "/api/v1/agents/{id}/heartbeat", Serves::Known(Token::Agent, Call::Heartbeat)),
    ("POST", "/api/v1/agents/{id}/status", Serves::Known(Token::Agent, Call::Status)),
    ("POST", "/api/v1/agents/{id}/operations/{op}/result", Serves::Known(Token::Agent, Call::OperationResult)),
    ("POST", "/api/v1/agents/{id}/credential", Serves::Known(Token::Agent, Call::Rotate)),
    ("DELETE", "/api/v1/agents/{id}", Serves::Known(Token::Agent, Call::Deregister)),
    ("GET", "/api/v1/projects", Serves::Known(Token::Admin, Call::Projects)),
    ("POST", "/api/v1/projects", Serves::Known(Token::Admin, Call::AddProject)),
    ("GET", "/api/v1/tokens", Serves::Known(Token::Admin, Call::Tokens)),
    ("POST", "/api/v1/tokens", Serves::Known(Token::Admin, Call::AddToken)),
    ("DELETE", "/api/v1/tokens/{id}", Serves::Known(Token::Admin, Call::RevokeToken)),
    ("GET", "/api/v1/runners", Serves::Known(Token::Admin, Call::Runners)),
    ("POST", "/api/v1/runners", Serves::Known(Token::Admin, Call::AddRunner)),
    ("DELETE", "/api/v1/runners/{id}", Serves::Known(Token::Admin, Call::RevokeRunner)),
    ("GET", "/api/v1/admins", Serves::Known(Token::Admin, Call::Admins)),
    ("POST", "/api/v1/admins", Serves::Known(Token::Admin, Call::AddAdmin)),
    ("DELETE", "/api/v1/admins/{id}", Serves::Known(Token::Admin, Call::RemoveAdmin)),
    ("GET", "/api/v1/clusters", Serves::Known(Token::Runner, Call::Clusters)),
    ("GET", "/api/v1/clusters/{id}", Serves::Known(Token::Runner, Call::Cluster)),
    ("POST", "/api/v1/clusters/{id}/revoke", Serves::Known(Token::Admin, Call::RevokeCluster)),
    ("DELETE", "/api/v1/clusters/{id}", Serves::Known(Token::Admin, Call::RemoveCluster)),
    ("POST", "/api/v1/clusters/{id}/token", Serves::Known(Token::Runner, Call::ClusterToken)),
    ("POST", "/api/v1/clusters/{id}/kubeconfig", Serves::Known(Token::Runner, Call::Kubeconfig)),
    ("GET", "/api/v1/clusters/{id}/operations", Serves::Known(Token::Runner, Call::Operations)),
    ("POST", "/api/v1/clusters/{id}/operations", Serves::Known(Token::Runner, Call::AskOperation)),
    ("GET", "/api/v1/clusters/{id}/operations/{op}", Serves::Known(Token::Runner, Call::Operation)),
    ("DELETE", "/api/v1/clusters/{id}/operations/{op}", Serves::Known(Token::Runner, Call::CancelOperation)),
    ("GET", "/api/v1/clusters/{id}/inside/{what}", Serves::Known(Token::Runner, Call::Inside)),
    ("GET", "/api/v1/changes", Serves::Known(Token::Runner, Call::Changes)),
    ("*", "/clusters/{id}/k8s/*", Serves::Known(Token::Gateway, Call::Gateway)),
    ("*", "/clusters/{id}/api/*", Serves::Known(Token::Gateway, Call::Gateway)),
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

/// A segment as it was meant: a name may hold blanks and letters of every script (RFC 3986 §2.1).
pub(super) fn decoded(segment: &str) -> String {
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        let digit = |at: usize| tail.get(at).and_then(|b| char::from(*b).to_digit(16)).and_then(|d| u8::try_from(d).ok());
        match (byte, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push(high << 4 | low);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(*byte);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).unwrap_or_else(|_| segment.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_the_one_that_was_meant() {
        for (segment, name) in
            [("c-1", "c-1"), ("prod%20eu", "prod eu"), ("%C5%81%c3%b3d%C5%BA", "Łódź"), ("100%", "100%"), ("%zz%4", "%zz%4"), ("%ff", "%ff")]
        {
            assert_eq!(decoded(segment), name);
        }
    }

    #[test]
    fn a_path_finds_its_route_and_no_other() {
        fn find(path: &str) -> Option<(Call, Vec<&str>)> {
            let known = |serves| if let Serves::Known(_, call) = serves { Some(call) } else { None };
            ROUTES.iter().find_map(|r| Some((known(r.2)?, matched(r.1, path)?)))
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
