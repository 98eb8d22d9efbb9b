//! Where the command line is logged in: control planes with a token for each, in a file that only
//! its user can read.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use toml::de::DeTable;

use crate::base::config_file::{plain, unquoted};
use crate::base::error::{Exit, Failure, nearest};
use crate::base::secret::Secret;
use crate::base::trust::{Pin, Trust};
use crate::host::Host;
use crate::host::user_files::unreadable;

const FILE: &str = "contexts.toml";
/// A change takes some milliseconds: longest wait for that of another process, and between looks.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// A control plane, how it is known, and what the commands use there.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct LoginContext {
    pub url: String,
    /// `sha256:…` of a key in its certificate chain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pin: Option<String>,
    /// Certificates that may sign its own, PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
    #[serde(serialize_with = "Secret::serialize_exposed")]
    pub token: Secret,
    /// The tenant that the token is limited to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Where no option says another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
}

impl LoginContext {
    /// # Errors
    /// A pin that is none.
    pub fn trust(&self) -> Result<Trust, String> {
        let pins = self.pin.iter().map(|pin| Pin::parse(pin)).collect::<Result<_, _>>()?;
        Ok(Trust { ca_pem: self.ca.clone(), pins, accept_any: false })
    }
}

/// All contexts, by name.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct Contexts {
    /// The one in use; empty after a logout.
    pub current: String,
    pub contexts: BTreeMap<String, LoginContext>,
}

impl Contexts {
    /// The context of that name; without a name the one in use, or the only one.
    ///
    /// # Errors
    /// Exit 2 where there is none.
    pub fn select(&self, name: Option<&str>) -> Result<(&str, &LoginContext), Failure> {
        let wanted = name.unwrap_or(&self.current);
        if let Some((name, context)) = self.contexts.get_key_value(wanted) {
            return Ok((name.as_str(), context));
        }
        if let Some(name) = name {
            let known: Vec<&str> = self.contexts.keys().map(String::as_str).collect();
            let what = format!("there is no context `{name}`");
            return Err(Failure::usage("CONTEXT_UNKNOWN", what).hint(
                match nearest(name, known.iter().copied()) {
                    Some(near) => format!("did you mean `{near}`? `pipeops contexts` lists them"),
                    None => "`pipeops contexts` lists them, `pipeops login URL` makes one".into(),
                },
            ));
        }
        match self.contexts.iter().next() {
            Some((name, context)) if self.contexts.len() == 1 => Ok((name.as_str(), context)),
            Some(_) => Err(Failure::usage("NOT_LOGGED_IN", "no context is in use")
                .hint("`pipeops contexts use NAME`; `pipeops contexts` lists them")),
            None => Err(Failure::usage("NOT_LOGGED_IN", "you are not logged in")
                .why("a control plane lets nobody in without a token")
                .hint(
                    "`pipeops login URL`, with the line and the token that `pipeops control-plane \
                     user create NAME` prints",
                )),
        }
    }
}

/// The file with the contexts of this user.
pub struct ContextStore {
    host: Host,
    dir: String,
}

impl ContextStore {
    /// Below `XDG_CONFIG_HOME`, else below `~/.config` (XDG Base Directory Specification 0.8: a
    /// relative path counts as none).
    ///
    /// # Errors
    /// Exit 2 when the environment names neither.
    pub fn new(env: &BTreeMap<String, String>) -> Result<ContextStore, Failure> {
        let absolute = |name: &str| env.get(name).filter(|path| path.starts_with('/'));
        let home = || absolute("HOME").map(|home| format!("{home}/.config"));
        let base = absolute("XDG_CONFIG_HOME").cloned().or_else(home).ok_or_else(|| {
            Failure::usage("HOME_MISSING", "there is no place for what a login stores")
                .why("neither XDG_CONFIG_HOME nor HOME is an absolute path")
                .hint("set HOME to a directory of yours")
        })?;
        let dir = format!("{}/pipeops", base.trim_end_matches('/'));
        Ok(ContextStore { host: Host::new("/", None), dir })
    }

