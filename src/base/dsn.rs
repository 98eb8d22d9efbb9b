//! URLs of a database and of a message broker, checked before a connection is tried. Each error has
//! its reason, and none quotes a part of a password.

use std::fmt::Write as _;

use crate::base::error::nearest;
use crate::base::secret::Secret;

/// Query parameters that sqlx understands (sqlx 0.9, `sqlx-postgres/src/options/parse.rs`).
const PARAMETERS: &[&str] = &[
    "application_name",
    "dbname",
    "host",
    "hostaddr",
    "options",
    "password",
    "port",
    "ssl-ca",
    "ssl-cert",
    "ssl-key",
    "ssl-mode",
    "ssl-root-cert",
    "sslcert",
    "sslkey",
    "sslmode",
    "sslrootcert",
    "statement-cache-capacity",
    "user",
];
const SSL_MODES: &[&str] = &["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];
const ENCODE: &str = "write @ as %40, / as %2F, : as %3A, # as %23, ? as %3F and % as %25 \
                      in a user name and a password";

/// The scheme in lower case, and what follows it.
fn scheme(text: &str) -> Result<(String, &str), String> {
    let (scheme, rest) = text.split_once(':').ok_or("it has no scheme")?;
    let plain = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
    if plain {
        Ok((scheme.to_ascii_lowercase(), rest))
    } else {
        Err("it begins with no scheme".into())
    }
}

/// A URL's parts, as it is written: nothing is decoded.
struct Parts<'a> {
    user: Option<&'a str>,
    host: &'a str,
    /// Path and query, with what separates them.
    path: &'a str,
    query: &'a str,
}

fn parts(rest: &str) -> Result<Parts<'_>, String> {
    let rest = rest.strip_prefix("//").ok_or("there is no // behind its scheme")?;
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, tail) = rest.split_at(end);
    let (path, query) = tail.split_once('?').unwrap_or((tail, ""));
    // the path begins with the first of these: an @ after it means that it was part of a password
    if path.contains('@') || (tail.contains('@') && !authority.contains('@')) {
        return Err(format!(
            "its password holds a /, ? or # as it is, which ends the host there: {ENCODE}"
        ));
    }
    if tail.contains('#') {
        return Err(format!("it holds a # as it is, which ends it: {ENCODE}"));
    }
    let (user, host) = match authority.rsplit_once('@') {
        Some((user, host)) => (Some(user), host),
        None => (None, authority),
    };
    if user.is_some_and(badly_encoded) {
        return Err(format!(
            "its user or password holds a % without two hexadecimal digits behind it: {ENCODE}"
        ));
    }
    Ok(Parts { user, host, path, query })
}

fn badly_encoded(text: &str) -> bool {
    let digits = |from: usize| {
        text.as_bytes().get(from..from + 2).is_some_and(|d| d.iter().all(u8::is_ascii_hexdigit))
    };
    text.match_indices('%').any(|(at, _)| !digits(at + 1))
}

/// Host and port, of which there is one.
fn host(host: &str) -> Result<(), String> {
    if host.contains(',') {
        let why = "it names several hosts, and one is asked: name the one that writes, \
                   or a name that follows it";
        return Err(why.into());
    }
    let port = match host.strip_prefix('[') {
        Some(v6) => {
            let (address, port) =
                v6.split_once(']').ok_or("its host begins with [ and has no ]")?;
            address.parse::<std::net::Ipv6Addr>().map_err(|_| {
                format!("`{}` is no IPv6 address", crate::base::text::printable(address))
            })?;
            if !port.is_empty() && !port.starts_with(':') {
                return Err("there is something between ] and the port".into());
            }
            port.trim_start_matches(':')
        }
        None if host.matches(':').count() > 1 => {
            return Err("an IPv6 address needs brackets: [2001:db8::1]:5432".into());
        }
        None => host.split_once(':').map_or("", |(_, port)| port),
    };
    // the text may be the rest of a password
    if !port.is_empty() && port.parse::<u16>().map_or(true, |n| n == 0) {
        return Err(format!(
            "its port is no number from 1 to 65535; where it is the end of a password: {ENCODE}"
        ));
    }
    Ok(())
}

