//! Addresses and routes, from the output of `ip`.

use super::TIMEOUT;
use crate::host::{Host, program::Output};
use crate::install::facts::{Interface, Route, parse};

/// Interfaces and routes, and why they are not known where they are not.
pub(super) async fn network(host: &Host) -> (Vec<Interface>, Vec<Route>, Option<String>) {
    let (addresses, routes, routes6) = tokio::join!(
        host.output("ip", &["-j", "address", "show"], TIMEOUT),
        host.output("ip", &["-j", "-4", "route", "show"], TIMEOUT),
        host.output("ip", &["-j", "-6", "route", "show"], TIMEOUT),
    );
    let interfaces = answer("ip -j address show", addresses, parse::ip_addresses);
    let routes = answer("ip -j -4 route show", routes, |text| parse::ip_routes(text, false));
    match (interfaces, routes) {
        (Ok(interfaces), Ok(mut routes)) => {
            // a kernel without IPv6 answers with an error: there are no such routes then
            routes.extend(
                answer("ip -j -6 route show", routes6, |text| parse::ip_routes(text, true))
                    .unwrap_or_default(),
            );
            (interfaces, routes, None)
        }
        (interfaces, routes) => {
            let fault = interfaces.as_ref().err().or(routes.as_ref().err()).cloned();
            (interfaces.unwrap_or_default(), routes.unwrap_or_default(), fault)
        }
    }
}

/// What a program said as `read` reads it, or why not. Versions before 4.17 ignore `-j` here and
/// there, and succeed.
fn answer<T>(
    line: &str,
    output: anyhow::Result<Output>,
    read: impl Fn(&str) -> Option<T>,
) -> Result<T, String> {
    let output = output.map_err(|error| format!("{error:#}"))?;
    if !output.ok() {
        let why = output.stderr.lines().next().unwrap_or_default().trim().to_owned();
        return Err(format!("`{line}` ended with {}: {why}", output.status)
            .trim_end_matches([':', ' '])
            .to_owned());
    }
    read(&output.stdout).ok_or_else(|| format!("`{line}` does not answer in JSON"))
}
