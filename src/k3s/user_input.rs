//! MASTER as an operator types or pastes it: each wrong form has its own message.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Invisible characters: byte order mark, zero widths, soft hyphen, direction marks.
pub fn is_invisible(c: char) -> bool {
    matches!(c, '\u{feff}' | '\u{200b}'..='\u{200f}' | '\u{2060}'..='\u{2064}' | '\u{ad}')
        || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        || c.is_control()
}

/// Quotes of keyboards and of word processors.
pub fn is_quote(c: char) -> bool {
    matches!(c, '"' | '\'' | '`' | '“' | '”' | '„' | '‘' | '’' | '«' | '»')
}

/// MASTER: address, name, IPv6 with or without brackets, URL, each with or without port.
///
/// Gives `https://HOST:PORT`; the port defaults to 6443 (a URL without a port is accepted by k3s
/// and then hangs, k3s#11808).
///
/// # Errors
/// A sentence that quotes the text, unless it may hold a secret.
pub fn server_url(text: &str) -> Result<String, String> {
    let text = text.trim();
    if text.starts_with("K10") || text.contains("::server:") || text.contains("::node:") {
        return Err(
            "this is a token, not the address of a server: MASTER comes first, then TOKEN".into()
        );
    }
    let shown: String = if text.contains('@') {
        "MASTER".into()
    } else {
        text.chars().map(|c| if is_invisible(c) { '�' } else { c }).collect()
    };
    let fault = |why: &str| format!("`{shown}` is not the address of a server: {why}");
    if let Some(c) = text.chars().find(|c| is_invisible(*c)) {
        return Err(fault(&format!(
            "there is an invisible character in it (U+{:04X}): type it instead of pasting it",
            u32::from(c)
        )));
    }
    if let Some(c) = text.chars().find(|c| is_quote(*c)) {
        return Err(fault(&format!("there is a quote in it ({c}): leave it out")));
    }
    let rest = match text.split_once("://") {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => rest,
        Some((scheme, _)) => return Err(fault(&format!("scheme `{scheme}` is not https"))),
        None if text.get(..5).is_some_and(|s| s.eq_ignore_ascii_case("https"))
            && text[5..].starts_with([':', '/']) =>
        {
            return Err(fault("a URL begins with https://"));
        }
        None => text,
    };
    let rest = rest.trim_end_matches('/');
    if rest.contains('@') {
        return Err(fault("there is a login in it; a worker proves itself by its token alone"));
    }
    if rest.contains(char::is_whitespace) {
        return Err(fault("there is a blank in it"));
    }
    if let Some((_, zone)) = rest.split_once('%') {
        let zone = zone.trim_start_matches("25").split([']', ':', '/']).next().unwrap_or_default();
        return Err(fault(&format!(
            "the zone (%{zone}) means something on this machine only; give a name or an address \
             that is no link-local one"
        )));
    }
    if rest.contains(['/', '?', '#']) {
        return Err(fault(
            "nothing comes after the port: give ADDRESS, NAME, or https://NAME:PORT",
        ));
    }
    let (host, port) = split(rest).map_err(fault)?;
    let port = match port {
        None => 6443,
        Some(p) if !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()) => {
            p.parse::<u16>().ok().filter(|p| *p > 0).ok_or_else(|| fault("no such port"))?
        }
        Some(_) => return Err(fault("the port is not a number")),
    };
    if !host.starts_with('[') {
        check_host(&host).map_err(|why| fault(&why))?;
    }
    let parsed =
        url::Url::parse(&format!("https://{host}:{port}")).map_err(|e| fault(&e.to_string()))?;
    // what IDNA makes of a letter may be more than letters: `⒮` becomes `(s)`, and `１` a digit
    match parsed.host() {
        Some(url::Host::Domain(name)) => {
            check_host(name.trim_end_matches('.')).map_err(|why| fault(&why))?
        }
        Some(url::Host::Ipv4(read)) if host.parse() != Ok(read) => {
            return Err(fault(&format!("is {read} meant? Write it that way")));
        }
        _ => {}
    }
    let host = parsed
        .host_str()
        .map(|h| h.trim_end_matches('.'))
        .filter(|h| !h.is_empty())
        .ok_or_else(|| fault("no host"))?;
    // url drops :443 as https' default; k3s needs it said
    Ok(format!("https://{host}:{port}"))
}

/// Host, IPv6 in brackets, and port.
fn split(rest: &str) -> Result<(String, Option<&str>), &'static str> {
    if rest.parse::<Ipv6Addr>().is_ok() {
        return Ok((format!("[{rest}]"), None));
    }
    if let Some(bracketed) = rest.strip_prefix('[') {
        let (inside, after) = bracketed.split_once(']').ok_or("a bracket is not closed")?;
        inside
            .parse::<Ipv6Addr>()
            .map_err(|_| "what stands in the brackets is not an IPv6 address")?;
        let port = match after {
            "" => None,
            port => Some(port.strip_prefix(':').ok_or("after the bracket comes :PORT")?),
        };
        return Ok((format!("[{inside}]"), port));
    }
    match rest.split_once(':') {
        Some((_, port)) if port.contains(':') => Err("it is neither NAME:PORT nor an IPv6 address"),
        Some((host, port)) => Ok((host.to_owned(), Some(port))),
        None => Ok((rest.to_owned(), None)),
    }
}

