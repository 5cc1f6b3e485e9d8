//! Packs on their way through the cache: nothing of them is kept before they are finished.

use super::fetch::OpenPack;
use crate::engine::{Object, Upload};
use base::ByteRange;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A pack being written: read from the upload until it is finished, then as any other.
pub(super) struct CachedUpload {
    below: Box<dyn Upload>,
    finished: Arc<AtomicBool>,
    pack: Arc<OpenPack>,
}

struct UploadObject {
    below: Arc<dyn Object>,
    finished: Arc<AtomicBool>,
    pack: Arc<OpenPack>,
}

impl CachedUpload {
    pub(super) fn new(below: Box<dyn Upload>, pack: Arc<OpenPack>) -> Self {
        Self { below, finished: Arc::default(), pack }
    }
}

impl UploadObject {
    fn current(&self) -> &dyn Object {
        if self.finished.load(Ordering::Acquire) { &*self.pack } else { &*self.below }
    }
}

impl Object for UploadObject {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.current().read_at(offset, buf)
    }
    fn size(&self) -> io::Result<u64> {
        self.current().size()
    }
    fn distrust(&self, range: ByteRange) -> bool {
        self.current().distrust(range)
    }
}

impl Upload for CachedUpload {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.below.append(bytes)
    }
    fn object(&self) -> Arc<dyn Object> {
        let (finished, pack) = (Arc::clone(&self.finished), Arc::clone(&self.pack));
        Arc::new(UploadObject { below: self.below.object(), finished, pack })
    }
    fn finish(&mut self) -> io::Result<()> {
        self.below.finish()?;
        self.finished.store(true, Ordering::Release);
        Ok(())
    }
}
