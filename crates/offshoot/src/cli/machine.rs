//! Commands about the host and the node.

use super::{Outcome, output};
use api::{Check, Client, ClientError, NodeStats, StoreReport, VerifyReply};
use base::units::human;
use std::path::Path;

/// Works without a daemon, and without starting one.
pub(super) fn doctor(home: &Path, json: bool) -> Outcome {
    let mut checks = node::doctor::examine(home);
    let client = Client::new(&home.join("run/daemon.sock"))?;
    let daemon = client.get::<api::Version>("/v1/version");
    checks.push(Check {
        name: "daemon".into(),
        ok: daemon.is_ok(),
        needed: false,
        detail: match &daemon {
            Ok(v) => format!("process {} of version {} answers for {}", v.pid, v.program, v.home),
            Err(_) => "none runs; the next command starts one".into(),
        },
    });
    checks.extend(store(home, &client));
    if let Ok(exports) = client.get::<Vec<api::NbdExport>>("/v1/nbd") {
        let failed = exports.iter().any(|e| e.state == api::NbdState::Failed);
        let named: Vec<String> = exports.iter().map(|e| format!("{} ({})", e.name, e.state)).collect();
        let detail = if named.is_empty() { "nothing is served".into() } else { named.join(", ") };
        checks.push(Check { name: "NBD exports".into(), ok: !failed, needed: false, detail });
    }
    if json {
        output::json(&checks);
    } else {
        let mark = |c: &Check| {
            if c.ok {
                "ok"
            } else if c.needed {
                "MISSING"
            } else {
                "limited"
            }
            .to_owned()
        };
        let rows: Vec<Vec<String>> = checks.iter().map(|c| vec![mark(c), c.name.clone(), c.detail.clone()]).collect();
        output::table(&["STATE", "WHAT", "FOUND"], &rows);
    }
    if checks.iter().any(|c| c.needed && !c.ok) {
        return Err("something that is needed is missing".into());
    }
    Ok(())
}

/// How a shared store does; of a daemon that does not run, what is on record.
fn store(home: &Path, client: &Client) -> Option<Check> {
    let check = |ok, detail| Some(Check { name: "store".into(), ok, needed: false, detail });
    let Ok(report) = client.get::<StoreReport>("/v1/store") else {
        let place = node::Place::of(home).ok()??;
        return check(true, format!("{} as node {}; no daemon runs to ask it", place.url, place.node));
    };
    let Some(node) = &report.node else { return check(true, format!("{}, this node's own", report.url)) };
    let cache = format!(
        "cache {} of {}{}",
        human(report.cache_filled_bytes),
        human(report.cache_bytes),
        report.hit_rate.map_or(String::new(), |rate| format!(", {:.0}% of reads hit", rate * 100.0))
    );
    if report.reachable && report.mirror_trouble.is_none() {
        return check(true, format!("{} answers, node {node}; {cache}", report.url));
    }
    let why = report.mirror_trouble.or(report.last_failure).unwrap_or_default();
    let since = report.away_ms.map_or(String::new(), |ms| format!(" for {} s", ms / 1000));
    let circuit = report.circuit.unwrap_or_default();
    check(
        false,
        format!(
            "{} does not answer{since}: {why}; requests are {circuit}; what is cached is served, {} commits wait; {cache}",
            report.url, report.waiting_commits
        ),
    )
}

/// Ends the daemon.
pub(super) fn shutdown(home: &Path, stop: bool) -> Outcome {
    let client = Client::new(&home.join("run/daemon.sock"))?;
    let answering = || client.get::<api::Version>("/v1/version").ok().map(|version| version.pid);
    let before = answering();
    let asked = client.post::<serde_json::Value>(&format!("/v1/shutdown?stop={stop}"), &());
    match asked {
        Ok(_) => {}
        Err(ClientError::Unreachable { .. }) if !stop => {
            eprintln!("no daemon runs for {}", home.display());
            return Ok(());
        }
        Err(ClientError::Unreachable { .. }) => {
            let client = super::connect::daemon(home)?;
            client.post::<serde_json::Value>("/v1/shutdown?stop=true", &())?;
        }
        Err(error) => return Err(error.into()),
    }
    // It is over when the lock is free, or when another command has started the next daemon meanwhile.
    let end = std::time::Instant::now() + std::time::Duration::from_secs(120);
    while crate::daemon::held(home) && (before.is_none() || answering().is_none_or(|pid| Some(pid) == before)) {
        if std::time::Instant::now() > end {
            return Err("the daemon does not end; see its log".into());
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Ok(())
}

/// Shows the node's counters.
pub(super) fn stats(client: &Client, json: bool) -> Outcome {
    let stats: NodeStats = client.get("/v1/stats")?;
    if json {
        output::json(&stats);
    } else {
        output::table(
            &["RUNNING", "STORE LOGICAL", "STORE ON DISK"],
            &[vec![stats.running.to_string(), human(stats.store_logical_bytes), human(stats.store_stored_bytes)]],
        );
    }
    Ok(())
}

/// Checks the store.
pub(super) fn verify(client: &Client, json: bool) -> Outcome {
    let mut show = output::Show::new();
    let reply: VerifyReply = client.post_long("/v1/verify", &(), |p| show.update(p))?;
    drop(show);
    if json {
        output::json(&reply);
    } else {
        println!("{} blocks read and checked, {} faults", reply.blocks, reply.faults.len());
        reply.faults.iter().for_each(|f| println!("{f}"));
    }
    if reply.faults.is_empty() {
        Ok(())
    } else {
        Err("the store is damaged; what is named above cannot be read".into())
    }
}
