//! Where this machine is: its cloud provider by what the firmware says, its region and zone by that
//! provider's metadata service.
//!
//! A machine whose firmware names no provider asks nobody. What is not in the form of that provider
//! is no answer. Sources: cloud-init 25.1, `tools/ds-identify`, for the firmware; the providers'
//! own documentation of their services for the rest.

use std::time::{Duration, Instant};

use reqwest::{Client, RequestBuilder};
use serde_json::{Value, json};

use super::session::identity::{is_machine_known, machine_digest};
use crate::base::resolve::Resolver;
use crate::base::text::{is_dns_label, is_label_value};
use crate::base::trust::Trust;
use crate::host::Host;
use crate::host::state::StateDir;

/// The same address at all providers.
pub(super) const METADATA_URL: &str = "http://169.254.169.254";

/// Time for all requests together: the agent starts later by no more than this.
const TIME: Duration = Duration::from_secs(1);
/// Longest answer, bytes.
const MAX_ANSWER: usize = 64 << 10;
/// What was learned last, for a start at which the service does not answer.
const PLACE_FILE: &str = "place.json";

/// Each is empty where it is not known.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Place {
    pub(super) provider: String,
    pub(super) region: String,
    pub(super) zone: String,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Provider {
    Aws,
    Gcp,
    Azure,
    Hetzner,
    DigitalOcean,
    OpenStack,
}

/// Region and zone.
type Location = (String, String);

impl Provider {
    /// The provider whose machine this is; `firmware` gives a file of `/sys/class/dmi/id`.
    fn of_machine(firmware: &dyn Fn(&str) -> String) -> Option<Provider> {
        let vendor = firmware("sys_vendor");
        let product = firmware("product_name");
        match (vendor.as_str(), product.as_str()) {
            ("Amazon EC2", _) => Some(Provider::Aws),
            // its older machines are Xen's, with its own BIOS
            ("Xen", _) if firmware("bios_version").ends_with(".amazon") => Some(Provider::Aws),
            (_, "Google Compute Engine") => Some(Provider::Gcp),
            // another Hyper-V has another number there
            _ if firmware("chassis_asset_tag") == "7783-7084-3265-9085-8269-3286-77" => {
                Some(Provider::Azure)
            }
            ("Hetzner", _) => Some(Provider::Hetzner),
            ("DigitalOcean", _) => Some(Provider::DigitalOcean),
            (_, "OpenStack Nova" | "OpenStack Compute") => Some(Provider::OpenStack),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Provider::Aws => "aws",
            Provider::Gcp => "gcp",
            Provider::Azure => "azure",
            Provider::Hetzner => "hetzner",
            Provider::DigitalOcean => "digitalocean",
            Provider::OpenStack => "openstack",
        }
    }

    /// What its service says; none where it does not answer, or with something else.
    async fn location(self, client: &Client, base: &str) -> Option<Location> {
        let get = |path: &str| client.get(format!("{base}{path}"));
        match self {
            // version 2 of the service: version 1 may be switched off
            Provider::Aws => {
                let token = client
                    .put(format!("{base}/latest/api/token"))
                    .header("x-aws-ec2-metadata-token-ttl-seconds", "60");
                let document = get("/latest/dynamic/instance-identity/document")
                    .header("x-aws-ec2-metadata-token", answer(token).await?);
                of_aws(&answer(document).await?)
            }
            Provider::Gcp => {
                let zone = get("/computeMetadata/v1/instance/zone");
                of_gcp(&answer(zone.header("metadata-flavor", "Google")).await?)
            }
            Provider::Azure => {
                let compute = get("/metadata/instance/compute?api-version=2021-02-01");
                of_azure(&answer(compute.header("metadata", "true")).await?)
            }
            Provider::Hetzner => {
                let region = answer(get("/hetzner/v1/metadata/region")).await?;
                let zone = answer(get("/hetzner/v1/metadata/availability-zone")).await?;
                of_hetzner(region, zone)
            }
            Provider::DigitalOcean => of_digitalocean(answer(get("/metadata/v1/region")).await?),
            Provider::OpenStack => {
                of_openstack(&answer(get("/openstack/latest/meta_data.json")).await?)
            }
        }
    }
}

