//! Images, snapshots and blobs on their way between the stores of two nodes, over a directory and over a real S3
//! server; and cleaning up.

use crate::common;
use crate::weed;

use bench::Outcome;
use common::tiny::disk_bytes;
use common::{TestHost, halting_kernel, host, program};
use std::process::{Command, Output};

fn offshoot(host: &TestHost, words: &[&str]) -> Output {
    Command::new(program())
        .arg("--home")
        .arg(&host.home)
        .args(words)
        .env("AWS_ACCESS_KEY_ID", weed::credentials().key_id)
        .env("AWS_SECRET_ACCESS_KEY", weed::SECRET)
        .output()
        .expect("the program starts")
}

fn json<T: serde::de::DeserializeOwned>(host: &TestHost, words: &[&str]) -> T {
    let output = offshoot(host, words);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {said}");
    assert!(!said.contains(weed::SECRET));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{words:?} prints no JSON: {e}"))
}

fn refused(host: &TestHost, words: &[&str], why: &str) {
    let output = offshoot(host, words);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains(why), "{words:?} says: {said}");
    assert!(!said.contains(weed::SECRET));
}

/// A node with an image, a machine of it, and a snapshot of that.
fn node_with_a_snapshot(name: &str) -> Outcome<TestHost> {
    let host = host(name);
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("halt"), halting_kernel())?;
    std::fs::write(dir.path().join("disk"), disk_bytes())?;
    let at = |file: &str| dir.path().join(file).display().to_string();
    host.command(&["image", "import", &at("disk"), "--name", "tiny", "--kernel", &at("halt"), "--cmdline", "quiet"])?;
    host.command(&["run", "tiny", "--name", "t", "--memory", "64M"])?;
    host.command(&["snapshot", "t", "--tag", "one"])?;
    Ok(host)
}

/// From one node through `store` to another, where it runs.
fn there_and_back(name: &str, store: &str) -> Outcome {
    let from = node_with_a_snapshot(&format!("{name}a"))?;
    let sent: Vec<api::Moved> = json(&from, &["push", "t@one", "tiny", "--to", store, "--json"]);
    assert!(sent[0].blocks_sent > 1000, "{sent:?}");
    assert!(sent[1].blocks_sent < 10, "the image's disk is the snapshot's, and was there: {sent:?}");
    refused(&from, &["push", "t@one", "--to", store], "t@one is there already");
    let again: Vec<api::Moved> = json(&from, &["push", "t@one", "--to", store, "--force", "--json"]);
    assert_eq!((again[0].blocks_sent, again[0].blocks_read), (0, 0), "nothing differs, and nothing is read");
    refused(&from, &["push", "t@two", "--to", store], "t@two is not there");
    from.command(&["blob", "create", "notes", "1M"])?;
    let note = from.home.join("note");
    std::fs::write(&note, b"remember")?;
    from.command(&["blob", "write", "notes", "--offset", "4000", &note.to_string_lossy()])?;
    json::<Vec<api::Moved>>(&from, &["push", "blob:notes", "--to", store, "--json"]);

    let to = host(&format!("{name}b"));
    let mut names: Vec<String> =
        json::<Vec<api::Stored>>(&to, &["remote", store, "--json"]).into_iter().map(|s| s.name).collect();
    names.sort();
    assert_eq!(names, ["blob:notes", "image:tiny", "t@one"]);
    json::<Vec<api::Moved>>(&to, &["pull", "t@one", "blob:notes", "--from", store, "--json"]);
    refused(&to, &["pull", "t@one", "--from", store], "t@one is there already");
    refused(&to, &["pull", "nothing", "--from", store], "nothing is not there");
    // It runs, forks, and boots again without its image, which never came.
    to.command(&["run", "--from", "t@one", "--name", "back"])?;
    to.command(&["fork", "back", "-n", "2"])?;
    let running = json::<serde_json::Value>(&to, &["ps", "--json"]);
    assert_eq!(running.as_array().map(Vec::len), Some(3), "{running}");
    assert!(running.as_array().is_some_and(|all| all.iter().all(|vm| vm["state"] == "running")), "{running}");
    let disk = to.home.join("disk.raw");
    to.command(&["export", "t@one", &disk.to_string_lossy()])?;
    assert!(std::fs::read(&disk)? == disk_bytes(), "the disk is what it was");
    assert_eq!(to.command(&["blob", "read", "notes@1", "--offset", "4000", "--length", "8"])?, "remember");
    let verified = json::<serde_json::Value>(&to, &["fsck", "--json"]);
    assert_eq!(verified["faults"].as_array().map(Vec::len), Some(0), "{verified}");
    // Ids of the other node mean nothing here: a snapshot taken here goes back, beside the first.
    to.command(&["snapshot", "back-1", "--tag", "two"])?;
    json::<Vec<api::Moved>>(&to, &["push", "back-1@two", "--to", store, "--json"]);
    json::<Vec<api::Moved>>(&from, &["pull", "back-1@two", "--from", store, "--json"]);
    from.command(&["run", "--from", "back-1@two", "--name", "returned"])?;
    from.command(&["rm", "--force", "returned", "t"])?;
    Ok(())
}

#[test]
fn what_is_pushed_to_a_directory_is_pulled_and_runs() -> Outcome {
    let dir = tempfile::tempdir()?;
    there_and_back("sd", &dir.path().join("store").to_string_lossy())
}

#[test]
fn what_is_pushed_to_s3_is_pulled_and_runs() -> Outcome {
    there_and_back("ss", &weed::url_at(&weed::weed().endpoint, "nodes"))
}

#[test]
fn a_store_that_cannot_be_used_is_refused_by_name() -> Outcome {
    let host = host("sr");
    refused(&host, &["remote", "s3://offshoot/x?endpoint=http://127.0.0.1:1"], "127.0.0.1:1");
    refused(&host, &["remote", "/nonexistent/store"], "/nonexistent/store");
    refused(&host, &["remote", "ftp://somewhere"], "names no store");
    Ok(())
}

#[test]
fn a_rule_drops_old_snapshots_and_a_dry_run_drops_none() -> Outcome {
    let host = node_with_a_snapshot("sg")?;
    for tag in ["two", "three"] {
        host.command(&["snapshot", "t", "--tag", tag])?;
    }
    let count = || json::<Vec<api::Snapshot>>(&host, &["snapshot", "ls", "--json"]).len();
    let plan: api::GcReply = json(&host, &["gc", "--keep-last", "1", "--dry-run", "--json"]);
    assert_eq!(plan.dropped.len(), 2, "{plan:?}");
    assert!(!plan.packs.is_empty() && plan.packs.iter().all(|p| !p.why.is_empty()), "{plan:?}");
    assert_eq!(count(), 3);
    // No rule, no loss.
    assert!(json::<api::GcReply>(&host, &["gc", "--json"]).dropped.is_empty());
    assert_eq!(count(), 3);
    let done: api::GcReply = json(&host, &["gc", "--keep-last", "1", "--json"]);
    assert_eq!(done.dropped, plan.dropped);
    assert_eq!(count(), 1);
    host.command(&["run", "--from", "t@three", "--name", "kept"])?;
    let verified = json::<serde_json::Value>(&host, &["fsck", "--json"]);
    assert_eq!(verified["faults"].as_array().map(Vec::len), Some(0), "{verified}");
    Ok(())
}
