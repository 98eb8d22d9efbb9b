//! Which rules of a saved iptables table are those of Kubernetes, and how they are removed.

/// Whether a chain or an address set is one that Kubernetes, flannel or the CNI plugins made.
pub(super) fn is_kubernetes(chain: &str) -> bool {
    ["KUBE-", "CNI-", "FLANNEL-"].iter().any(|p| chain.starts_with(p))
}

/// The commands that take our chains, and the rules that lead into them, out of a table: rules
/// first, then flush, then delete.
pub(super) fn removals(saved: &str, table: &str) -> Vec<Vec<String>> {
    let mut commands = Vec::new();
    let mut chains = Vec::new();
    for line in saved.lines() {
        if let Some(chain) = line
            .strip_prefix(':')
            .and_then(|l| l.split_whitespace().next())
            .filter(|c| is_kubernetes(c))
        {
            chains.push(chain.to_owned());
        }
        let Some(rule) = line.strip_prefix("-A ") else { continue };
        let words = saved_words(rule);
        let target =
            words.iter().position(|w| w == "-j" || w == "-g").and_then(|at| words.get(at + 1));
        let from_ours = words.first().is_some_and(|c| is_kubernetes(c));
        // rules with a target of the kernel's own are known by their words: flannel and kube-router
        // put ACCEPT and MASQUERADE into chains that are not theirs
        let marked = words.windows(2).any(|w| match w[0].as_str() {
            "--comment" => ["flanneld", "KUBE-ROUTER ", "kube-router netpol"]
                .iter()
                .any(|c| w[1].starts_with(c)),
            "--match-set" => is_kubernetes(&w[1]),
            _ => false,
        });
        if !from_ours && (target.is_some_and(|t| is_kubernetes(t)) || marked) {
            let mut args = vec!["-t".to_owned(), table.to_owned(), "-D".to_owned()];
            args.extend(words);
            commands.push(args);
        }
    }
    let each = |flag: &str| {
        chains
            .iter()
            .map(|c| ["-t", table, flag, c].map(str::to_owned).to_vec())
            .collect::<Vec<_>>()
    };
    commands.extend(each("-F"));
    commands.extend(each("-X"));
    commands
}

/// Splits a line of iptables-save: words, with double quotes around those that hold spaces. Not a
/// shell's words: inside the quotes it writes a backslash before `'` too (iptables
/// `libxtables/xtables.c`, `xtables_save_string`), which a shell would keep.
fn saved_words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted, mut escaped) = (Vec::new(), String::new(), false, false);
    for c in line.chars() {
        match c {
            _ if escaped => {
                word.push(c);
                escaped = false;
            }
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ' ' if !quoted => words.extend((!word.is_empty()).then(|| std::mem::take(&mut word))),
            _ => word.push(c),
        }
    }
    words.extend((!word.is_empty()).then_some(word));
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As kube-router 2.6 leaves them in the kernel's own chains (cloudnativelabs/kube-router
    /// `pkg/controllers/netpol`).
    #[test]
    fn rules_that_accept_for_a_network_policy_go_too() {
        let comment =
            "KUBE-ROUTER rule to explicitly ACCEPT traffic that comply to network policies";
        let saved = format!(
            "*filter\n:INPUT ACCEPT [0:0]\n:KUBE-ROUTER-INPUT - [0:0]\n\
             -A INPUT -m comment --comment \"kube-router netpol - 4IA2OSFRMVNDXBVV\" -j KUBE-ROUTER-INPUT\n\
             -A INPUT -m comment --comment \"{comment}\" -m mark --mark 0x20000/0x20000 -j ACCEPT\n\
             -A INPUT -m comment --comment \"ssh from the office, not KUBE-ROUTER\" -p tcp -m tcp --dport 22 -j ACCEPT\n\
             -A OUTPUT -m set --match-set KUBE-DST-ABC dst -j ACCEPT\n-A OUTPUT -m set --match-set office dst -j ACCEPT\nCOMMIT\n"
        );
        let commands: Vec<String> =
            removals(&saved, "filter").iter().map(|c| c.join(" ")).collect();
        assert_eq!(
            commands,
            [
                "-t filter -D INPUT -m comment --comment kube-router netpol - 4IA2OSFRMVNDXBVV -j KUBE-ROUTER-INPUT".to_owned(),
                format!("-t filter -D INPUT -m comment --comment {comment} -m mark --mark 0x20000/0x20000 -j ACCEPT"),
                "-t filter -D OUTPUT -m set --match-set KUBE-DST-ABC dst -j ACCEPT".to_owned(),
                "-t filter -F KUBE-ROUTER-INPUT".to_owned(),
                "-t filter -X KUBE-ROUTER-INPUT".to_owned(),
            ]
        );
    }

    #[test]
    fn foreign_rules_stay() {
        let saved = "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n:MYCHAIN - [0:0]\n\
                     -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
                     -A PREROUTING -p tcp -m tcp --dport 8080 -j MYCHAIN\n-A KUBE-SERVICES -d 10.43.0.1/32 -j ACCEPT\n\
                     -A POSTROUTING -s 10.42.0.0/16 -m comment --comment \"flanneld masq\" -j MASQUERADE\nCOMMIT\n";
        let commands: Vec<String> = removals(saved, "nat").iter().map(|c| c.join(" ")).collect();
        assert_eq!(
            commands,
            [
                "-t nat -D PREROUTING -m comment --comment kubernetes service portals -j KUBE-SERVICES",
                "-t nat -D POSTROUTING -s 10.42.0.0/16 -m comment --comment flanneld masq -j MASQUERADE",
                "-t nat -F KUBE-SERVICES",
                "-t nat -X KUBE-SERVICES",
            ]
        );
    }
}
