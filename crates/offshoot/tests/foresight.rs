//! Offshoots of a snapshot teach the next ones what to fetch ahead.

use crate::common;

use bench::Outcome;
use bench::guest::Guest;
use common::{MINUTES, PageCache, TestHost, eventually, host, ready};
use serde_json::Value;
use std::time::Duration;

const MEMORY: u64 = 256 << 20;

/// What the mirror counted for a VM, and what was fetched ahead for its template.
fn counted(host: &TestHost, guest: &Guest) -> Outcome<(u64, Option<Value>)> {
    let stats: api::VmStats = host.client.get(&format!("/v1/vms/{}/stats", guest.name))?;
    Ok((stats.mirror["ram_faults"].as_u64().ok_or("the mirror counts faults")?, stats.prefetch))
}

/// Starts an offshoot with nothing of the snapshot in memory, has its server answer, and counts the faults until then.
fn offshoot(host: &TestHost, name: &str, policy: &str) -> Outcome<(u64, Option<Value>)> {
    let _cache = PageCache::emptied("1")?;
    let guest = host.restore_ahead(name, "web@1", Some(policy), None)?;
    ready(&guest)?;
    let counted = counted(host, &guest)?;
    // Half a second is the least that teaches.
    std::thread::sleep(Duration::from_millis(600));
    // So that the next one finds nothing of it in memory.
    host.command(&["rm", "--force", name])?;
    Ok(counted)
}

fn refuses(host: &TestHost, words: &[&str], why: &str) {
    let error = host.command(words).unwrap_err().to_string();
    assert!(error.contains(why), "{words:?}: {error}");
}

#[test]
fn an_offshoot_has_fetched_ahead_what_earlier_ones_touched() -> Outcome {
    let host = host("foresight");
    let guest = host.booted("web", MEMORY)?;
    host.command(&["snapshot", "web", "--tag", "1"])?;
    host.command(&["rm", "--force", "web"])?;
    drop(guest);

    let refused = |words: &[&str], why: &str| refuses(&host, words, why);
    refused(&["run", "--from", "web@1", "--prefetch", "magic"], "not a prefetch policy");
    refused(&["run", "--from", "web@1", "--eager", "7"], "from 0 to 1");
    refused(&["run", "debian", "--prefetch", "magic"], "not a prefetch policy");

    let (alone, none) = offshoot(&host, "cold", "none")?;
    assert!(none.is_none(), "nothing is fetched ahead: {none:?}");
    let said = |words: &str| -> Outcome<bool> {
        Ok(std::fs::read_to_string(host.home.join("run/daemon.log"))?.contains(words))
    };
    eventually("one that has ended has taught what it could", || said("touched in 1 recordings"))?;

    host.command(&["run", "--from", "web@1", "--name", "shy", "--prefetch", "none", "--no-learn"])?;
    std::thread::sleep(Duration::from_secs(1));
    host.command(&["rm", "--force", "shy"])?;

    // One that lives until it has taught something; the one before has not.
    let teacher = host.restore_ahead("teacher", "web@1", Some("none"), None)?;
    ready(&teacher)?;
    eventually("the profile is learnt", || {
        teacher.await_response(None, MINUTES)?;
        std::thread::sleep(Duration::from_millis(500));
        said("touched in 2 recordings")
    })?;
    assert!(!said("touched in 3 recordings")?);
    host.command(&["rm", "--force", "teacher"])?;
    eventually("what the first touched is laid down in order", || said("pages moved; fetching"))?;
    let told = host.command(&["snapshot", "arrange", "web@1", "--json"])?;
    let told: api::SnapshotArranged = serde_json::from_str(&told)?;
    // Of its page cache, a few blocks may have been laid down for its disk.
    assert!(told.pages > 256 && told.moved + told.left == told.pages && told.left * 100 <= told.pages, "{told:?}");
    assert!(told.after.fetched_bytes * 100 <= told.after.bytes * 125 + (128 << 10) * 100, "{told:?}");
    refused(&["snapshot", "arrange", "web@2"], "no snapshot is named web@2");
    let verified: Value = serde_json::from_str(&host.command(&["fsck", "--json"])?)?;
    assert_eq!(verified["faults"].as_array().map(Vec::len), Some(0), "{verified}");

    let (faults, stream) = offshoot(&host, "taught", "twinkle:64,4")?;
    let stream = stream.ok_or("something was fetched ahead")?;
    assert!(stream["fetched_bytes"].as_u64() > Some(1 << 20), "{stream}");
    assert!(faults * 3 < alone, "{faults} faults with the working set at hand, {alone} without");

    let (faults, stream) = offshoot(&host, "full", "all")?;
    let fetched = stream.ok_or("all was fetched ahead")?["fetched_bytes"].as_u64();
    assert!(faults <= alone && fetched > Some(MEMORY / 16), "{faults} faults, {fetched:?} bytes");

    // What was learnt goes with the snapshot.
    let between = host.home.join("between").display().to_string();
    host.command(&["push", "--to", &between, "web@1"])?;
    let other = common::host("foresight-there");
    refuses(&other, &["snapshot", "arrange", "web@1"], "no snapshot is named web@1");
    other.command(&["pull", "--from", &between, "web@1"])?;
    let told: api::SnapshotArranged =
        serde_json::from_str(&other.command(&["snapshot", "arrange", "web@1", "--json"])?)?;
    assert!(told.pages > 256, "{told:?}");
    let (faults, stream) = offshoot(&other, "there", "twinkle:64,4")?;
    let fetched = stream.ok_or("something was fetched ahead")?["fetched_bytes"].as_u64();
    assert!(fetched > Some(1 << 20) && faults * 3 < alone, "{faults} faults, {alone} without; {fetched:?} bytes");
    Ok(())
}
