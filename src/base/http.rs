//! What everything that speaks HTTP needs: an address that may be called, the clock of an answer,
//! the cause of an error, a proxy that may be written down.

/// Checks the address of a control plane: https, or http to this machine itself.
///
/// # Errors
/// Why it cannot be used.
pub fn check_url(text: &str) -> Result<(), String> {
    let url = url::Url::parse(text).map_err(|e| format!("`{text}` is no URL: {e}"))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("a control plane's URL carries no user and no password".into());
    }
    let loopback = match url.host() {
        Some(url::Host::Ipv4(a)) => a.is_loopback(),
        Some(url::Host::Ipv6(a)) => a.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => return Err(format!("`{text}` names no host")),
    };
    match url.scheme() {
        "https" => Ok(()),
        "http" if loopback => Ok(()),
        "http" => Err(format!(
            "`{text}` would send the token in clear: use https (http is for loopback only)"
        )),
        other => Err(format!("`{other}` is no scheme for a control plane: use https")),
    }
}

/// This clock minus the one in the answer's `Date`, seconds.
pub fn clock_offset(answer: &reqwest::Response) -> Option<i64> {
    let date = answer.headers().get(reqwest::header::DATE)?.to_str().ok()?;
    let then = jiff::fmt::rfc2822::parse(date).ok()?.timestamp();
    Some(jiff::Timestamp::now().as_second() - then.as_second())
}

/// The cause chain of a transport error in one line: DNS, refused, TLS and time-out read
/// differently.
pub fn explain(error: &reqwest::Error) -> String {
    let mut text = Vec::new();
    let mut at: Option<&dyn std::error::Error> = Some(error);
    while let Some(cause) = at {
        let line = cause.to_string();
        if !text.iter().any(|t: &String| t.contains(&line)) {
            text.push(line);
        }
        at = cause.source();
    }
    text.join(": ")
}

/// A proxy's URL as it may stand in a file that everybody reads; none where it holds a user or
/// password, or is none.
pub fn credential_free_proxy(proxy: &str) -> Option<String> {
    let text = if proxy.contains("://") { proxy.to_owned() } else { format!("http://{proxy}") };
    let url = url::Url::parse(&text).ok()?;
    let plain = matches!(url.scheme(), "http" | "https")
        && url.host().is_some()
        && url.username().is_empty()
        && url.password().is_none();
    plain.then_some(text)
}
