//! An nftables table of our own, loaded from its file now; the unit of k3s loads it at boot.

use std::time::Duration;

use crate::host::{Host, HostWriter};
use crate::install::engine::journal::Journal;
use crate::install::plan::StepStatus;

const QUICK: Duration = Duration::from_secs(20);
/// Under which the journal keeps the digest of the file that was loaded, among those of the units.
const LOADED: &str = "firewall";

async fn is_loaded(host: &Host, table: &str) -> bool {
    host.output("nft", &["list", "table", "inet", table], QUICK).await.is_ok_and(|o| o.ok())
}

pub(super) async fn check(
    host: &Host,
    journal: Option<&Journal>,
    path: &str,
    table: &str,
) -> anyhow::Result<StepStatus> {
    let unchanged = journal.and_then(|j| j.units.get(LOADED)) == host.sha256(path)?.as_ref();
    Ok(if is_loaded(host, table).await && unchanged {
        StepStatus::Done
    } else {
        StepStatus::todo(format!("load the nftables table {table}"))
    })
}

pub(super) async fn apply(
    writer: &HostWriter,
    journal: &mut Journal,
    path: &str,
) -> anyhow::Result<()> {
    writer.run("nft", &["-f", &writer.real_path(path).display().to_string()], QUICK).await?;
    if let Some(digest) = writer.sha256(path)? {
        journal.units.insert(LOADED.into(), digest);
    }
    Ok(())
}

pub(super) async fn undo(writer: &HostWriter, table: &str) -> anyhow::Result<()> {
    if is_loaded(writer, table).await {
        writer.run("nft", &["delete", "table", "inet", table], QUICK).await?;
    }
    Ok(())
}
