//! Which control plane owns a database: one at a time, as long as it shows that it lives.

use std::time::Duration;

use sqlx::AnyPool;
use tokio_util::sync::CancellationToken;

use super::{read_metadata, write_metadata};
use crate::base::error::{Exit, Failure};

/// How often the owner of a shared database shows that it lives.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// How long another control plane watches before it takes over.
const TAKEOVER: Duration = Duration::from_secs(16);

/// Makes `instance` the one control plane that writes here. The former owner may still run: then
/// its heartbeat changes while it is watched. No clock is compared, since clocks differ. `alone`:
/// the lock on the data directory keeps others away.
pub(super) async fn take_ownership(
    pool: &AnyPool,
    instance: &str,
    alone: bool,
) -> anyhow::Result<()> {
    let begun = tokio::time::Instant::now();
    let first = read_metadata(pool, "beat").await?;
    loop {
        let holder = read_metadata(pool, "holder").await?;
        if alone || holder.as_deref().is_none_or(|h| h == instance) || begun.elapsed() > TAKEOVER {
            write_metadata(&mut *pool.acquire().await?, "holder", instance).await?;
            return Ok(());
        }
        if read_metadata(pool, "beat").await? != first {
            return Err(Failure::new(
                Exit::Locked,
                "DATABASE_IN_USE",
                "another control plane works on this database",
            )
            .hint("stop it first; one database is one control plane's")
            .into());
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Shows that the owner lives.
pub(super) async fn heartbeat(pool: AnyPool, instance: String, lost: CancellationToken) {
    let mut count = 0_u64;
    while !lost.is_cancelled() {
        count += 1;
        if let Ok(mut connection) = pool.acquire().await {
            let _ = write_metadata(
                &mut connection,
                "beat",
                &format!("{instance} {} {count}", std::process::id()),
            )
            .await;
        } else if pool.is_closed() {
            return;
        }
        tokio::time::sleep(HEARTBEAT).await;
    }
}