/// A database's URL, checked and in the form that the driver reads.
///
/// # Errors
/// Why it cannot be used.
pub fn database(url: &Secret) -> Result<Secret, String> {
    let text = url.expose().trim();
    if text.is_empty() {
        return Err("it is empty".into());
    }
    if !text.contains("://")
        && (text.starts_with("host=") || text.contains(" host=") || text.contains(" dbname="))
    {
        return Err("these are keywords of libpq, and a URL is wanted".into());
    }
    let (scheme, rest) = scheme(text)?;
    match scheme.as_str() {
        "sqlite" => return Ok(Secret::new(format!("sqlite:{rest}"))),
        "postgres" | "postgresql" => {}
        other => {
            return Err(format!("its scheme is `{other}`: PostgreSQL and SQLite are understood"));
        }
    }
    let Parts { user, host: named, path, query } = parts(rest)?;
    host(named)?;
    let mut elsewhere = false;
    for (key, value) in url::form_urlencoded::parse(query.as_bytes()) {
        let known = PARAMETERS.contains(&&*key) || key.starts_with("options[");
        if !known {
            let near = nearest(&key, PARAMETERS.iter().copied())
                .map(|near| format!("; did you mean `{near}`?"))
                .unwrap_or_default();
            return Err(format!(
                "`{}` is no parameter of it{near}",
                crate::base::text::printable(&key).chars().take(40).collect::<String>()
            ));
        }
        match &*key {
            "sslmode" | "ssl-mode" if !SSL_MODES.contains(&&*value) => {
                return Err(format!("sslmode is one of {}", SSL_MODES.join(", ")));
            }
            "port" if value.parse::<u16>().map_or(true, |n| n == 0) => {
                return Err("the parameter port is no number from 1 to 65535".into());
            }
            "hostaddr" if value.parse::<std::net::IpAddr>().is_err() => {
                return Err("the parameter hostaddr is no IP address".into());
            }
            "host" if value.contains(',') => host(&value)?,
            "host" | "hostaddr" => elsewhere = true,
            _ => {}
        }
    }
    let mut made = format!("{scheme}://");
    match user {
        // the driver refuses a URL with a user and no host: the directory of a socket is in `host=`
        Some(user) if named.is_empty() => {
            if !elsewhere {
                return Err("it names no host: HOST, or ?host=/run/postgresql for a socket".into());
            }
            let (name, password) = user.split_once(':').unwrap_or((user, ""));
            let _ = write!(made, "{path}?{query}&user={}", name.replace('+', "%2B"));
            if !password.is_empty() {
                let _ =
                    write!(made, "&password={}", password.replace('+', "%2B").replace('&', "%26"));
            }
        }
        Some(user) => {
            let _ = write!(made, "{user}@{named}{path}");
            if !query.is_empty() {
                let _ = write!(made, "?{query}");
            }
        }
        None => {
            let _ = write!(made, "{named}{path}");
            if !query.is_empty() {
                let _ = write!(made, "?{query}");
            }
        }
    }
    url::Url::parse(&made).map_err(|e| format!("it is no URL: {e}"))?;
    Ok(Secret::new(made))
}

