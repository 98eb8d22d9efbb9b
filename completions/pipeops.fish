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
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "runner" -d 'Run a Runner, which does jobs from RabbitMQ, or send it one'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "login" -d 'Log in to a control plane, with a token from standard input'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "logout" -d 'Forget a token'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "contexts" -d 'Show the control planes that you are logged in to, or change which one is in use'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "deploy" -d 'Deploy an application and watch its rollout'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "rollback" -d 'Bring a former revision of an application back'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "restart" -d 'Restart the pods of an application, one after another'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "scale" -d 'Change how many pods an application has'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "delete" -d 'Delete an application; the data of its volumes stays'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "apps" -d 'List applications'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "status" -d 'Show one application, what keeps it, and what is going on'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "history" -d 'List the revisions of an application'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "logs" -d 'Print the logs of all pods of an application'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "exec" -d 'Run a command in a pod of an application that runs already'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "open" -d 'Open an application in a browser, at its host'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "job" -d 'Commands that run once'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "secret" -d 'Values that pods read by their keys'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "clusters" -d 'List the clusters that your token reaches'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "kubeconfig" -d 'Print a kubeconfig with which kubectl reaches a cluster for a day'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "nodes" -d 'Machines of a cluster'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "rollout" -d 'Operations on many clusters at once, in waves'
complete -c pipeops -n "__fish_pipeops_needs_command" -f -a "tenant" -d 'Customers with a place of their own in a cluster: namespaces, and what limits them'
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
complete -c pipeops -n "__fish_pipeops_using_subcommand install-server" -l cluster-label -d 'Label of the cluster, KEY=VALUE: it is selected by it at the control plane' -r
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
complete -c pipeops -n "__fish_pipeops_using_subcommand join-worker" -l cluster-label -d 'Label of the cluster, KEY=VALUE: it is selected by it at the control plane' -r
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
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l listen -d 'Address and port of the HTTPS API, the page and the gateway [default: [::]:8443]' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l tunnel-listen -d 'Address and port of the tunnel (FRP) server [default: [::]:7000]' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l public-name -d 'Name or address by which agents and Runners reach this machine; the first one is given to them [default: the address of the default route]' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l database-url -d 'PostgreSQL database, postgres://USER:PASSWORD@HOST/DATABASE [default: a SQLite file in the data directory]' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l database-url-file -d 'File with that URL' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l amqp-url -d 'RabbitMQ server to publish events about agents to, amqp[s]://USER:PASSWORD@HOST/VHOST' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l amqp-url-file -d 'File with that URL' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l amqp-ca -d 'CA of RabbitMQ\'s certificate, PEM, where the system does not trust it' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l frps -d 'A genuine frps instead of the tunnel server of this program; `frps-config` prints the settings that it needs' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l frps-token-file -d 'File with the auth.token of that frps' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l frps-ca -d 'CA of its certificate, PEM' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l frps-pin -d 'Or the pin of a key in its certificate chain, `sha256:` and base64' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l tls-cert -d 'Certificate chain for the HTTPS API instead of one from the control plane\'s own CA, PEM; reloaded when it changes' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l tls-key -d 'Its key, PEM' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l tls-ca -d 'CA of that certificate, PEM, where clients do not trust it already' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l config -d 'Read this config file instead of /etc/pipeops/control-plane.toml' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l data-dir -d 'Directory with its keys and database' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -f -a "token" -d 'Tokens that let new servers in'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -f -a "cluster" -d 'Clusters that have registered'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -f -a "runner" -d 'Programs that drive clusters through this control plane'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -f -a "user" -d 'People who use the command line against this control plane'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -f -a "project" -d 'Owners of tokens, clusters and Runners'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -f -a "admin" -d 'People who may do everything here, on the page as well'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -f -a "frps-config" -d 'Print what an external frps needs in its configuration; there is a secret in it'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -f -a "backup" -d 'Write all that it knows and its keys into a file; it may go on running'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and not __fish_seen_subcommand_from token cluster runner user project admin frps-config backup restore" -f -a "restore" -d 'Make what a backup holds of an empty data directory and database'
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
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from cluster" -f -a "label" -d 'Set labels of one here, or take them away: rights and selectors follow from them'
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
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from runner" -f -a "list" -d 'Show all, users and kubeconfigs too'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from runner" -f -a "revoke" -d 'Refuse it from now on and end its streams'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from user" -l data-dir -d 'Directory with its keys and database' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from user" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from user" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from user" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from user" -f -a "create" -d 'Make one and print the line that logs in, and below it the token, shown this once'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from user" -f -a "list" -d 'Show all'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from user" -f -a "revoke" -d 'Refuse the token from now on, with the kubeconfigs that were made with it'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from project" -l data-dir -d 'Directory with its keys and database' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from project" -l root -d 'Work in a directory that stands for the machine' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from project" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from project" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from project" -f -a "create" -d 'Make one'
complete -c pipeops -n "__fish_pipeops_using_subcommand control-plane; and __fish_seen_subcommand_from project" -f -a "reset-sealing-key" -d 'Forget what values in its jobs are sealed to: the next Runner that starts tells its key'
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
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and not __fish_seen_subcommand_from status seal send" -l config -d 'Settings of the Runner' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and not __fish_seen_subcommand_from status seal send" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and not __fish_seen_subcommand_from status seal send" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and not __fish_seen_subcommand_from status seal send" -f -a "status" -d 'Say how the Runner on this machine is; fails where there is none'
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and not __fish_seen_subcommand_from status seal send" -f -a "seal" -d 'Seal a value from standard input for a job of yours: the project\'s Runners alone can read it'
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and not __fish_seen_subcommand_from status seal send" -f -a "send" -d 'Publish a job and wait for its answer'
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and __fish_seen_subcommand_from status" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and __fish_seen_subcommand_from status" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and __fish_seen_subcommand_from status" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and __fish_seen_subcommand_from seal" -l key -d 'Public key of the Runners; without: the one that the control plane has' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and __fish_seen_subcommand_from seal" -l project -d 'Id of the project, with --key' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and __fish_seen_subcommand_from seal" -l maker -d 'Id of who makes the job, with --key' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and __fish_seen_subcommand_from seal" -l context -d 'Name of the control plane that you are logged in to' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and __fish_seen_subcommand_from seal" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and __fish_seen_subcommand_from seal" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and __fish_seen_subcommand_from send" -l amqp-url-file -d 'File with the URL of the broker [env: PIPEOPS_AMQP_URL holds the URL itself]' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and __fish_seen_subcommand_from send" -l amqp-ca -d 'File with the CA of the broker, PEM' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and __fish_seen_subcommand_from send" -l ttl -d 'How long the job may be begun, seconds' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and __fish_seen_subcommand_from send" -l context -d 'Name of the control plane that you are logged in to' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and __fish_seen_subcommand_from send" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and __fish_seen_subcommand_from send" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and __fish_seen_subcommand_from send" -l detach -d 'Do not wait: the answer goes to the queue of the project'
complete -c pipeops -n "__fish_pipeops_using_subcommand runner; and __fish_seen_subcommand_from send" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand login" -l pin -d '`sha256:…` of a key in its certificate chain, as `user create` prints it' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand login" -l ca -d 'Certificate that signs its own, where the system does not trust it' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand login" -l name -d 'Name of the context; without: the control plane\'s host name' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand login" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand login" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand logout" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand logout" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand contexts; and not __fish_seen_subcommand_from use" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand contexts; and not __fish_seen_subcommand_from use" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand contexts; and not __fish_seen_subcommand_from use" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand contexts; and not __fish_seen_subcommand_from use" -f -a "use" -d 'Use a context from now on, with a cluster and a namespace where no option says another'
complete -c pipeops -n "__fish_pipeops_using_subcommand contexts; and __fish_seen_subcommand_from use" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand contexts; and __fish_seen_subcommand_from use" -s n -l namespace -d 'Namespace' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand contexts; and __fish_seen_subcommand_from use" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand contexts; and __fish_seen_subcommand_from use" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand deploy" -l image -d 'Image, in place of the file\'s' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand deploy" -l set-env -d 'Environment variable, over the file\'s; may be given several times, and is no place for a secret' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand deploy" -l timeout -d 'Longest time of the operation, seconds' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand deploy" -l idempotency-key -d 'Under the same key the same request is done once, however often it is sent, and whatever has come of it' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand deploy" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand deploy" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand deploy" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand deploy" -s n -l namespace -d 'Namespace' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand deploy" -s l -l selector -d 'On all clusters with such labels: env=prod,tier in (web,api),!legacy; or id, name, provider, region, zone. Labels that agents report count unless the control plane has set that key' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand deploy" -l waves -d 'How many clusters at a time, as in 1,10%,all; without: all at once. The first failure stops what has not begun' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand deploy" -l ttl -d 'How long a cluster that is offline may take to come back: 90s, 10m, 2h; without: it fails' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand deploy" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand deploy" -l dry-run -d 'Write nothing: Kubernetes answers what it would do'
complete -c pipeops -n "__fish_pipeops_using_subcommand deploy" -l take-over -d 'Take fields that another manager has set'
complete -c pipeops -n "__fish_pipeops_using_subcommand deploy" -l auto-rollback -d 'When the rollout fails, bring back the revision that ran before (exit 9)'
complete -c pipeops -n "__fish_pipeops_using_subcommand deploy" -l detach -d 'Print the id of the operation and do not wait for its end'
complete -c pipeops -n "__fish_pipeops_using_subcommand deploy" -l all-clusters -d 'On all clusters that your token reaches'
complete -c pipeops -n "__fish_pipeops_using_subcommand deploy" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand rollback" -l to -d 'Number of the revision; without: the last other one that ran' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand rollback" -l timeout -d 'Longest time of the operation, seconds' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand rollback" -l idempotency-key -d 'Under the same key the same request is done once, however often it is sent, and whatever has come of it' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand rollback" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand rollback" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand rollback" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand rollback" -s n -l namespace -d 'Namespace' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand rollback" -s l -l selector -d 'On all clusters with such labels: env=prod,tier in (web,api),!legacy; or id, name, provider, region, zone. Labels that agents report count unless the control plane has set that key' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand rollback" -l waves -d 'How many clusters at a time, as in 1,10%,all; without: all at once. The first failure stops what has not begun' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand rollback" -l ttl -d 'How long a cluster that is offline may take to come back: 90s, 10m, 2h; without: it fails' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand rollback" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand rollback" -l with-secrets -d 'Secrets as they were then; without it those of today stay'
complete -c pipeops -n "__fish_pipeops_using_subcommand rollback" -l take-over -d 'Take fields that another manager has set'
complete -c pipeops -n "__fish_pipeops_using_subcommand rollback" -l detach -d 'Print the id of the operation and do not wait for its end'
complete -c pipeops -n "__fish_pipeops_using_subcommand rollback" -l all-clusters -d 'On all clusters that your token reaches'
complete -c pipeops -n "__fish_pipeops_using_subcommand rollback" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand restart" -l timeout -d 'Longest time of the operation, seconds' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand restart" -l idempotency-key -d 'Under the same key the same request is done once, however often it is sent, and whatever has come of it' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand restart" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand restart" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand restart" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand restart" -s n -l namespace -d 'Namespace' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand restart" -s l -l selector -d 'On all clusters with such labels: env=prod,tier in (web,api),!legacy; or id, name, provider, region, zone. Labels that agents report count unless the control plane has set that key' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand restart" -l waves -d 'How many clusters at a time, as in 1,10%,all; without: all at once. The first failure stops what has not begun' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand restart" -l ttl -d 'How long a cluster that is offline may take to come back: 90s, 10m, 2h; without: it fails' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand restart" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand restart" -l detach -d 'Print the id of the operation and do not wait for its end'
complete -c pipeops -n "__fish_pipeops_using_subcommand restart" -l all-clusters -d 'On all clusters that your token reaches'
complete -c pipeops -n "__fish_pipeops_using_subcommand restart" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand scale" -l timeout -d 'Longest time of the operation, seconds' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand scale" -l idempotency-key -d 'Under the same key the same request is done once, however often it is sent, and whatever has come of it' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand scale" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand scale" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand scale" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand scale" -s n -l namespace -d 'Namespace' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand scale" -s l -l selector -d 'On all clusters with such labels: env=prod,tier in (web,api),!legacy; or id, name, provider, region, zone. Labels that agents report count unless the control plane has set that key' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand scale" -l waves -d 'How many clusters at a time, as in 1,10%,all; without: all at once. The first failure stops what has not begun' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand scale" -l ttl -d 'How long a cluster that is offline may take to come back: 90s, 10m, 2h; without: it fails' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand scale" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand scale" -l detach -d 'Print the id of the operation and do not wait for its end'
complete -c pipeops -n "__fish_pipeops_using_subcommand scale" -l all-clusters -d 'On all clusters that your token reaches'
complete -c pipeops -n "__fish_pipeops_using_subcommand scale" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand delete" -l timeout -d 'Longest time of the operation, seconds' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand delete" -l idempotency-key -d 'Under the same key the same request is done once, however often it is sent, and whatever has come of it' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand delete" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand delete" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand delete" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand delete" -s n -l namespace -d 'Namespace' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand delete" -s l -l selector -d 'On all clusters with such labels: env=prod,tier in (web,api),!legacy; or id, name, provider, region, zone. Labels that agents report count unless the control plane has set that key' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand delete" -l waves -d 'How many clusters at a time, as in 1,10%,all; without: all at once. The first failure stops what has not begun' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand delete" -l ttl -d 'How long a cluster that is offline may take to come back: 90s, 10m, 2h; without: it fails' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand delete" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand delete" -l volumes -d 'The data of its volumes too'
complete -c pipeops -n "__fish_pipeops_using_subcommand delete" -s y -l yes -d 'Do not ask'
complete -c pipeops -n "__fish_pipeops_using_subcommand delete" -l detach -d 'Print the id of the operation and do not wait for its end'
complete -c pipeops -n "__fish_pipeops_using_subcommand delete" -l all-clusters -d 'On all clusters that your token reaches'
complete -c pipeops -n "__fish_pipeops_using_subcommand delete" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand apps" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand apps" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand apps" -s n -l namespace -d 'Namespace' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand apps" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand apps" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand apps" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand status" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand status" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand status" -s n -l namespace -d 'Namespace' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand status" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand status" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand status" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand history" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand history" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand history" -s n -l namespace -d 'Namespace' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand history" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand history" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand history" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand logs" -l tail -d 'Last lines of each container' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand logs" -l since -d 'Only what is younger: 90s, 10m, 2h' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand logs" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand logs" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand logs" -s n -l namespace -d 'Namespace' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand logs" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand logs" -s f -l follow -d 'Go on with what is written from now on, by new pods too'
complete -c pipeops -n "__fish_pipeops_using_subcommand logs" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand exec" -l pod -d 'Pod; without: one that is ready' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand exec" -s c -l container -d 'Container; without: the first one of the pod' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand exec" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand exec" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand exec" -s n -l namespace -d 'Namespace' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand exec" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand exec" -s i -l stdin -d 'Pass standard input to the command'
complete -c pipeops -n "__fish_pipeops_using_subcommand exec" -s t -l tty -d 'A terminal for the command, where standard input is one; with -i'
complete -c pipeops -n "__fish_pipeops_using_subcommand exec" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand open" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand open" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand open" -s n -l namespace -d 'Namespace' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand open" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand open" -l print -d 'Print the URL and open nothing'
complete -c pipeops -n "__fish_pipeops_using_subcommand open" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand job; and not __fish_seen_subcommand_from run" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand job; and not __fish_seen_subcommand_from run" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand job; and not __fish_seen_subcommand_from run" -f -a "run" -d 'Run a command to its end, with image and environment of an application, and print its log'
complete -c pipeops -n "__fish_pipeops_using_subcommand job; and __fish_seen_subcommand_from run" -l timeout -d 'Longest time of the operation, seconds' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand job; and __fish_seen_subcommand_from run" -l idempotency-key -d 'Under the same key the same request is done once, however often it is sent, and whatever has come of it' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand job; and __fish_seen_subcommand_from run" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand job; and __fish_seen_subcommand_from run" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand job; and __fish_seen_subcommand_from run" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand job; and __fish_seen_subcommand_from run" -s n -l namespace -d 'Namespace' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand job; and __fish_seen_subcommand_from run" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand job; and __fish_seen_subcommand_from run" -l detach -d 'Print the id of the operation and do not wait for its end'
complete -c pipeops -n "__fish_pipeops_using_subcommand job; and __fish_seen_subcommand_from run" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and not __fish_seen_subcommand_from set list" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and not __fish_seen_subcommand_from set list" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and not __fish_seen_subcommand_from set list" -f -a "set" -d 'Set values of some keys, from standard input or files, and roll out what uses them'
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and not __fish_seen_subcommand_from set list" -f -a "list" -d 'List the names with their keys and who changed them; never a value'
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -l key -d 'Key whose value is read from FILE, or from standard input; may be given several times' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -l env-file -d 'File of lines KEY=VALUE; - is standard input' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -l remove -d 'Key that goes' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -l type -d 'What it is for; all keys of image_pull and tls are set together' -r -f -a "opaque\t''
image_pull\t''
tls\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -l timeout -d 'Longest time of the operation, seconds' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -l idempotency-key -d 'Under the same key the same request is done once, however often it is sent, and whatever has come of it' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -s n -l namespace -d 'Namespace' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -s l -l selector -d 'On all clusters with such labels: env=prod,tier in (web,api),!legacy; or id, name, provider, region, zone. Labels that agents report count unless the control plane has set that key' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -l waves -d 'How many clusters at a time, as in 1,10%,all; without: all at once. The first failure stops what has not begun' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -l ttl -d 'How long a cluster that is offline may take to come back: 90s, 10m, 2h; without: it fails' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -l config -d 'A ConfigMap in place of a Secret: values that anybody may read'
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -l no-rollout -d 'What uses it gets the values when its pods are replaced for another reason'
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -l detach -d 'Print the id of the operation and do not wait for its end'
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -l all-clusters -d 'On all clusters that your token reaches'
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from set" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from list" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from list" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from list" -s n -l namespace -d 'Namespace' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from list" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from list" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from list" -l config -d 'ConfigMaps in place of Secrets'
complete -c pipeops -n "__fish_pipeops_using_subcommand secret; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand clusters" -s l -l selector -d 'Only those with such labels: env=prod,tier in (web,api),!legacy; or id, name, provider, region, zone' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand clusters" -l group-by -d 'In groups by provider, region, zone or a label' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand clusters" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand clusters" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand clusters" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand clusters" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand kubeconfig" -l write -d 'Write it to this file, mode 0600, and print nothing' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand kubeconfig" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand kubeconfig" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand kubeconfig" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand kubeconfig" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and not __fish_seen_subcommand_from list drain uncordon remove" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and not __fish_seen_subcommand_from list drain uncordon remove" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and not __fish_seen_subcommand_from list drain uncordon remove" -f -a "list" -d 'List them'
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and not __fish_seen_subcommand_from list drain uncordon remove" -f -a "drain" -d 'Move the pods of a machine elsewhere, so that it can be worked on or removed'
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and not __fish_seen_subcommand_from list drain uncordon remove" -f -a "uncordon" -d 'Let pods come to a machine again that was drained'
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and not __fish_seen_subcommand_from list drain uncordon remove" -f -a "remove" -d 'Take a machine out of its cluster that is drained, or no longer there'
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from list" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from list" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from list" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from list" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from drain" -l grace-period -d 'Time that a pod gets to end, seconds; without it, its own' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from drain" -l timeout -d 'Longest time of the operation, seconds' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from drain" -l idempotency-key -d 'Under the same key the same request is done once, however often it is sent, and whatever has come of it' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from drain" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from drain" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from drain" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from drain" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from drain" -l force -d 'Pods that nothing recreates go too'
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from drain" -l detach -d 'Print the id of the operation and do not wait for its end'
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from drain" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from uncordon" -l idempotency-key -d 'Under the same key the same request is done once, however often it is sent, and whatever has come of it' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from uncordon" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from uncordon" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from uncordon" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from uncordon" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from uncordon" -l detach -d 'Print the id of the operation and do not wait for its end'
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from uncordon" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from remove" -l idempotency-key -d 'Under the same key the same request is done once, however often it is sent, and whatever has come of it' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from remove" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from remove" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from remove" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from remove" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from remove" -l force -d 'Also one that is ready and was not drained'
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from remove" -l detach -d 'Print the id of the operation and do not wait for its end'
complete -c pipeops -n "__fish_pipeops_using_subcommand nodes; and __fish_seen_subcommand_from remove" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and not __fish_seen_subcommand_from list status resume cancel" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and not __fish_seen_subcommand_from list status resume cancel" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and not __fish_seen_subcommand_from list status resume cancel" -f -a "list" -d 'List them, the newest first'
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and not __fish_seen_subcommand_from list status resume cancel" -f -a "status" -d 'Show one with each of its clusters'
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and not __fish_seen_subcommand_from list status resume cancel" -f -a "resume" -d 'Go on with the clusters that wait since an operation has failed'
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and not __fish_seen_subcommand_from list status resume cancel" -f -a "cancel" -d 'Begin on no more clusters; what runs ends by itself'
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and __fish_seen_subcommand_from list" -l limit -d 'How many at most' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and __fish_seen_subcommand_from list" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and __fish_seen_subcommand_from list" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and __fish_seen_subcommand_from list" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and __fish_seen_subcommand_from status" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and __fish_seen_subcommand_from status" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and __fish_seen_subcommand_from status" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and __fish_seen_subcommand_from status" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and __fish_seen_subcommand_from resume" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and __fish_seen_subcommand_from resume" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and __fish_seen_subcommand_from resume" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and __fish_seen_subcommand_from resume" -l detach -d 'Do not wait for its end'
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and __fish_seen_subcommand_from resume" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and __fish_seen_subcommand_from cancel" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and __fish_seen_subcommand_from cancel" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and __fish_seen_subcommand_from cancel" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand rollout; and __fish_seen_subcommand_from cancel" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and not __fish_seen_subcommand_from set list show delete" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and not __fish_seen_subcommand_from set list show delete" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and not __fish_seen_subcommand_from set list show delete" -f -a "set" -d 'Make a tenant, or change one: what is given is all that it has afterwards'
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and not __fish_seen_subcommand_from set list show delete" -f -a "list" -d 'List them with their namespaces, and what those use'
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and not __fish_seen_subcommand_from set list show delete" -f -a "show" -d 'Show one, with all of its quota and hosts'
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and not __fish_seen_subcommand_from set list show delete" -f -a "delete" -d 'Delete one: its namespaces with all that is in them, data too'
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from set" -s n -l namespace -d 'Namespaces that it has, each with the whole quota; they are made where they are not there' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from set" -l quota -d 'cpu, memory, storage, pods, load-balancers and node-ports of each namespace; of the last two 0 where nothing is said, the others without a limit' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from set" -l pod-security -d 'Level that Pod Security enforces' -r -f -a "baseline\t''
restricted\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from set" -l host -d 'Host names that its applications may have, `*.NAME` too' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from set" -l egress -d 'Private ranges that its pods may reach' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from set" -l remove-namespace -d 'Namespaces of the tenant that are deleted, with all that is in them' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from set" -l timeout -d 'Longest time of the operation, seconds' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from set" -l idempotency-key -d 'Under the same key the same request is done once, however often it is sent, and whatever has come of it' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from set" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from set" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from set" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from set" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from set" -s y -l yes -d 'Do not ask whether something is to be deleted, taken away or loosened'
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from set" -l detach -d 'Print the id of the operation and do not wait for its end'
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from set" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from list" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from list" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from list" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from list" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from show" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from show" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from show" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from show" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from show" -s h -l help -d 'Print help'
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from delete" -l timeout -d 'Longest time of the operation, seconds' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from delete" -l idempotency-key -d 'Under the same key the same request is done once, however often it is sent, and whatever has come of it' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from delete" -s o -l output -d 'Format on standard output' -r -f -a "text\t''
json\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from delete" -l context -d 'Context to use in place of the one in use' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from delete" -l cluster -d 'Cluster, by name or id' -r
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from delete" -l log-level -d 'Verbosity of logs' -r -f -a "debug\t''
info\t''
warn\t''
error\t''"
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from delete" -s y -l yes -d 'Do not ask for the name again'
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from delete" -l detach -d 'Print the id of the operation and do not wait for its end'
complete -c pipeops -n "__fish_pipeops_using_subcommand tenant; and __fish_seen_subcommand_from delete" -s h -l help -d 'Print help'
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