/// The text of an answer that is none of a failure, a redirect or of more than 64 KiB.
async fn answer(request: RequestBuilder) -> Option<String> {
    let mut answer = request.send().await.ok()?;
    if answer.status() != reqwest::StatusCode::OK {
        return None;
    }
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await.ok()? {
        if body.len() + chunk.len() > MAX_ANSWER {
            return None;
        }
        body.extend_from_slice(&chunk);
    }
    String::from_utf8(body).ok().map(|text| text.trim().to_owned())
}

/// Words and numbers with `-` between them, the first of which is a word.
fn is_name(text: &str) -> bool {
    is_dns_label(text) && text.starts_with(|c: char| c.is_ascii_lowercase())
}

fn is_numbered(text: &str) -> bool {
    is_name(text) && text.ends_with(|c: char| c.is_ascii_digit())
}

/// `us-gov-west-1` with `us-gov-west-1a`, or with a local zone as `us-west-2-lax-1a`.
fn of_aws(document: &str) -> Option<Location> {
    let document: Value = serde_json::from_str(document).ok()?;
    let region = document["region"].as_str().filter(|r| is_numbered(r) && r.contains('-'))?;
    let zone = document["availabilityZone"].as_str().filter(|zone| is_name(zone))?;
    let rest = zone.strip_prefix(region).filter(|rest| !rest.is_empty());
    rest.map(|_| (region.to_owned(), zone.to_owned()))
}

/// `projects/123456/zones/europe-west1-b`
fn of_gcp(path: &str) -> Option<Location> {
    let (project, zone) = path.strip_prefix("projects/")?.split_once("/zones/")?;
    let (region, letter) = zone.rsplit_once('-')?;
    let is_zone = is_numbered(region) && region.contains('-') && is_name(letter);
    let is_path = !project.is_empty() && project.bytes().all(|b| b.is_ascii_digit());
    (is_zone && is_path).then(|| (region.to_owned(), zone.to_owned()))
}

/// `westeurope`, and the number of a zone where there are some: Kubernetes calls it `westeurope-1`
/// (cloud-provider-azure, `pkg/provider/azure_zones.go`).
fn of_azure(compute: &str) -> Option<Location> {
    let compute: Value = serde_json::from_str(compute).ok()?;
    let region = compute["location"].as_str().filter(|r| is_name(r) && !r.contains('-'))?;
    let number = compute["zone"].as_str()?;
    if number.len() > 2 || !number.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let zone = if number.is_empty() { String::new() } else { format!("{region}-{number}") };
    Some((region.to_owned(), zone))
}

/// `eu-central` with `fsn1-dc14`.
fn of_hetzner(region: String, zone: String) -> Option<Location> {
    let is_zone = is_numbered(&zone) && zone.contains("-dc");
    (is_zone && is_name(&region) && region.contains('-')).then_some((region, zone))
}

/// `nyc3`. It has no zones.
fn of_digitalocean(region: String) -> Option<Location> {
    let fits = is_numbered(&region) && region.len() == 4 && !region.contains('-');
    fits.then(|| (region, String::new()))
}

/// Any name for the zone. Its region is not told.
fn of_openstack(data: &str) -> Option<Location> {
    let data: Value = serde_json::from_str(data).ok()?;
    let zone = data["availability_zone"].as_str().filter(|z| !z.is_empty() && is_label_value(z))?;
    Some((String::new(), zone.to_owned()))
}

