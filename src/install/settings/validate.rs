//! One function a group of options: what is wrong with them, in the words of the flag.

use std::net::IpAddr;
use std::time::Duration;

use super::{Options, owned_k3s_key, parse_duration};
use crate::base::cidr::Cidr;
use crate::base::error::nearest;
use crate::base::text::is_dns_name;
use crate::contract::selector::parse_labels;
use crate::contract::token::Role;
use crate::k3s::values;
use crate::k3s::version::Version;

/// `; did you mean X?`, or nothing.
fn suggestion(wrong: &str, known: &[&str]) -> String {
    nearest(wrong, known.iter().copied())
        .map(|near| format!("; did you mean {near}?"))
        .unwrap_or_default()
}

pub(super) fn ignored_codes(options: &Options, codes: &[&str], faults: &mut Vec<String>) {
    for code in options.ignore.iter().filter(|code| !codes.contains(&code.as_str())) {
        let near = suggestion(code, codes);
        faults.push(format!("--ignore: unknown finding code `{code}`{near}"));
    }
}

/// Which k3s: gives the version, where one is named.
pub(super) fn release(options: &Options, faults: &mut Vec<String>) -> Option<Version> {
    let version = options.k3s_version.as_deref().and_then(|v| match v.parse::<Version>() {
        Ok(version) => Some(version),
        Err(why) => {
            faults.push(format!("--k3s-version: {why}"));
            None
        }
    });
    if options.k3s_version.is_some() && options.channel.is_some() {
        faults.push("--k3s-version and --channel exclude each other".into());
    }
    if options.channel.is_some() && options.offline_dir.is_some() {
        faults.push(
            "--channel and --offline-dir exclude each other: a channel is looked up in the \
             network; name the version with --k3s-version"
                .into(),
        );
    }
    if let Some(channel) = &options.channel
        && (channel.is_empty()
            || !channel.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-')))
    {
        faults
            .push(format!("--channel: `{channel}` is not a channel name such as stable or v1.36"));
    }
    if let Some(hex) = &options.k3s_sha256
        && (hex.len() != 64 || !hex.chars().all(|c| c.is_ascii_hexdigit()))
    {
        faults.push("--k3s-sha256: a sha256 is 64 hexadecimal digits".into());
    }
    version
}

pub(super) fn node(options: &Options, faults: &mut Vec<String>) {
    for ip in &options.node_ip {
        if ip.parse::<IpAddr>().is_err() {
            faults.push(format!("--node-ip: `{ip}` is not an IP address"));
        }
    }
    for cidr in &options.api_allow {
        if Cidr::parse(cidr).is_none() {
            faults.push(format!("--api-allow: `{cidr}` is not a network such as 203.0.113.0/24"));
        }
    }
    if let Some(name) = &options.node_name
        && !is_dns_name(name)
    {
        faults.push(format!("--node-name: `{name}` is not a lower-case DNS name"));
    }
    faults.extend(
        options
            .node_label
            .iter()
            .filter_map(|l| values::check_label(l).err())
            .map(|why| format!("--node-label: {why}")),
    );
    faults.extend(
        values::taint_faults(&options.node_taint)
            .into_iter()
            .map(|why| format!("--node-taint: {why}")),
    );
}

pub(super) fn server(options: &Options, faults: &mut Vec<String>) {
    faults.extend(
        options
            .tls_san
            .iter()
            .filter_map(|s| values::san_fault(s))
            .map(|why| format!("--tls-san: {why}")),
    );
    if let Some(mail) = &options.acme_email
        && !(mail.split('@').count() == 2
            && mail.split('@').all(|part| !part.is_empty())
            && !mail.contains(char::is_whitespace))
    {
        faults.push(format!("--acme-email: `{mail}` is not a mail address"));
    }
    faults.extend(
        parse_labels(&options.cluster_label).err().map(|e| format!("--cluster-label: {e}")),
    );
}

/// The chosen components; `None` where none are named.
pub(super) fn components(
    options: &Options,
    known: &[&str],
    faults: &mut Vec<String>,
) -> Option<Vec<String>> {
    let list = match options.components.as_slice() {
        [] => return None,
        [only] if only == "none" => return Some(Vec::new()),
        list => list,
    };
    if list.iter().any(|name| name == "none") {
        faults.push("--components: `none` stands alone, or not at all".into());
    }
    for name in list.iter().filter(|name| *name != "none" && !known.contains(&name.as_str())) {
        let (near, all) = (suggestion(name, known), known.join(", "));
        faults.push(format!(
            "--components: unknown component `{name}`{near} (known: {all}, or none alone)"
        ));
    }
    let has = |name: &str| list.iter().any(|n| n == name);
    if has("ingress") && has("traefik") {
        faults.push(
            "--components: ingress and traefik both answer on ports 80 and 443; choose one".into(),
        );
    }
    Some(list.to_vec())
}

pub(super) fn max_role(options: &Options, faults: &mut Vec<String>) -> Role {
    match options.max_role.as_deref() {
        None => Role::Operator,
        Some(text) => Role::from_name(text).unwrap_or_else(|| {
            faults
                .push(format!("--max-role: `{text}` is none of viewer, deployer, operator, admin"));
            Role::Operator
        }),
    }
}

pub(super) fn timeout(options: &Options, faults: &mut Vec<String>) -> Duration {
    match options.timeout.as_deref().map(parse_duration) {
        None => Duration::from_secs(300),
        Some(Some(time)) if !time.is_zero() => time,
        Some(_) => {
            faults.push("--timeout: give a time such as 300s, 10m or 1h".into());
            Duration::ZERO
        }
    }
}

pub(super) fn artifact_url(options: &Options, faults: &mut Vec<String>) {
    if let Some(url) = &options.artifact_url
        && !url::Url::parse(url).is_ok_and(|u| {
            matches!(u.scheme(), "http" | "https") && u.query().or(u.fragment()).is_none()
        })
    {
        faults.push(format!(
            "--artifact-url: `{url}` is not an http or https URL without `?` and `#`"
        ));
    }
}

pub(super) fn control_plane(url: &str, pins: &[String], faults: &mut Vec<String>) {
    faults.extend(control_plane_url(url).err());
    for pin in pins {
        use base64::Engine as _;
        let ok = pin
            .strip_prefix("sha256:")
            .and_then(|b| base64::engine::general_purpose::STANDARD.decode(b).ok())
            .is_some_and(|bytes| bytes.len() == 32);
        if !ok {
            faults.push("--control-plane-pin: a pin is sha256: and the base64 of 32 bytes".into());
        }
    }
    if pins.len() > 2 {
        faults.push("--control-plane-pin: at most two pins (present and next)".into());
    }
}

pub(super) fn k3s_table(options: &Options, faults: &mut Vec<String>) {
    for key in options.k3s.keys() {
        if let Some(flag) = owned_k3s_key(key) {
            faults.push(format!("[k3s] {key}: pipeops owns this setting; use {flag}"));
        }
    }
    faults.extend(values::faults(&options.k3s));
}

/// https anywhere, plain http only to this machine itself.
fn control_plane_url(text: &str) -> Result<(), String> {
    // `name:8443` is a URL too, of the scheme `name`; a login is never shown
    let https = format!("https://{text}");
    if !text.contains("://") && !text.contains('@') && url::Url::parse(&https).is_ok() {
        return Err(format!("--control-plane-url: `{text}` has no scheme; write {https}"));
    }
    let url = url::Url::parse(text)
        .map_err(|e| format!("--control-plane-url: `{text}` is not a URL ({e})"))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(
            "--control-plane-url: it has a login in it; the agent proves itself by its token \
             (--agent-token-file)"
                .into(),
        );
    }
    let loopback = match url.host() {
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    };
    match url.scheme() {
        "https" => Ok(()),
        "http" if loopback => Ok(()),
        "http" => Err(format!(
            "--control-plane-url: `{text}` must be https (http is allowed only to this machine \
             itself)"
        )),
        other => Err(format!("--control-plane-url: scheme `{other}` is not https")),
    }
}
