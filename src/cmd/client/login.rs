//! `login`, `logout` and `contexts`.

use serde_json::{Value, json};

use super::{Context, cell, printer};
use crate::base::error::{Exit, Failure};
use crate::base::http::check_url;
use crate::base::secret::{Secret, register_secret};
use crate::base::trust::Pin;
use crate::cli::{ContextsArgs, ContextsCommand, LoginArgs};
use crate::client::api::Api;
use crate::client::contexts::{ContextStore, Contexts, LoginContext};
use crate::host::Host;
use crate::host::user_files::unreadable;
use crate::output::{Printer, ask_secret, table};

/// # Errors
/// Exit 7 where the control plane refuses the token, or is not the one that is trusted; 5 where it
/// is not reached. Then nothing is stored.
pub(super) async fn login(context: &Context, args: LoginArgs) -> anyhow::Result<Exit> {
    let mut printer = Printer::new(false, false, context.no_color());
    let wrong = |why: String| {
        Failure::usage("URL_WRONG", "that is no way to a control plane")
            .why(why)
            .hint("pipeops login https://NAME:8443 --pin sha256:…")
    };
    check_url(&args.url).map_err(wrong)?;
    args.pin.as_deref().map_or(Ok(()), |pin| Pin::parse(pin).map(drop)).map_err(wrong)?;
    let host = Host::new("/", None);
    let ca = args.ca.as_deref();
    let ca = ca.map(|path| host.read_user_file(path).map_err(|e| unreadable(path, &e)));
    let ca = ca.transpose()?;
    let store = ContextStore::new(&context.env)?;
    let contexts = store.load()?;
    let url = args.url.trim_end_matches('/').to_owned();
    let name = context_name(&contexts, &url, args.name.clone())?;
    let token = token(context, &host).await?;
    register_secret(token.expose());
    let former = contexts.contexts.get(&name);
    let mut login = LoginContext { url, pin: args.pin, ca, token, ..LoginContext::default() };
    let api = Api::new(&renewed(former, login.clone()))?;
    let clusters = context.unless_stopped(api.get("/api/v1/clusters")).await?;
    let tenant = clusters["tenant"].as_str().map(str::to_owned);
    login.tenant.clone_from(&tenant);
    let store_login = |contexts: &mut Contexts| {
        // meanwhile another login may have taken the name
        context_name(contexts, &login.url, args.name)?;
        let login = renewed(contexts.contexts.get(&name), login);
        contexts.current.clone_from(&name);
        contexts.contexts.insert(name.clone(), login);
        Ok(())
    };
    store.update(store_login).await?;
    let names: Vec<&str> = clusters["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|cluster| cluster["name"].as_str())
        .collect();
    let reached = match names.len() {
        0 => "it reaches no cluster yet".to_owned(),
        _ => format!("clusters: {}", names.join(", ")),
    };
    let limit = tenant.map(|tenant| format!("tenant {tenant}; ")).unwrap_or_default();
    printer.say(&format!("logged in as context {name}; {limit}{reached}"));
    Ok(Exit::Done)
}

/// A login at the control plane of `former`: its cluster and namespace stay, and what proves it,
/// where nothing else is given. Another tenant has other namespaces.
fn renewed(former: Option<&LoginContext>, mut login: LoginContext) -> LoginContext {
    let Some(former) = former.filter(|former| former.url == login.url) else { return login };
    login.cluster = login.cluster.or_else(|| former.cluster.clone());
    if login.tenant == former.tenant {
        login.namespace = login.namespace.or_else(|| former.namespace.clone());
    }
    if login.pin.is_none() && login.ca.is_none() {
        (login.pin, login.ca) = (former.pin.clone(), former.ca.clone());
    }
    login
}

/// The name of a new context: never that of another control plane by accident.
fn context_name(contexts: &Contexts, url: &str, given: Option<String>) -> Result<String, Failure> {
    if let Some(given) = given {
        return Ok(given);
    }
    let host = url::Url::parse(url).ok().and_then(|url| url.host_str().map(str::to_owned));
    let name = host.unwrap_or_else(|| "default".into());
    match contexts.contexts.get(&name) {
        Some(other) if other.url != url => {
            let what = format!("the context {name} is another control plane");
            Err(Failure::usage("CONTEXT_TAKEN", what)
                .why(format!("it is {}", other.url))
                .hint("choose a name of its own: --name CONTEXT"))
        }
        _ => Ok(name),
    }
}

async fn token(context: &Context, host: &Host) -> anyhow::Result<Secret> {
    let asked = async { Ok::<_, Failure>(ask_secret("token: ").await) };
    let token = match context.unless_stopped(asked).await? {
        None => context.token_file(host, "-").await?,
        Some(typed) if typed.trim().is_empty() => {
            let what = "there is no token in what was typed";
            return Err(Failure::usage("TOKEN_EMPTY", what).hint("type or paste the token").into());
        }
        Some(typed) => Secret::new(typed.trim()),
    };
    checked_token(token).map_err(Into::into)
}

/// A token that can stand in a header.
fn checked_token(token: Secret) -> Result<Secret, Failure> {
    if token.expose().bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(token);
    }
    Err(Failure::usage("TOKEN_MALFORMED", "that is no token")
        .why("a blank, a line break or a character other than visible ASCII is in it")
        .hint("give the token alone: of what `user create` prints, the second line"))
}