    pub fn path(&self) -> String {
        format!("{}/{FILE}", self.dir)
    }

    /// # Errors
    /// Exit 2 for a file that cannot be read, or is not what a login wrote.
    pub fn load(&self) -> Result<Contexts, Failure> {
        self.refuse_link()?;
        let read = self.host.read_only_state_dir(&self.dir).read(FILE);
        let Some(text) = read.map_err(|e| unreadable(&self.path(), &e))? else {
            return Ok(Contexts::default());
        };
        // the parser's own text shows lines, and with them a token
        let invalid = |why: &str| {
            Failure::usage("CONTEXTS_INVALID", format!("{} is not what a login wrote", self.path()))
                .why(unquoted(why))
                .hint("correct it, or remove it and log in again")
        };
        let table = DeTable::parse(&text).map_err(|e| invalid(e.message()))?;
        serde_json::from_value(plain(table.get_ref()).into()).map_err(|e| invalid(&e.to_string()))
    }

    /// Changes what is stored: 0600, in a directory of mode 0700. What another process stored
    /// meanwhile stays: it is read again, and nobody else changes it until it is written. Returns
    /// what is stored now, with what `change` returns.
    ///
    /// # Errors
    /// That of `change`, and then nothing is written; exit 2 for a place that cannot be read or
    /// written, 12 while another process holds it.
    pub async fn update<T>(
        &self,
        change: impl FnOnce(&mut Contexts) -> Result<T, Failure>,
    ) -> anyhow::Result<(Contexts, T)> {
        self.refuse_link()?;
        let dir = self.host.state_dir(&self.dir).map_err(|e| self.unwritable(&e))?;
        let end = Instant::now() + LOCK_TIMEOUT;
        let _lock = loop {
            match dir.lock() {
                Ok(lock) => break lock,
                Err(e) if e.downcast_ref::<Failure>().is_none() => return Err(self.unwritable(&e)),
                Err(_) if Instant::now() < end => sleep(LOCK_RETRY).await,
                Err(_) => {
                    let what = format!("another pipeops changes {}", self.path());
                    return Err(Failure::new(Exit::Locked, "LOCKED", what)
                        .hint("wait until it has ended, then run again")
                        .into());
                }
            }
        };
        let mut contexts = self.load()?;
        let done = change(&mut contexts)?;
        let text = toml::to_string(&contexts)?;
        dir.write(FILE, &text).map_err(|e| self.unwritable(&e))?;
        Ok((contexts, done))
    }

    fn unwritable(&self, error: &anyhow::Error) -> anyhow::Error {
        Failure::usage("FILE_UNWRITABLE", format!("cannot write {}", self.path()))
            .why(format!("{:#}", error.root_cause()))
            .hint("check that its directory is yours, and that there is space")
            .into()
    }

