//! Known failures of joining: datastore and token that do not belong together, certificates,
//! clocks.

use super::Severity::{Fatal, Permanent};
use super::{KnownCause, cause};

const TOKEN: &str = "get a fresh line with `pipeops cluster-info --join` on the server";
const SERVER_TOKEN: &str = "put the cluster's token back into /var/lib/rancher/k3s/server/token, \
                            or correct `token` in the [k3s] table";

pub(super) const TABLE: &[(&[&str], KnownCause)] = &[
    // pkg/cluster/storage.go, bootstrap.go
    (
        &["bootstrap data", "different token"],
        cause(
            "DATA_TOKEN_CONFLICT",
            Permanent,
            "the datastore was made with another token",
            "restore the former token, or move /var/lib/rancher/k3s away",
        ),
    ),
    (
        &["newer than datastore and could cause a cluster outage"],
        cause(
            "BOOTSTRAP_CONFLICT",
            Permanent,
            "certificates on this disk are newer than those in the datastore",
            "move the named files away; k3s makes them again from the datastore",
        ),
    ),
    (
        &["no bootstrap data found in datastore"],
        cause(
            "DATA_TOKEN_CONFLICT",
            Permanent,
            "the datastore holds nothing that this token opens",
            "give the cluster's own token, or check the datastore",
        ),
    ),
    (
        &["critical configuration value mismatch"],
        cause(
            "SERVER_CONFIG_MISMATCH",
            Permanent,
            "this server's settings differ from the other servers'",
            "give it the same cluster-cidr, service-cidr and disable settings",
        ),
    ),
    // pkg/agent/config/config.go, pkg/clientaccess/token.go, pkg/util/token.go,
    // pkg/cli/agent/agent.go
    (
        &["Node password rejected"],
        cause(
            "NODE_NAME_TAKEN",
            Permanent,
            "the server knows another machine of this name",
            "on the server: kubectl delete node NAME, or choose another --node-name",
        ),
    ),
    (
        &["token CA hash does not match"],
        cause("JOIN_CA_MISMATCH", Permanent, "the token belongs to another cluster", TOKEN),
    ),
    (
        &["failed to normalize server token"],
        cause(
            "JOIN_TOKEN_MALFORMED",
            Permanent,
            "the server's token is empty or not one of k3s",
            SERVER_TOKEN,
        ),
    ),
    (
        &["invalid token format"],
        cause("JOIN_TOKEN_MALFORMED", Permanent, "the token is not one of k3s", TOKEN),
    ),
    (
        &["invalid token CA hash length"],
        cause("JOIN_TOKEN_MALFORMED", Permanent, "the token was cut off or mixed up", TOKEN),
    ),
    (
        &["token must not be empty"],
        cause("TOKEN_MISSING", Permanent, "the token file is empty", TOKEN),
    ),
    (&["--token is required"], cause("TOKEN_MISSING", Permanent, "there is no token", TOKEN)),
    (
        &["only https:// URLs are supported"],
        cause(
            "MASTER_INVALID",
            Permanent,
            "the server's address is not an https URL",
            "join with https://SERVER:6443",
        ),
    ),
    (
        &["incompatible down-level server detected"],
        cause(
            "VERSION_SKEW",
            Permanent,
            "the server runs an older k3s than this node",
            "upgrade the server first, or give --k3s-version with the server's",
        ),
    ),
    (
        &["not authorized"],
        cause("JOIN_TOKEN_REJECTED", Fatal, "the server refuses the token", TOKEN),
    ),
    (
        &["401 Unauthorized"],
        cause("JOIN_TOKEN_REJECTED", Fatal, "the server refuses the token", TOKEN),
    ),
    (
        &["certificate has expired or is not yet valid"],
        cause(
            "CLOCK_SKEW",
            Fatal,
            "a certificate is outside its time: a clock is wrong",
            "set the clock (`timedatectl set-ntp true`)",
        ),
    ),
    // pkg/cli/cmds/log.go
    (
        &["server time isn't set properly"],
        cause(
            "CLOCK_SKEW",
            Fatal,
            "this clock stands before 1980",
            "set the clock (`timedatectl set-ntp true`)",
        ),
    ),
    (
        &["x509: certificate is valid for", "not"],
        cause(
            "TLS_SAN_MISSING",
            Fatal,
            "the server's certificate does not name the address used",
            "on the server: pipeops install-server --tls-san THAT_ADDRESS",
        ),
    ),
    (
        &["x509: certificate signed by unknown authority"],
        cause(
            "JOIN_CA_MISMATCH",
            Fatal,
            "something else answers in the server's place, or its CA changed",
            "check the address, and for a proxy that opens TLS",
        ),
    ),
];