/// # Errors
/// Exit 2 for a context that is not there.
pub(super) async fn logout(context: &Context, name: Option<&str>) -> anyhow::Result<Exit> {
    let store = ContextStore::new(&context.env)?;
    // where there is none, none is made
    store.load()?.select(name)?;
    let forget = |contexts: &mut Contexts| {
        let name = contexts.select(name)?.0.to_owned();
        contexts.contexts.remove(&name);
        if contexts.current == name {
            contexts.current.clear();
        }
        Ok(name)
    };
    let (_, name) = store.update(forget).await?;
    Printer::new(false, false, context.no_color()).say(&format!(
        "the token of {name} is forgotten here; it is valid until `pipeops control-plane user \
         revoke` ends it"
    ));
    Ok(Exit::Done)
}

/// # Errors
/// Exit 2 for a context that is not there.
pub(super) async fn contexts(context: &Context, args: ContextsArgs) -> anyhow::Result<Exit> {
    let store = ContextStore::new(&context.env)?;
    let mut contexts = store.load()?;
    if let Some(ContextsCommand::Use { context: name, cluster, namespace }) = args.command {
        contexts.select(Some(&name))?;
        let take = |contexts: &mut Contexts| {
            contexts.select(Some(&name))?;
            if let Some(chosen) = contexts.contexts.get_mut(&name) {
                chosen.cluster = cluster.or(chosen.cluster.take());
                chosen.namespace = namespace.or(chosen.namespace.take());
            }
            contexts.current = name;
            Ok(())
        };
        contexts = store.update(take).await?.0;
    }
    let rows: Vec<Value> = contexts
        .contexts
        .iter()
        .map(|(name, login)| {
            json!({
                "name": name, "url": login.url, "tenant": login.tenant,
                "cluster": login.cluster, "namespace": login.namespace,
                "current": *name == contexts.current,
            })
        })
        .collect();
    let printer = printer(context, &args.output);
    let row = |row: &Value| {
        let current = if row["current"] == true { "*" } else { "" };
        let fields = ["name", "url", "tenant", "cluster", "namespace"];
        let fields = fields.map(|field| cell(&row[field]));
        [vec![current.to_owned()], fields.to_vec()].concat()
    };
    let lines: Vec<Vec<String>> = rows.iter().map(row).collect();
    let text = table(&["IN USE", "NAME", "URL", "TENANT", "CLUSTER", "NAMESPACE"], &lines);
    printer.document(&json!({"items": rows}));
    printer.data(if rows.is_empty() { "none yet" } else { text.trim_end() });
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_is_named_after_its_control_plane_and_never_replaced_by_another() {
        let mut contexts = Contexts::default();
        let name = |contexts: &Contexts, url: &str, given: Option<&str>| {
            context_name(contexts, url, given.map(str::to_owned)).map_err(|f| f.code)
        };
        let url = "https://cp.example:8443";
        assert_eq!(name(&contexts, url, None).unwrap(), "cp.example");
        let login = LoginContext { url: url.into(), ..LoginContext::default() };
        contexts.contexts.insert("cp.example".into(), login);
        assert_eq!(name(&contexts, url, None).unwrap(), "cp.example");
        let other = "https://cp.example:9443";
        assert_eq!(name(&contexts, other, None), Err("CONTEXT_TAKEN".into()));
        assert_eq!(name(&contexts, other, Some("new")).unwrap(), "new");
    }

    #[test]
    fn a_login_again_keeps_what_it_does_not_say() {
        let text = |text: &str| Some(text.to_owned());
        let former = LoginContext {
            url: "https://cp".into(),
            pin: text("p"),
            ca: None,
            token: Secret::new("old"),
            tenant: None,
            cluster: text("eu"),
            namespace: text("beta"),
        };
        let again = LoginContext {
            url: "https://cp".into(),
            token: Secret::new("new"),
            ..LoginContext::default()
        };
        let kept = LoginContext { token: Secret::new("new"), ..former.clone() };
        assert_eq!(renewed(Some(&former), again.clone()), kept);
        // a CA in place of the pin
        let other = renewed(Some(&former), LoginContext { ca: text("c"), ..again.clone() });
        assert_eq!((other.pin, other.ca, other.cluster), (None, text("c"), text("eu")));
        // of a tenant the namespace is another one
        let limited = LoginContext { tenant: text("acme"), ..again.clone() };
        let limited = renewed(Some(&former), limited);
        assert_eq!((limited.cluster, limited.namespace), (text("eu"), None));
        // of another control plane nothing
        let elsewhere = LoginContext { url: "https://other".into(), ..again };
        assert_eq!(renewed(Some(&former), elsewhere.clone()), elsewhere);
        assert_eq!(renewed(None, elsewhere.clone()), elsewhere);
    }

    #[test]
    fn a_token_is_one_word() {
        assert!(checked_token(Secret::new("pou_planted")).is_ok());
        for text in ["pou_a b", "pipeops login x\npou_a", "pou_\u{e4}", "a\u{0}"] {
            let refused = checked_token(Secret::new(text)).unwrap_err();
            assert_eq!((refused.exit, refused.code.as_str()), (Exit::Usage, "TOKEN_MALFORMED"));
            assert!(!refused.render().contains("pou_"), "{text}");
        }
    }
}