/// Where this machine is. Takes a second at most, and no time where the firmware names no provider.
pub(super) async fn look(host: &Host, url: &str, state: &StateDir) -> Place {
    let firmware = |name: &str| {
        let text = host.read(&format!("/sys/class/dmi/id/{name}")).ok().flatten();
        text.unwrap_or_default().trim().to_owned()
    };
    let Some(provider) = Provider::of_machine(&firmware) else { return Place::default() };
    let begun = Instant::now();
    // nothing of it is secret, and no https is asked for: the trust of nobody spares the reading of
    // the system's certificates
    let nobody = Trust { accept_any: true, ..Trust::default() };
    let client = nobody.client_config().ok().and_then(|tls| {
        Client::builder()
            .tls_backend_preconfigured(tls)
            .dns_resolver(Resolver::shared())
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .ok()
    });
    let found = match &client {
        Some(client) => {
            let base = url.trim_end_matches('/');
            tokio::time::timeout(TIME, provider.location(client, base)).await.ok().flatten()
        }
        None => None,
    };
    let machine = machine_digest(host);
    let kept = state.read(PLACE_FILE).ok().flatten();
    let kept: Value = kept.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    let text = |name: &str| kept[name].as_str().unwrap_or_default().to_owned();
    let Some((region, zone)) = found else {
        // of this machine: a copied disk may be somewhere else, and so may a pod of which nothing
        // says where it runs
        let is_own = is_machine_known(host)
            && text("machine") == machine
            && text("provider") == provider.name();
        let (region, zone) =
            if is_own { (text("region"), text("zone")) } else { Location::default() };
        tracing::info!(
            provider = provider.name(),
            region,
            took_ms = begun.elapsed().as_millis(),
            "no metadata service says where this is"
        );
        return Place { provider: provider.name().into(), region, zone };
    };
    let learned = json!({
        "machine": machine, "provider": provider.name(), "region": region, "zone": zone,
    });
    if learned != kept
        && let Err(error) = state.write(PLACE_FILE, &learned.to_string())
    {
        let error = format!("{error:#}");
        tracing::warn!(error, "where this machine is will not be known without its service");
    }
    Place { provider: provider.name().into(), region, zone }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_learned_is_of_a_machine_that_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::new(dir.path(), None);
        let state = host.state_dir("/state").unwrap();
        // its files are beside one that is made in the same way
        host.state_dir("/sys/class/dmi/id").unwrap().write("sys_vendor", "Amazon EC2\n").unwrap();
        let looked = async || {
            let kept = json!({"machine": machine_digest(&host), "provider": "aws",
                "region": "eu-west-1", "zone": "eu-west-1a"});
            state.write(PLACE_FILE, &kept.to_string()).unwrap();
            // nobody listens there
            look(&host, "http://127.0.0.1:1", &state).await
        };
        let nowhere = Place { provider: "aws".into(), ..Place::default() };
        assert_eq!(looked().await, nowhere);
        host.state_dir("/etc").unwrap().write("machine-id", "0123456789abcdef\n").unwrap();
        assert_eq!(looked().await.region, "eu-west-1");
    }

    #[test]
    fn the_firmware_says_whose_machine_it_is() {
        const AZURE: &str = "7783-7084-3265-9085-8269-3286-77";
        for (vendor, product, more, expected) in [
            ("Amazon EC2", "m7g.large", "", Some(Provider::Aws)),
            ("Xen", "HVM domU", "4.11.amazon", Some(Provider::Aws)),
            ("Google", "Google Compute Engine", "", Some(Provider::Gcp)),
            ("Microsoft Corporation", "Virtual Machine", AZURE, Some(Provider::Azure)),
            ("Hetzner", "vServer", "", Some(Provider::Hetzner)),
            ("DigitalOcean", "Droplet", "", Some(Provider::DigitalOcean)),
            ("OpenStack Foundation", "OpenStack Nova", "", Some(Provider::OpenStack)),
            // at home
            ("Microsoft Corporation", "Virtual Machine", "7783-7084-3265-9085-8269-3286-7", None),
            ("Xen", "HVM domU", "4.11", None),
            ("Google", "Chromebook", "", None),
            ("QEMU", "Standard PC (Q35 + ICH9, 2009)", "", None),
            ("Dell Inc.", "PowerEdge R640", "", None),
            ("", "", "", None),
        ] {
            let firmware = |name: &str| {
                let text = match name {
                    "sys_vendor" => vendor,
                    "product_name" => product,
                    _ => more,
                };
                text.to_owned()
            };
            assert_eq!(Provider::of_machine(&firmware), expected, "{vendor} {product} {more}");
        }
    }

    #[test]
    fn an_answer_is_in_the_form_of_its_provider_or_none() {
        let aws = |region: &str, zone: &str| {
            of_aws(
                &json!({"region": region, "availabilityZone": zone, "accountId": "1"}).to_string(),
            )
        };
        let azure = |region: &str, zone: &str| {
            of_azure(&json!({"location": region, "zone": zone, "vmId": "x"}).to_string())
        };
        let hetzner = |region: &str, zone: &str| of_hetzner(region.into(), zone.into());
        let openstack = |zone: &str| of_openstack(&json!({"availability_zone": zone}).to_string());
        for (found, region, zone) in [
            (aws("us-east-1", "us-east-1a"), "us-east-1", "us-east-1a"),
            (aws("us-gov-west-1", "us-gov-west-1b"), "us-gov-west-1", "us-gov-west-1b"),
            (aws("us-west-2", "us-west-2-lax-1a"), "us-west-2", "us-west-2-lax-1a"),
            (of_gcp("projects/123/zones/europe-west1-b"), "europe-west1", "europe-west1-b"),
            (of_gcp("projects/1/zones/us-central1-ai1a"), "us-central1", "us-central1-ai1a"),
            (azure("westeurope", "1"), "westeurope", "westeurope-1"),
            (azure("northcentralus", ""), "northcentralus", ""),
            (azure("eastus2", "3"), "eastus2", "eastus2-3"),
            (hetzner("eu-central", "fsn1-dc14"), "eu-central", "fsn1-dc14"),
            (of_digitalocean("nyc3".into()), "nyc3", ""),
            (openstack("nova"), "", "nova"),
        ] {
            assert_eq!(found, Some((region.to_owned(), zone.to_owned())));
        }
        let long = "a".repeat(64);
        for (n, found) in [
            aws("us-east-1", "eu-west-1a"),
            aws("us-east-1", "us-east-1"),
            aws("US-EAST-1", "US-EAST-1a"),
            aws("us east 1", "us east 1a"),
            aws("unknown", "unknowna"),
            aws("", ""),
            of_aws(r#"{"region": 7, "availabilityZone": null}"#),
            of_aws("<html>log in to this network</html>"),
            of_aws("[]"),
            of_aws(""),
            of_gcp("europe-west1-b"),
            of_gcp("projects/me/zones/europe-west1-b"),
            of_gcp("projects/1/zones/europe"),
            of_gcp("projects/1/zones/../europe-west1-b"),
            of_gcp("projects/1/zones/europe-west1-"),
            of_gcp("<html>"),
            azure("West Europe", "1"),
            azure("westeurope", "one"),
            azure("westeurope", "1000"),
            azure(&long, "1"),
            of_azure(r#"{"error": "Bad request"}"#),
            hetzner("not found", "not found"),
            hetzner("eu-central", "error"),
            hetzner("eu", "fsn1-dc14"),
            of_digitalocean("unknown".into()),
            of_digitalocean("not found".into()),
            of_digitalocean(String::new()),
            openstack(""),
            openstack("<nova>"),
            openstack(&long),
            of_openstack("nova"),
        ]
        .into_iter()
        .enumerate()
        {
            assert_eq!(found, None, "{n}");
        }
    }
}