/// A name as DNS and /etc/hosts have it, `_` included, or an IPv4 address as people write it.
///
/// The URL standard reads `010` as eight and `10.5` as 10.0.0.5: such an address is not what was
/// meant.
fn check_host(host: &str) -> Result<(), String> {
    if host.is_empty() {
        return Err("give ADDRESS, NAME, or https://NAME:PORT".into());
    }
    let labels: Vec<&str> = host.trim_end_matches('.').split('.').collect();
    let number = |l: &&str| {
        !l.is_empty()
            && (l.bytes().all(|b| b.is_ascii_digit())
                || l.to_ascii_lowercase()
                    .strip_prefix("0x")
                    .is_some_and(|h| h.bytes().all(|b| b.is_ascii_hexdigit())))
    };
    if labels.last().is_some_and(number) {
        if labels.iter().all(|l| !l.is_empty() && l.bytes().all(|b| b.is_ascii_digit()))
            && labels.iter().any(|l| l.len() > 1 && l.starts_with('0'))
        {
            let plain: Vec<&str> = labels
                .iter()
                .map(|l| Some(l.trim_start_matches('0')).filter(|l| !l.is_empty()).unwrap_or("0"))
                .collect();
            return Err(format!(
                "a leading zero makes a number octal; is {} meant?",
                plain.join(".")
            ));
        }
        return host
            .parse::<Ipv4Addr>()
            .map(drop)
            .map_err(|_| "an IPv4 address has four numbers up to 255".into());
    }
    if let Some(c) = host
        .chars()
        .find(|c| c.is_ascii() && !c.is_ascii_alphanumeric() && !matches!(c, '-' | '_' | '.'))
    {
        return Err(format!("`{c}` cannot stand in a name"));
    }
    if labels.iter().any(|l| l.is_empty()) {
        return Err("a name has no empty part between its dots".into());
    }
    match labels.iter().find(|l| l.len() > 63 || l.starts_with('-') || l.ends_with('-')) {
        Some(label) => Err(format!("`{label}` cannot be a part of a name")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_master_may_be_typed_in_many_ways() {
        for (typed, url) in [
            ("10.0.0.1", "https://10.0.0.1:6443"),
            ("https://cp.example.com", "https://cp.example.com:6443"),
            ("HTTPS://127.0.0.1:16443", "https://127.0.0.1:16443"),
            ("Https://CP.Example.com./", "https://cp.example.com:6443"),
            ("cp.example.com:443", "https://cp.example.com:443"),
            ("k3s_master:16443", "https://k3s_master:16443"),
            ("_a.b_", "https://_a.b_:6443"),
            ("bücher.example", "https://xn--bcher-kva.example:6443"),
            ("fd00::1", "https://[fd00::1]:6443"),
            ("[fd00::1]:7443", "https://[fd00::1]:7443"),
            ("https://[fd00::1]/", "https://[fd00::1]:6443"),
            ("\r\n10.0.0.1\r\n", "https://10.0.0.1:6443"),
        ] {
            assert_eq!(server_url(typed).as_deref(), Ok(url), "{typed}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (bad, why) in [
            ("", "give ADDRESS"),
            ("http://10.0.0.1", "scheme `http` is not https"),
            ("https:10.0.0.1", "begins with https://"),
            ("https//10.0.0.1", "begins with https://"),
            ("a b", "a blank"),
            ("10.0.0.1 6443", "a blank"),
            ("10.0.0.1:", "the port is not a number"),
            ("10.0.0.1:64x3", "the port is not a number"),
            ("10.0.0.1:99999", "no such port"),
            ("host:0", "no such port"),
            ("[fd00::1", "not closed"),
            ("[fd00::g]", "in the brackets"),
            ("fd00::g", "neither NAME:PORT nor an IPv6"),
            ("fe80::1%eth0", "the zone (%eth0)"),
            ("https://[fe80::1%25eth0]:6443", "the zone (%eth0)"),
            ("host/path", "after the port"),
            ("https://host:6443/cacerts", "after the port"),
            ("\"https://10.0.0.1\"", "a quote in it (\")"),
            ("“10.0.0.1”", "a quote in it (“)"),
            ("\u{feff}10.0.0.1", "U+FEFF"),
            ("10.0.0.1\u{200b}", "U+200B"),
            ("10.0.0\u{ad}.1", "U+00AD"),
            ("010.000.000.005", "is 10.0.0.5 meant?"),
            ("10.0.0.08", "is 10.0.0.8 meant?"),
            ("10.0.5", "four numbers"),
            ("2130706433", "four numbers"),
            ("0x7f.0.0.1", "four numbers"),
            ("10.0.0.256", "four numbers"),
            ("a..b", "no empty part"),
            ("-a.b", "`-a` cannot"),
            ("a,b", "`,` cannot"),
            ("1\u{24ae}00", "`(` cannot"),
            ("a\u{2474}.b", "`(` cannot"),
            ("\u{ff11}0.0.0.5", "four numbers"),
            ("10.0.0.\u{ff10}\u{ff11}", "is 10.0.0.1 meant?"),
        ] {
            assert!(
                server_url(bad).is_err_and(|w| w.contains(why)),
                "{bad}: {:?}",
                server_url(bad)
            );
        }
        for secret in [
            "u:planted-password-4711@10.0.0.1",
            "https://u:planted-password-4711@h",
            "K10aa::server:planted-password-4711",
        ] {
            assert!(
                server_url(secret).is_err_and(|w| !w.contains("planted-password-4711")),
                "{secret}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_passes_is_a_url(text in "\\PC{0,40}") {
            if let Ok(url) = server_url(&text) {
                prop_assert!(url::Url::parse(&url).is_ok());
                let again = server_url(&url);
                prop_assert_eq!(again, Ok(url));
            }
        }
    }
}
