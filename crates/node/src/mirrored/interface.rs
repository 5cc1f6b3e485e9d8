//! Mirrored files, as the daemon offers them.

use super::{FileRecord, Named, change, clone, commit, prune, withdraw};
use crate::error::{Error, Result};
use crate::node::Node;
use crate::sweep;
use api::BlobFile;
use mirror::Opens;

impl Node {
    fn mirrored(&self, blob: &str, number: u64) -> Result<FileRecord> {
        let named = Named { blob: blob.to_owned(), number };
        self.shared.files.at(&named).ok_or_else(|| {
            Error::NotFound(format!(
                "{blob}@{number} has no local changes: nobody opened it for writing; `offshoot blob files` lists those \
                 that have"
            ))
        })
    }

    /// The mirrored files.
    ///
    /// # Errors
    /// Where the mirror does not answer.
    pub fn blob_files(&self) -> Result<Vec<BlobFile>> {
        prune(&self.shared)?;
        let opens = self.shared.mirror.opens()?;
        self.shared.files.all().iter().map(|record| self.blob_file(record, &opens)).collect()
    }

    fn blob_file(&self, record: &FileRecord, opens: &Opens) -> Result<BlobFile> {
        let path = mirror::version_path(self.shared.home.root(), &record.blob, record.number);
        Ok(BlobFile {
            path: path.display().to_string(),
            blob: record.blob.clone(),
            number: record.number,
            size_bytes: record.base()?.size,
            changed_bytes: self.shared.mirror.changed_bytes(record.overlay)?,
            opened: opens.overlays.iter().find(|(id, _)| *id == record.overlay).map_or(0, |(_, times)| *times),
        })
    }

    /// Where a version is in the tree.
    ///
    /// # Errors
    /// Where there is no such version.
    pub fn blob_path(&self, text: &str) -> Result<BlobFile> {
        let named = self.blob_version(text)?;
        let path = mirror::version_path(self.shared.home.root(), &named.blob, named.number);
        let found = self.shared.files.at(&Named { blob: named.blob.clone(), number: named.number });
        match found {
            Some(record) => self.blob_file(&record, &self.shared.mirror.opens()?),
            None => Ok(BlobFile {
                path: path.display().to_string(),
                blob: named.blob,
                number: named.number,
                size_bytes: named.size,
                changed_bytes: 0,
                opened: 0,
            }),
        }
    }

    /// Makes the local changes of a mirrored file the next version of its blob: its number.
    ///
    /// # Errors
    /// Others published meanwhile, nobody wrote to it, or the host is full; the changes stay as they are.
    pub fn commit_blob_file(&self, blob: &str, number: u64) -> Result<u64> {
        let committed = commit(&self.shared, self.mirrored(blob, number)?.overlay, None)?;
        self.committer.note_commit();
        Ok(committed)
    }

    /// Makes a mirrored file one of the new blob `name`.
    ///
    /// # Errors
    /// There is such a blob already, or the name cannot be.
    pub fn clone_blob_file(&self, blob: &str, number: u64, name: &str) -> Result<u64> {
        clone(&self.shared, self.mirrored(blob, number)?.overlay, name, None)
    }

    /// Drops the local changes of a mirrored file.
    ///
    /// # Errors
    /// Somebody has it open.
    pub fn discard_blob_file(&self, blob: &str, number: u64) -> Result<()> {
        let overlay = self.mirrored(blob, number)?.overlay;
        change(&self.shared, overlay, None, |record| {
            if !withdraw(&self.shared, &record, true)? {
                return Err(Error::Conflict(format!("{} is open; close it first", record.name())));
            }
            Ok(())
        })?;
        sweep::sweep(&self.shared)
    }
}