    /// A token is neither read from nor written to where a link leads.
    fn refuse_link(&self) -> Result<(), Failure> {
        match self.host.link_target(&self.path()) {
            None => Ok(()),
            Some(target) => {
                let what = format!("{} is a link", self.path());
                Err(Failure::usage("CONTEXTS_INVALID", what)
                    .why(format!("it leads to {target}, and there are tokens in it"))
                    .hint("put the file itself there"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn two() -> Contexts {
        let context = |url: &str| LoginContext {
            url: url.into(),
            token: Secret::new("pou_planted-canary-4711-in-plain-text"),
            ..LoginContext::default()
        };
        let contexts = [
            ("a.example".to_owned(), context("https://a.example")),
            ("b".to_owned(), LoginContext { ca: Some("x\ny\n".into()), ..context("https://b") }),
        ];
        Contexts { current: "b".into(), contexts: contexts.into() }
    }

    #[test]
    fn a_context_is_found_by_its_name_or_because_it_is_the_only_one() {
        let mut contexts = two();
        assert_eq!(contexts.select(None).unwrap().0, "b");
        assert_eq!(contexts.select(Some("a.example")).unwrap().0, "a.example");
        let unknown = contexts.select(Some("a.exampel")).unwrap_err();
        assert_eq!(unknown.code, "CONTEXT_UNKNOWN");
        assert!(unknown.hint.unwrap().contains("did you mean `a.example`?"));
        contexts.current.clear();
        assert_eq!(contexts.select(None).unwrap_err().code, "NOT_LOGGED_IN");
        contexts.contexts.remove("b");
        assert_eq!(contexts.select(None).unwrap().0, "a.example");
        assert_eq!(Contexts::default().select(None).unwrap_err().code, "NOT_LOGGED_IN");
    }

    #[test]
    fn the_place_follows_the_environment() {
        for (given, wanted) in [
            (&[("HOME", "/h")][..], "/h/.config/pipeops/contexts.toml"),
            (&[("HOME", "/h"), ("XDG_CONFIG_HOME", "/x/")], "/x/pipeops/contexts.toml"),
            (&[("HOME", "/h"), ("XDG_CONFIG_HOME", "x")], "/h/.config/pipeops/contexts.toml"),
        ] {
            assert_eq!(ContextStore::new(&env(given)).unwrap().path(), wanted);
        }
        assert_eq!(ContextStore::new(&env(&[])).err().unwrap().code, "HOME_MISSING");
    }

    async fn save(store: &ContextStore, contexts: Contexts) -> anyhow::Result<()> {
        let replace = |stored: &mut Contexts| {
            *stored = contexts;
            Ok(())
        };
        store.update(replace).await.map(drop)
    }

    #[tokio::test]
    async fn what_was_stored_is_read_again_and_by_its_user_alone() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        let store = ContextStore::new(&env(&[("XDG_CONFIG_HOME", home)])).unwrap();
        assert_eq!(store.load().unwrap(), Contexts::default());
        save(&store, two()).await.unwrap();
        save(&store, two()).await.unwrap();
        assert_eq!(store.load().unwrap(), two());
        let refused = store
            .update(|stored| {
                stored.contexts.clear();
                Err::<(), _>(Failure::usage("NO", "no"))
            })
            .await;
        assert!(refused.is_err());
        assert_eq!(store.load().unwrap(), two());
        for (path, mode) in [("pipeops", 0o700), ("pipeops/contexts.toml", 0o600)] {
            let there = dir.path().join(path).symlink_metadata().unwrap().permissions().mode();
            assert_eq!(there & 0o777, mode, "{path}");
        }
        // a fault is named without the token
        let file = dir.path().join("pipeops/contexts.toml");
        let state = Host::new("/", None).state_dir(&format!("{home}/pipeops")).unwrap();
        state.write(FILE, "token = \"planted-canary-4711-in-plain-text\" x\n").unwrap();
        let said = store.load().unwrap_err().render();
        assert!(
            said.contains("CONTEXTS_INVALID") && !said.contains("canary-4711-in-plain-text"),
            "{said}"
        );
        // and no link is followed
        let elsewhere = dir.path().join("elsewhere");
        state.rename(FILE, "moved").unwrap();
        std::os::unix::fs::symlink(&elsewhere, &file).unwrap();
        assert_eq!(store.load().unwrap_err().code, "CONTEXTS_INVALID");
        assert!(save(&store, two()).await.is_err());
        assert!(!elsewhere.exists());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn no_change_undoes_another_one_of_the_same_time() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap().to_owned();
        let add = |name: String| {
            let store = ContextStore::new(&env(&[("XDG_CONFIG_HOME", &home)])).unwrap();
            tokio::spawn(async move {
                let change = |contexts: &mut Contexts| {
                    contexts.contexts.insert(name, LoginContext::default());
                    Ok(())
                };
                store.update(change).await.unwrap();
            })
        };
        let all: Vec<_> = (0..8).map(|n| add(format!("c-{n}"))).collect();
        for one in all {
            one.await.unwrap();
        }
        let store = ContextStore::new(&env(&[("XDG_CONFIG_HOME", &home)])).unwrap();
        assert_eq!(store.load().unwrap().contexts.len(), 8);
    }
}
