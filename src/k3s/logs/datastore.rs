//! Known failures of the datastore: SQLite, an external database, etcd.

use super::Severity::{Fatal, Permanent, Transient};
use super::{KnownCause, cause};

const RESTORE: &str = "restore /var/lib/rancher/k3s/server/db from a copy";
const DATABASE: &str = "correct datastore-endpoint in the [k3s] table; what stands in it for a \
                        password is percent-encoded";

pub(super) const TABLE: &[(&[&str], KnownCause)] = &[
    // kine pkg/drivers, pkg/util/url.go
    (
        &["invalid datastore endpoint"],
        cause(
            "DATASTORE_URL_INVALID",
            Permanent,
            "datastore-endpoint is no URL of a datastore",
            DATABASE,
        ),
    ),
    (
        &["failed to parse datastore DSN URL"],
        cause(
            "DATASTORE_URL_INVALID",
            Permanent,
            "datastore-endpoint is no URL of a datastore",
            DATABASE,
        ),
    ),
    (
        &["creating storage endpoint", "unknown driver"],
        cause(
            "DATASTORE_URL_INVALID",
            Permanent,
            "datastore-endpoint names a kind of datastore that k3s does not have",
            DATABASE,
        ),
    ),
    (
        &["password authentication failed for user"],
        cause("DATASTORE_REFUSED", Permanent, "the database refuses user or password", DATABASE),
    ),
    (
        &["Error 1045", "Access denied for user"],
        cause("DATASTORE_REFUSED", Permanent, "the database refuses user or password", DATABASE),
    ),
    (
        &["no pg_hba.conf entry for host"],
        cause(
            "DATASTORE_REFUSED",
            Fatal,
            "the database does not let this machine in",
            "add this machine to pg_hba.conf there",
        ),
    ),
    (
        &["permission denied for schema"],
        cause(
            "DATASTORE_REFUSED",
            Fatal,
            "the database user may not make tables",
            "make it the owner of its database",
        ),
    ),
    (
        &["unable to open database file"],
        cause(
            "DATASTORE_UNOPENED",
            Fatal,
            "the datastore's file cannot be opened",
            "check /var/lib/rancher/k3s/server/db: its mount, owner and mode",
        ),
    ),
    (
        &["attempt to write a readonly database"],
        cause(
            "DISK_READ_ONLY",
            Fatal,
            "the datastore cannot be written",
            "mount the disk of /var/lib/rancher writable",
        ),
    ),
    (
        &["database disk image is malformed"],
        cause("DATASTORE_DAMAGED", Permanent, "the datastore is damaged", RESTORE),
    ),
    (
        &["file is not a database"],
        cause("DATASTORE_DAMAGED", Permanent, "the datastore is damaged", RESTORE),
    ),
    (
        &["database is locked"],
        cause(
            "DATASTORE_LOCKED",
            Fatal,
            "another process holds the datastore",
            "`fuser /var/lib/rancher/k3s/server/db/state.db` names it; stop it",
        ),
    ),
    // pkg/etcd/etcd.go, pkg/cluster/managed.go, etcd server/etcdserver
    (
        &["duplicate node name found"],
        cause(
            "NODE_NAME_TAKEN",
            Permanent,
            "the cluster has another server of this name",
            "choose another --node-name, or remove the former member",
        ),
    ),
    (
        &["tombstone file has been detected"],
        cause(
            "ETCD_MEMBER_REMOVED",
            Permanent,
            "this server was removed from its cluster",
            "move /var/lib/rancher/k3s/server/db away, then join again",
        ),
    ),
    (
        &["permanently removed from the cluster"],
        cause(
            "ETCD_MEMBER_REMOVED",
            Permanent,
            "this server was removed from its cluster",
            "move /var/lib/rancher/k3s/server/db away, then join again",
        ),
    ),
    (
        &["has already been bootstrapped"],
        cause(
            "ETCD_MEMBER_STALE",
            Permanent,
            "etcd knows this member, but its data is not here",
            "remove the member on another server, then join again",
        ),
    ),
    (
        &["etcd cluster membership was previously reset"],
        cause(
            "ETCD_RESET_DONE",
            Permanent,
            "cluster-reset is still set",
            "take cluster-reset out of the settings",
        ),
    ),
    (
        &["etcd: snapshot path"],
        cause(
            "ETCD_SNAPSHOT_UNREADABLE",
            Permanent,
            "the snapshot to restore is not a file",
            "correct cluster-reset-restore-path",
        ),
    ),
    (
        &["failed to read WAL, cannot be repaired"],
        cause("DATASTORE_DAMAGED", Permanent, "etcd's log is damaged", RESTORE),
    ),
    (
        &["found data inconsistency with peers"],
        cause(
            "DATASTORE_DAMAGED",
            Permanent,
            "etcd's data differs from the other servers'",
            "remove this member, move its data away, then join again",
        ),
    ),
    (
        &["mvcc: database space exceeded"],
        cause(
            "ETCD_FULL",
            Fatal,
            "etcd's database is full",
            "compact and defragment it, then disarm its alarm",
        ),
    ),
    (
        &["failed to migrate content from sqlite to etcd"],
        cause(
            "DATASTORE_DAMAGED",
            Fatal,
            "SQLite's content cannot be moved to etcd",
            "look at the line; the SQLite file is untouched",
        ),
    ),
    (
        &["too many learner members"],
        cause(
            "ETCD_BUSY",
            Transient,
            "another server is still joining etcd",
            "wait until it is done",
        ),
    ),
    (
        &["etcdserver: unhealthy cluster"],
        cause(
            "ETCD_BUSY",
            Transient,
            "etcd's members do not all answer",
            "check the other servers",
        ),
    ),
    (
        &["leaderelection lost"],
        cause(
            "DISK_FSYNC_SLOW",
            Transient,
            "the datastore answered too late",
            "use a local SSD for /var/lib/rancher",
        ),
    ),
];
