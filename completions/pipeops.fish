# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_pipeops_global_optspecs
    string join \n log-level= h/help V/version
end

function __fish_pipeops_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_pipeops_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_pipeops_using_subcommand
    set -l cmd (__fish_pipeops_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c pipeops -n "__fish_pipeops_needs_command" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_needs_command" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_needs_command" -s V -l version -d 'Print version'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "install-server" -d 'Make this machine a k3s server with PipeOps\' namespaces, rights, controllers and agent'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "join-worker" -d 'Make this machine a worker of a server'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "cluster-info" -d 'Show nodes, versions, components, the agent, and how to join'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "run" -d 'Run the agent in the foreground'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "uninstall" -d 'Undo what install-server or join-worker did'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "control-plane" -d 'Run a control plane of your own, or manage one that runs on this machine'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "audit" -d 'Check or show the record of what was done through the tunnel'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "explain" -d 'Explain a code of a finding, an error or an operation'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "completions" -d 'Print shell completions'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "man" -d 'Print the manual page'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "mint-credential" -d 'Mint the agent\'s Kubernetes credential; run by its unit'
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l ignore -d 'Turn findings with these codes into warnings' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l k3s-version -d 'k3s version to install, for example v1.36.2+k3s1' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l k3s-sha256 -d 'sha256 of the k3s program, for versions and mirrors that this release does not know' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l channel -d 'Release channel to resolve instead of a version: stable, latest, vX.Y' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l offline-dir -d 'Directory with the release files; nothing is downloaded' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l artifact-url -d 'Mirror with the layout of the k3s releases (URL/VERSION/FILE)' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l registries -d 'registries.yaml to install' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l node-name -d 'Name of this node in the cluster' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l node-ip -d 'Address of this node' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l flannel-iface -d 'Network interface of the pod network' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l node-label -d 'Label of this node, KEY=VALUE' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l node-taint -d 'Taint of this node, KEY=VALUE:EFFECT' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l tls-san -d 'Further name or address that the API server\'s certificate is valid for' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l components -d 'Controllers to install: ingress or traefik, cert-manager, metrics, storage; or none' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l acme-email -d 'Mail address for Let\'s Encrypt; creates its issuers' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l api-allow -d 'Networks that may reach the node\'s ports besides 80 and 443' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l max-role -d 'Highest role that PipeOps may act in on this cluster: viewer, deployer, operator, admin' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l kubeconfig-for -d 'Also write a kubeconfig, mode 0600, for this local user' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l timeout -d 'Longest time to wait for readiness, for example 300s or 10m' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l control-plane-url -d 'Control plane that the agent registers with' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l control-plane-pin -d 'sha256:BASE64 of a public key in the control plane\'s certificate chain; two allowed' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l cluster-name -d 'Name of the cluster for people' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l agent-token-file -d 'File with the enrolment token, - for standard input [env: AGENT_TOKEN holds the token itself]' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l plan-out -d 'Save the checked plan; write nothing else' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l apply-plan -d 'Carry out exactly a saved plan; refused when the host has changed since' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -s o -l output -d 'Format of the result on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l events -d 'Also write one JSON object per event to standard error' -r -f -a "json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l config -d 'Read this config file as well, over those in /etc/pipeops' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l node-type -d 'What to make of this machine: server, or agent (a worker; needs K3S_URL and K3S_TOKEN)' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l k3s-url -d 'Server to join with --node-type agent' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l token-file -d 'File with the join token for --node-type agent [env: K3S_TOKEN holds the token itself]' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l dry-run -d 'Show what would be done; write nothing'
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -s y -l yes -d 'Do not ask'
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l token-file -d 'Read the token from this file' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l ignore -d 'Turn findings with these codes into warnings' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l k3s-version -d 'k3s version to install, for example v1.36.2+k3s1' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l k3s-sha256 -d 'sha256 of the k3s program, for versions and mirrors that this release does not know' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l channel -d 'Release channel to resolve instead of a version: stable, latest, vX.Y' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l offline-dir -d 'Directory with the release files; nothing is downloaded' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l artifact-url -d 'Mirror with the layout of the k3s releases (URL/VERSION/FILE)' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l registries -d 'registries.yaml to install' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l node-name -d 'Name of this node in the cluster' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l node-ip -d 'Address of this node' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l flannel-iface -d 'Network interface of the pod network' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l node-label -d 'Label of this node, KEY=VALUE' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l node-taint -d 'Taint of this node, KEY=VALUE:EFFECT' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l tls-san -d 'Further name or address that the API server\'s certificate is valid for' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l components -d 'Controllers to install: ingress or traefik, cert-manager, metrics, storage; or none' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l acme-email -d 'Mail address for Let\'s Encrypt; creates its issuers' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l api-allow -d 'Networks that may reach the node\'s ports besides 80 and 443' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l max-role -d 'Highest role that PipeOps may act in on this cluster: viewer, deployer, operator, admin' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l kubeconfig-for -d 'Also write a kubeconfig, mode 0600, for this local user' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l timeout -d 'Longest time to wait for readiness, for example 300s or 10m' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l control-plane-url -d 'Control plane that the agent registers with' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l control-plane-pin -d 'sha256:BASE64 of a public key in the control plane\'s certificate chain; two allowed' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l cluster-name -d 'Name of the cluster for people' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l agent-token-file -d 'File with the enrolment token, - for standard input [env: AGENT_TOKEN holds the token itself]' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l plan-out -d 'Save the checked plan; write nothing else' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l apply-plan -d 'Carry out exactly a saved plan; refused when the host has changed since' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -s o -l output -d 'Format of the result on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l events -d 'Also write one JSON object per event to standard error' -r -f -a "json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l config -d 'Read this config file as well, over those in /etc/pipeops' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l insecure-token -d 'Accept a token without the hash of the server\'s CA: whoever answers is trusted'
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l dry-run -d 'Show what would be done; write nothing'
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -s y -l yes -d 'Do not ask'
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand cluster-info" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand cluster-info" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand cluster-info" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand cluster-info" -l join -d 'Print the line that joins a worker, with a token for workers only'
complete -c pipeops -n "__fish_pipeops_using_subcommand cluster-info" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand run" -l config -d 'Settings of the agent' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand run" -l kubeconfig -d 'Kubernetes credential, over the one in the settings' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand run" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand run" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand run" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand uninstall" -s o -l output -d 'Format of the result on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand uninstall" -l events -d 'Also write one JSON object per event to standard error' -r -f -a "json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand uninstall" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand uninstall" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand uninstall" -l dry-run -d 'Show what would be undone; write nothing'
complete -c pipeops -n "__fish_pipeops_using_subcommand uninstall" -s y -l yes -d 'Do not ask'
complete -c pipeops -n "__fish_pipeops_using_subcommand uninstall" -l purge-data -d 'Remove the data of volumes too'
complete -c pipeops -n "__fish_pipeops_using_subcommand uninstall" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l listen -d 'Address and port of the HTTPS API, the page and the gateway [default: [::]:8443]' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l tunnel-listen -d 'Address and port of the tunnel (FRP) server [default: [::]:7000]' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l public-name -d 'Name or address by which agents and Runners reach this machine; the first one is given to them [default: the address of the default route]' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l database-url -d 'PostgreSQL database, postgres://USER:PASSWORD@HOST/DATABASE [default: a SQLite file in the data directory]' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l database-url-file -d 'File with that URL' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l amqp-url -d 'RabbitMQ server to publish events about agents to, amqp[s]://USER:PASSWORD@HOST/VHOST' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l amqp-url-file -d 'File with that URL' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l amqp-ca -d 'CA of RabbitMQ\'s certificate, PEM, where the system does not trust it' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l frps -d 'A genuine frps instead of the tunnel server of this program; `frps-config` prints the settings that it needs' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l frps-token-file -d 'File with the auth.token of that frps' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l frps-ca -d 'CA of its certificate, PEM' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l frps-pin -d 'Or the pin of a key in its certificate chain, `sha256:` and base64' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l tls-cert -d 'Certificate chain for the HTTPS API instead of one from the control plane\'s own CA, PEM; reloaded when it changes' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l tls-key -d 'Its key, PEM' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l tls-ca -d 'CA of that certificate, PEM, where clients do not trust it already' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l config -d 'Read this config file instead of /etc/pipeops/control-plane.toml' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l data-dir -d 'Directory with its keys and database' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -f -a "token" -d 'Tokens that let new servers in'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -f -a "cluster" -d 'Clusters that have registered'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -f -a "runner" -d 'Whoever drives clusters through this control plane'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -f -a "project" -d 'Owners of tokens, clusters and Runners'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -f -a "admin" -d 'People who may do everything here, on the page as well'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -f -a "frps-config" -d 'Print what an external frps needs in its configuration; there is a secret in it'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -f -a "backup" -d 'Write all that it knows and its keys into a file; it may go on running'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner project admin frps-config backup restore" -f -a "restore" -d 'Make what a backup holds of an empty data directory and database'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from token" -l data-dir -d 'Directory with its keys and database' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from token" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from token" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from token" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from token" -f -a "create" -d 'Make one and print the line to paste on a VM'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from token" -f -a "list" -d 'Show all; never the tokens themselves'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from token" -f -a "revoke" -d 'Let nobody in with it from now on'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from cluster" -l data-dir -d 'Directory with its keys and database' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from cluster" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from cluster" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from cluster" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from cluster" -f -a "list" -d 'Show all with their state'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from cluster" -f -a "show" -d 'Show one, with what its agent sees'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from cluster" -f -a "kubeconfig" -d 'Print a kubeconfig with which kubectl reaches it for a day'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from cluster" -f -a "revoke" -d 'Refuse its agent from now on and end its streams'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from cluster" -f -a "remove" -d 'Forget it; its agent needs a token to come back'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from runner" -l data-dir -d 'Directory with its keys and database' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from runner" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from runner" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from runner" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from runner" -f -a "create" -d 'Make one and print its token'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from runner" -f -a "list" -d 'Show all, kubeconfigs too'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from runner" -f -a "revoke" -d 'Refuse it from now on and end its streams'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from project" -l data-dir -d 'Directory with its keys and database' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from project" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from project" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from project" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from project" -f -a "create" -d 'Make one'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from project" -f -a "list" -d 'Show all'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from admin" -l data-dir -d 'Directory with its keys and database' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from admin" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from admin" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from admin" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from admin" -f -a "create" -d 'Make one and print the token, shown this once'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from admin" -f -a "list" -d 'Show all'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from admin" -f -a "revoke" -d 'Refuse the token from now on and end its sessions'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from frps-config" -l data-dir -d 'Directory with its keys and database' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from frps-config" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from frps-config" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from frps-config" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from backup" -l database-url-file -d 'File with the URL of its PostgreSQL database, where it has one' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from backup" -l data-dir -d 'Directory with its keys and database' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from backup" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from backup" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from backup" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from restore" -l database-url-file -d 'File with the URL of its PostgreSQL database, where it has one' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from restore" -l data-dir -d 'Directory with its keys and database' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from restore" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from restore" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from restore" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand audit; and not __fish_seen_subcommand_from verify tail" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand audit; and not __fish_seen_subcommand_from verify tail" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand audit; and not __fish_seen_subcommand_from verify tail" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand audit; and not __fish_seen_subcommand_from verify tail" -f -a "verify" -d 'Walk over the whole log: each record must follow the one before it'
complete -c pipeops -n "__fish_pipeops_using_subcommand audit; and not __fish_seen_subcommand_from verify tail" -f -a "tail" -d 'Show the last records, as JSON lines'
complete -c pipeops -n "__fish_pipeops_using_subcommand audit; and __fish_seen_subcommand_from verify" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand audit; and __fish_seen_subcommand_from verify" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand audit; and __fish_seen_subcommand_from verify" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand audit; and __fish_seen_subcommand_from verify" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand audit; and __fish_seen_subcommand_from tail" -s n -l lines -d 'How many' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand audit; and __fish_seen_subcommand_from tail" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand audit; and __fish_seen_subcommand_from tail" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand audit; and __fish_seen_subcommand_from tail" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand explain" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand explain" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand explain" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand completions" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand completions" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand man" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand man" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand mint-credential" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand mint-credential" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand mint-credential" -s h -l help -d 'Print help'