/// A message broker's URL, checked.
///
/// # Errors
/// Why it cannot be used.
pub fn broker(url: &Secret) -> Result<Secret, String> {
    let text = url.expose().trim();
    let (scheme, rest) = scheme(text)?;
    if !matches!(scheme.as_str(), "amqp" | "amqps") {
        return Err(format!("its scheme is `{scheme}`, neither amqp nor amqps"));
    }
    let Parts { user, host: named, path, query } = parts(rest)?;
    if named.is_empty() || named.starts_with(':') {
        return Err("it names no host".into());
    }
    host(named)?;
    if path.trim_start_matches('/').contains('/') {
        return Err("its virtual host holds a / as it is: write %2F".into());
    }
    let user = user.map(|user| format!("{user}@")).unwrap_or_default();
    let query = if query.is_empty() { String::new() } else { format!("?{query}") };
    let made = format!("{scheme}://{user}{named}{path}{query}");
    url::Url::parse(&made).map_err(|e| format!("it is no URL: {e}"))?;
    Ok(Secret::new(made))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CANARY: &str = "planted-canary-of-a-password-canary-4711-in-plain-text";

    #[test]
    fn a_database_url_that_is_wrong_says_why_and_nothing_of_its_password() {
        for (url, why) in [
            ("postgres://u:CANARY/x@db.test/cp", "%2F"),
            ("postgres://u:CANARY#x@db.test/cp", "%23"),
            ("postgres://u:CANARY?x@db.test/cp", "%3F"),
            ("postgres://u:1/CANARY@db.test/cp", "%2F"),
            ("postgres://u:CANARY@x/y@db.test/cp", "%2F"),
            ("postgres://u:CANARY%zz@db.test/cp", "%25"),
            ("postgres://u:100%CANARY@db.test/cp", "%25"),
            ("postgres://u:CANARY@db.test/cp#x", "ends it"),
            ("postgres://u:CANARY@db1.test:5432,db2.test:5432/cp", "several hosts"),
            ("postgres:///cp?host=a,b&password=CANARY", "several hosts"),
            ("postgres://u:CANARY@2001:db8::1/cp", "brackets"),
            ("postgres://u:CANARY@[2001:db8::1/cp", "no ]"),
            ("postgres://u:CANARY@db.test:port/cp", "port is no number"),
            ("postgres://u:CANARY@db.test:0/cp", "port is no number"),
            ("postgres://db.test:CANARY", "port is no number"),
            ("postgres://u:CANARY@/cp", "no host"),
            ("postgres://u:CANARY@db.test/cp?sslmod=require", "did you mean `sslmode`?"),
            ("postgres://u@db.test/cp?passwort=CANARY", "did you mean `password`?"),
            ("postgres://u:CANARY@db.test/cp?sslmode=on", "verify-full"),
            ("postgres:/u:CANARY@db.test/cp", "no //"),
            ("mysql://u:CANARY@db.test/cp", "`mysql`"),
            ("jdbc:postgresql://db.test/cp?password=CANARY", "`jdbc`"),
            ("host=db.test user=u password=CANARY", "libpq"),
            ("db.test", "no scheme"),
            ("/var/lib/CANARY", "no scheme"),
            ("", "empty"),
        ] {
            let said = database(&Secret::new(url.replace("CANARY", CANARY))).unwrap_err();
            assert!(said.contains(why), "{url}: {said}");
            assert!(!said.contains("canary-4711-in-plain-text"), "{url}: {said}");
        }
    }

    #[test]
    fn what_people_write_becomes_what_the_driver_reads() {
        for (url, expected) in [
            ("POSTGRES://u:p@db.test/cp", "postgres://u:p@db.test/cp"),
            (
                "PostgreSQL://u:p@db.test:5433/cp?sslmode=require\n",
                "postgresql://u:p@db.test:5433/cp?sslmode=require",
            ),
            ("postgres://u:p%40%2F%3A%23@db.test/cp", "postgres://u:p%40%2F%3A%23@db.test/cp"),
            ("postgres://u:p@q:r@db.test/cp", "postgres://u:p@q:r@db.test/cp"),
            ("postgres:///cp?host=/run/postgresql", "postgres:///cp?host=/run/postgresql"),
            (
                "postgres://u:p%2B@/cp?host=/run/postgresql",
                "postgres:///cp?host=/run/postgresql&user=u&password=p%2B",
            ),
            (
                "postgres://u@/cp?host=/run/postgresql&port=5433",
                "postgres:///cp?host=/run/postgresql&port=5433&user=u",
            ),
            ("postgres://%2Frun%2Fpostgresql/cp", "postgres://%2Frun%2Fpostgresql/cp"),
            ("postgres://u:p@[2001:db8::1]:5432/cp", "postgres://u:p@[2001:db8::1]:5432/cp"),
            ("SQLITE:/var/lib/x.db", "sqlite:/var/lib/x.db"),
            ("sqlite://x.db?mode=rw", "sqlite://x.db?mode=rw"),
        ] {
            let made = database(&Secret::new(url)).unwrap_or_else(|why| panic!("{url}: {why}"));
            assert_eq!(made.expose(), expected);
        }
    }

    #[test]
    fn a_brokers_url_is_judged_the_same_way() {
        for (url, why) in [
            ("amqp://u:CANARY/x@mq.test/", "%2F"),
            ("amqp://u:CANARY#@mq.test/", "%23"),
            ("amqps://u:CANARY%@mq.test/", "%25"),
            ("amqp://u:CANARY@mq1.test,mq2.test/", "several hosts"),
            ("amqp://u:CANARY@mq.test/a/b", "%2F"),
            ("amqp://u:CANARY@/", "no host"),
            ("amqp:mq.test", "no //"),
            ("http://u:CANARY@mq.test/", "neither amqp nor amqps"),
        ] {
            let said = broker(&Secret::new(url.replace("CANARY", CANARY))).unwrap_err();
            assert!(
                said.contains(why) && !said.contains("canary-4711-in-plain-text"),
                "{url}: {said}"
            );
        }
        assert_eq!(
            broker(&Secret::new("AMQPS://u:p@mq.test:5671/%2Fv\n")).unwrap().expose(),
            "amqps://u:p@mq.test:5671/%2Fv"
        );
        assert_eq!(broker(&Secret::new("amqp://mq.test")).unwrap().expose(), "amqp://mq.test");
    }
}
