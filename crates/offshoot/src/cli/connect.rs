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
    let mut child: Option<vmm::process::ProcessId> = None;
    let mut starts = 0;
    // Where the log of the last start begins: each says the same again where it is for a reason that lasts.
    let mut from = 0;
    loop {
        match client.get::<api::Version>("/v1/version") {
            Ok(_) => return Ok(client),
            Err(error) if !absent(&error) || Instant::now() > end => return Err(error.into()),
            Err(_) => {}
        }
        // Where somebody holds the home, it is a daemon that another command started and that answers soon, or one
        // that is just ending and must be gone first: ours would give way to either.
        if !crate::daemon::held(home) && !child.is_some_and(|child| child.alive()) {
            if starts == 3 {
                let words = vmm::process::last_words_from(&log_path, from);
                return Err(format!("the daemon ended at start: {words}").into());
            }
            starts += 1;
            from = std::fs::metadata(&log_path).map_or(0, |log| log.len());
            match vmm::process::spawn(&command, &[], None, &log_path) {
                Ok(started) => child = Some(started),
                // It gave way to another at once, or cannot start at all: its log says which.
                Err(error) if starts == 3 => return Err(error.into()),
                Err(_) => {}
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether no daemon answers: none is there, or one that is just ending hung up.
fn absent(error: &ClientError) -> bool {
    matches!(error, ClientError::Unreachable { .. } | ClientError::Broken { .. })
}
