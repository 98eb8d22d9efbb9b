//! What other people's machines showed: inputs beyond the first of each code, with a near miss
//! each. Sources are public threads, named as repository#issue.

mod machine;
mod network;

use super::addresses::dual;
use super::*;

/// Where it was seen, the code, what raises it, what comes near without raising it.
type Row = (&'static str, &'static str, Change, Change);

fn etc(case: &mut Case, text: &str) {
    case.facts.resolv_confs.etc = resolv(text);
}

fn public_address(case: &mut Case) {
    case.facts.interfaces[0] = Interface::new("eth0", &["198.51.100.7/24"]);
    case.facts.routes[0].source = Some("198.51.100.7".into());
}

fn ours(case: &mut Case) {
    case.facts.k3s.installed_role = Some(NodeRole::Server);
}

fn held(case: &mut Case, protocol: &str, port: u16, address: &str) {
    case.facts.listeners = vec![Listener { protocol: protocol.into(), ..listener(port, address) }];
}

#[test]
fn each_symptom_is_found_and_its_near_miss_is_not() {
    let mut wrong = Vec::new();
    for (seen, code, fault, near) in network::ROWS.iter().chain(machine::ROWS) {
        let (mut bad, mut good) = (case(), case());
        fault(&mut bad);
        near(&mut good);
        let has = |case: &Case| found(case).iter().any(|f| f.code == *code);
        let (raised, missed) = (has(&bad), !has(&good));
        println!(
            "{code:20} {seen:45} raised {raised:5}  near miss {}",
            if missed { "silent" } else { "RAISED" }
        );
        if !raised || !missed {
            wrong.push(format!(
                "{code} ({seen}): raised {raised}, near miss silent {missed}: {:?} / {:?}",
                found(&bad),
                found(&good)
            ));
        }
        assert!(
            found(&bad).iter().all(|f| !f.fix.is_empty() && !f.evidence.is_empty()),
            "{seen}: {:?}",
            found(&bad)
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
