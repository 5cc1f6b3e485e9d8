//! Blobs as people and scripts use them: through the command line and over HTTP, past a daemon that dies.

use crate::common;

use bench::Outcome;
use common::{TestHost, host, kill, program};
use std::io::Write as _;
use std::process::{Command, Output, Stdio};

/// Bytes that look random.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(step).collect()
}

/// Runs a blob command with bytes on its standard input.
fn blob(host: &TestHost, words: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(program())
        .arg("--home")
        .arg(&host.home)
        .arg("blob")
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    // One that refuses does not read to the end.
    let _ = child.stdin.take().expect("piped").write_all(input);
    child.wait_with_output().expect("it ends")
}

/// What a command printed, which must succeed.
fn done(host: &TestHost, words: &[&str], input: &[u8]) -> Vec<u8> {
    let output = blob(host, words, input);
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn text(host: &TestHost, words: &[&str], input: &[u8]) -> String {
    String::from_utf8(done(host, words, input)).expect("names are text").trim().to_owned()
}

/// What a command says that must fail.
fn refused(host: &TestHost, words: &[&str], input: &[u8], why: &str) {
    let output = blob(host, words, input);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains(why), "{words:?} says: {said}");
}

#[test]
fn every_version_can_be_read_and_what_is_refused_changes_nothing() -> Outcome {
    let host = host("b1");
    text(&host, &["create", "team/disk", "8M"], b"");
    let first = noise(1, 3_000_001);
    assert_eq!(text(&host, &["write", "team/disk", "--offset", "4097"], &first), "team/disk@1");
    assert_eq!(text(&host, &["append", "team/disk"], &first[..12_345]), "team/disk@2");
    assert_eq!(text(&host, &["zero", "team/disk", "0", "1M"], b""), "team/disk@3");
    let mut model = vec![0; 8 << 20];
    model[4097..4097 + first.len()].copy_from_slice(&first);
    let one = model.clone();
    model.extend_from_slice(&first[..12_345]);
    let two = model.clone();
    model[..1 << 20].fill(0);
    // A daemon that dies takes nothing with it.
    kill(host.daemon_pid()?);
    for (version, expected) in
        [("team/disk@0", &vec![0; 8 << 20]), ("team/disk@1", &one), ("team/disk@2", &two), ("team/disk", &model)]
    {
        assert!(done(&host, &["read", version], b"") == *expected, "{version} is not what was written");
    }
    let part = done(&host, &["read", "team/disk@1", "--offset", "5000", "--length", "100001"], b"");
    assert!(part == one[5000..105_001]);

    // A version is a disk for other programs as well.
    let file = host.home.join("one.raw");
    host.command(&["export", "blob:team/disk@1", &file.to_string_lossy()])?;
    assert!(std::fs::read(&file)? == one);

    text(&host, &["tag", "team/disk", "gold", "1"], b"");
    assert_eq!(text(&host, &["clone", "team/disk@gold", "copy", "other"], b""), "copy\nother");
    text(&host, &["write", "copy", "--offset", "100"], b"mine");
    assert!(done(&host, &["read", "team/disk@gold"], b"") == one, "a clone's writes are its own");
    assert!(done(&host, &["read", "other"], b"") == one);
    let diff: serde_json::Value = serde_json::from_slice(&done(&host, &["diff", "copy", "0", "1", "--json"], b""))?;
    assert_eq!(diff["ranges"], serde_json::json!([[0, 4096]]), "{diff}");
    assert_eq!(text(&host, &["snapshot", "both", "copy", "team/disk@gold"], b""), "copy@1\nteam/disk@1");

    refused(&host, &["create", "copy", "1M"], b"", "copy is there already");
    refused(&host, &["create", "x", "1M", "--block", "3000"], b"", "block");
    refused(&host, &["read", "nobody"], b"", "no blob is named nobody");
    refused(&host, &["read", "copy@9"], b"", "no version 9");
    refused(&host, &["read", "copy@red"], b"", "no version tagged red");
    refused(&host, &["read", "copy", "--offset", "8M", "--length", "1"], b"", "are not in it");
    refused(&host, &["write", "copy", "--offset", "8M"], b"x", "outside the blob");
    refused(&host, &["rm", "team/disk@1"], b"", "tagged `gold`");
    refused(&host, &["rm", "copy@1"], b"", "latest");
    refused(&host, &["snapshot", "both", "copy"], b"", "both is there already");
    refused(&host, &["tag", "copy", "17"], b"", "numbers stand for versions");
    let log: Vec<api::BlobVersion> = serde_json::from_slice(&done(&host, &["log", "team/disk", "--json"], b""))?;
    let told: Vec<_> = log.iter().map(|v| (v.number, v.change.as_str(), v.bytes)).collect();
    assert_eq!(told, [(3, "write", 1 << 20), (2, "append", 12_345), (1, "write", 3_000_001), (0, "create", 0)]);

    // What nothing names any more goes; what a snapshot names stays.
    text(&host, &["rm", "team/disk", "other"], b"");
    let before = host.client.get::<api::NodeStats>("/v1/stats")?.store_stored_bytes;
    let kept: Vec<api::BlobSnapshot> = host.client.get("/v1/blob-snapshots")?;
    assert_eq!(kept[0].versions["team/disk"], 1);
    text(&host, &["rm", "copy"], b"");
    text(&host, &["snapshots", "--remove", "both"], b"");
    let after = host.client.get::<api::NodeStats>("/v1/stats")?.store_stored_bytes;
    assert!(after < before / 10, "{after} bytes are left of {before}");
    Ok(())
}

#[test]
fn a_write_that_breaks_off_writes_nothing() -> Outcome {
    struct Breaks(usize);
    impl std::io::Read for Breaks {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            if self.0 == 0 {
                return Err(std::io::Error::other("the cable was pulled"));
            }
            let n = buffer.len().min(self.0);
            buffer[..n].fill(7);
            self.0 -= n;
            Ok(n)
        }
    }
    let host = host("b2");
    text(&host, &["create", "disk", "16M"], b"");
    let sent = host.client.upload::<api::BlobChanged>("PUT", "/v1/blobs/disk/data?offset=0", Breaks(5 << 20), |_| {});
    assert!(sent.is_err(), "{sent:?}");
    assert_eq!(host.client.get::<api::Blob>("/v1/blobs/disk")?.latest, 0);
    assert!(done(&host, &["read", "disk"], b"").iter().all(|&b| b == 0));
    // Many writers of one blob: each is one version, and none is lost.
    std::thread::scope(|scope| {
        for writer in 0..8_u64 {
            let host = &host;
            scope.spawn(move || {
                for i in 0..4 {
                    let offset = ((writer * 4 + i) * 65_536 + 11).to_string();
                    text(host, &["write", "disk", "--offset", &offset], &noise(writer * 100 + i, 30_000));
                }
            });
        }
    });
    let bytes = done(&host, &["read", "disk"], b"");
    for slot in 0..32_usize {
        let (writer, i) = (slot as u64 / 4, slot as u64 % 4);
        assert!(bytes[slot * 65_536 + 11..][..30_000] == noise(writer * 100 + i, 30_000), "slot {slot}");
    }
    assert_eq!(host.client.get::<api::Blob>("/v1/blobs/disk")?.latest, 32);
    Ok(())
}
