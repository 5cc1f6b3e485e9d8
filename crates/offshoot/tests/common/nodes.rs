//! Nodes that run from a store on the S3 server, and what is asked of them at the command line.

use super::{TestHost, host, program};
use crate::weed;
use std::path::Path;
use std::process::{Command, Output};

/// A place in the server's bucket for one test, seen through `port`.
pub(crate) fn url(port: u16, prefix: &str) -> String {
    weed::url_at(&format!("http://127.0.0.1:{port}"), prefix)
}

/// A node that runs from `url`, with nothing cached.
pub(crate) fn node(name: &str, url: &str, cache: &str) -> TestHost {
    let home = std::path::PathBuf::from(format!("/tmp/os-{name}-{}", std::process::id()));
    let output = command(&home, &["ps"]).env("OFFSHOOT_STORE", url).env("OFFSHOOT_CACHE_SIZE", cache).output();
    let output = output.expect("the program starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // What the first command said is on record from here on.
    host(name)
}

pub(crate) fn command(home: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.arg("--home").arg(home).args(words).env_remove("OFFSHOOT_STORE").env_remove("OFFSHOOT_CACHE_SIZE");
    command.env("AWS_ACCESS_KEY_ID", weed::credentials().key_id).env("AWS_SECRET_ACCESS_KEY", weed::SECRET);
    command
}

fn ask(host: &TestHost, words: &[&str]) -> Output {
    let output = command(&host.home, words).output().expect("the program starts");
    assert!(!String::from_utf8_lossy(&output.stderr).contains(weed::SECRET));
    output
}

/// Asks for what must be done; what was printed.
pub(crate) fn done(host: &TestHost, words: &[&str]) -> String {
    let output = ask(host, words);
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Asks for what must be refused with these words.
pub(crate) fn refused(host: &TestHost, words: &[&str], why: &str) {
    let output = ask(host, words);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains(why), "{words:?} says: {said}");
}
