//! Reaching the daemon; the first command starts it.

use api::{Client, ClientError};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// How long a daemon may take to answer: it may have much to recover.
const LIMIT: Duration = Duration::from_secs(120);

/// A client of the daemon of `home`, which is started where none answers.
pub(super) fn daemon(home: &Path) -> Result<Client, Box<dyn std::error::Error>> {
    let client = Client::new(&home.join("run/daemon.sock"))?;
    let Err(first) = client.get::<api::Version>("/v1/version") else { return Ok(client) };
    if !absent(&first) {
        return Err(first.into());
    }
    let run = home.join("run");
    std::fs::create_dir_all(&run)
        .map_err(|e| format!("make {}: {e}; choose another directory with --home", run.display()))?;
    let log_path = run.join("daemon.log");
    let home = &home.canonicalize()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--home").arg(home).arg("serve");
    let end = Instant::now() + LIMIT;
    // One that is just ending must be gone first, or ours would give way to it.
    while crate::daemon::held(home) && Instant::now() < end {
        if client.get::<api::Version>("/v1/version").is_ok() {
            return Ok(client);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut starts = 1;
    let mut child = vmm::process::spawn(&command, &[], None, &log_path)?;
    loop {
        std::thread::sleep(Duration::from_millis(5));
        match client.get::<api::Version>("/v1/version") {
            Ok(_) => return Ok(client),
            Err(error) if absent(&error) && Instant::now() > end => return Err(error.into()),
            Err(error) if absent(&error) => {}
            Err(error) => return Err(error.into()),
        }
        // Another command may have started one at the same time: ours then ends, and theirs answers soon.
        if !child.alive() && client.get::<api::Version>("/v1/version").is_err() && !crate::daemon::held(home) {
            // Theirs may have ended since; the next one is ours, unless something is wrong.
            if starts == 3 {
                let words = vmm::process::last_words(&log_path);
                return Err(format!("the daemon ended at start: {words}").into());
            }
            starts += 1;
            child = vmm::process::spawn(&command, &[], None, &log_path)?;
        }
    }
}

/// Whether no daemon answers: none is there, or one that is just ending hung up.
fn absent(error: &ClientError) -> bool {
    matches!(error, ClientError::Unreachable { .. } | ClientError::Broken { .. })
}
