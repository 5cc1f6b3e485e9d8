//! The record of nodes and handles: a file of lines, one for each change, which is written whole now and then.

use super::{Node, Target};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Lines that are no reason to write the file anew.
const SLACK: usize = 4096;

/// A change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Entry {
    Node { id: u64, node: Node },
    Forget { id: u64 },
    Open { handle: u64, target: Target },
    Close { handle: u64 },
}

pub(super) struct Record {
    path: PathBuf,
    file: File,
    lines: usize,
}

impl Record {
    /// The changes on record. A last line that a kill cut short was never acted upon.
    pub(super) fn read(path: &Path) -> io::Result<Vec<Entry>> {
        let text = match std::fs::read_to_string(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            text => text?,
        };
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let entry = |line| serde_json::from_str(line).map_err(|e| io::Error::other(format!("{}: {e}", path.display())));
        whole.lines().map(entry).collect()
    }

    /// Begins the file with `entries`.
    pub(super) fn create(path: PathBuf, entries: &[Entry]) -> io::Result<Self> {
        let (file, lines) = write(&path, entries)?;
        Ok(Self { path, file, lines })
    }

    /// Whether most lines say what no longer holds, of `entries` that do.
    pub(super) fn is_long(&self, entries: usize) -> bool {
        self.lines > SLACK + 4 * entries
    }

    /// Writes `entries` in place of all lines.
    pub(super) fn rewrite(&mut self, entries: &[Entry]) -> io::Result<()> {
        (self.file, self.lines) = write(&self.path, entries)?;
        Ok(())
    }

    pub(super) fn append(&mut self, entry: &Entry) -> io::Result<()> {
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        self.lines += 1;
        self.file.write_all(&line)
    }
}

fn write(path: &Path, entries: &[Entry]) -> io::Result<(File, usize)> {
    let temporary = path.with_extension("tmp");
    let mut text = Vec::new();
    for entry in entries {
        serde_json::to_writer(&mut text, entry)?;
        text.push(b'\n');
    }
    std::fs::write(&temporary, text)?;
    std::fs::rename(&temporary, path)?;
    Ok((OpenOptions::new().append(true).open(path)?, entries.len()))
}
