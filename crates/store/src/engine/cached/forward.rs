//! The cache as an engine: what it answers itself, and what it passes on.

use super::upload::CachedUpload;
use super::{Cached, is_small, pack_of};
use crate::engine::{Engine, Etag, Expect, HeadSwap, Health, Object, Swapped, Upload};
use base::ByteRange;
use std::io;
use std::sync::Arc;

impl Engine for Cached {
    fn describe(&self) -> String {
        self.shared.origin.describe()
    }

    fn upload(&self, name: &str) -> io::Result<Box<dyn Upload>> {
        self.shared.writable()?;
        let below = self.shared.observe(self.shared.origin.upload(name))?;
        let Some(pack) = pack_of(name) else { return Ok(below) };
        let pack = Arc::new(self.open_pack(name, pack));
        Ok(Box::new(CachedUpload::new(below, pack)))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn Object>> {
        match pack_of(name) {
            Some(pack) => {
                let pack = self.open_pack(name, pack);
                // Says whether it is there, and costs nothing where anything of it is here, or a copy of its index.
                pack.end()?;
                Ok(Arc::new(pack))
            }
            None => self.shared.observe(self.shared.origin.open(name)),
        }
    }

    fn get(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let found = self.shared.observe(self.shared.origin.get(name));
        if !is_small(name) {
            return found;
        }
        match found {
            Ok(Some(bytes)) => {
                self.shared.keep_small(name, &bytes);
                Ok(Some(bytes))
            }
            Ok(None) => {
                self.shared.forget_small(name);
                Ok(None)
            }
            Err(error) => self.shared.stale(name, error).map(Some),
        }
    }

    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.shared.writable()?;
        self.shared.observe(self.shared.origin.put(name, bytes))?;
        if is_small(name) {
            self.shared.keep_small(name, bytes);
        }
        Ok(())
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        self.shared.listed(&format!("list/{folder}"), || self.shared.origin.list(folder))
    }

    fn remove(&self, names: &[String]) -> io::Result<()> {
        self.shared.writable()?;
        self.shared.observe(self.shared.origin.remove(names))?;
        for name in names {
            if is_small(name) {
                self.shared.forget_small(name);
            } else if let Some(pack) = pack_of(name) {
                let size = self.shared.state().index.pack_size(pack);
                self.shared.drop_chunks(pack, &ByteRange::new(0, size.unwrap_or(0)));
            }
        }
        Ok(())
    }

    fn punch(&self, name: &str, ranges: &[ByteRange]) -> io::Result<()> {
        self.shared.writable()?;
        self.shared.observe(self.shared.origin.punch(name, ranges))?;
        if let Some(pack) = pack_of(name) {
            ranges.iter().for_each(|range| _ = self.shared.drop_chunks(pack, range));
        }
        Ok(())
    }

    fn footprint(&self, name: &str) -> io::Result<u64> {
        self.shared.observe(self.shared.origin.footprint(name))
    }

    fn head(&self, name: &str) -> io::Result<Option<(Vec<u8>, Etag)>> {
        let copy = format!("heads/{name}");
        match self.shared.observe(self.shared.origin.head(name)) {
            Ok(Some((bytes, etag))) => {
                self.shared.keep_small(&copy, &bytes);
                Ok(Some((bytes, etag)))
            }
            Ok(None) => {
                self.shared.forget_small(&copy);
                Ok(None)
            }
            Err(error) => {
                let bytes = self.shared.stale(&copy, error)?;
                // A tag no engine gives: whoever compares and swaps with it is refused.
                let etag = Etag(format!("stale {}", Etag::of(&bytes)));
                Ok(Some((bytes, etag)))
            }
        }
    }

    fn heads(&self) -> io::Result<Vec<String>> {
        let names = self.shared.listed("list/heads", || self.shared.origin.heads())?;
        // Sorted, whether asked for or a copy.
        let is_gone = |copy: &&String| {
            copy.strip_prefix("heads/").is_some_and(|name| names.binary_search_by(|n| n.as_str().cmp(name)).is_err())
        };
        self.shared.small.names("heads/").iter().filter(is_gone).for_each(|copy| self.shared.forget_small(copy));
        Ok(names)
    }

    fn swap_head(&self, name: &str, expect: &Expect, bytes: &[u8]) -> io::Result<Result<Etag, &'static str>> {
        self.shared.writable()?;
        let swapped = self.shared.observe(self.shared.origin.swap_head(name, expect, bytes))?;
        if swapped.is_ok() {
            self.shared.keep_small(&format!("heads/{name}"), bytes);
        }
        Ok(swapped)
    }

    fn remove_head(&self, name: &str) -> io::Result<bool> {
        self.shared.writable()?;
        let removed = self.shared.observe(self.shared.origin.remove_head(name))?;
        self.shared.forget_small(&format!("heads/{name}"));
        Ok(removed)
    }

    /// Not over copies that may be old: what a writer of a shared store relies on stands in heads and lists.
    fn can_share(&self) -> bool {
        !self.shared.stale_reads && self.shared.origin.can_share()
    }

    fn concurrency(&self) -> usize {
        self.shared.origin.concurrency()
    }

    fn swap_heads(&self, swaps: &[HeadSwap]) -> Vec<io::Result<Swapped>> {
        if self.shared.stale_reads {
            return swaps.iter().map(|_| self.shared.writable().map(|()| Err("it may be old"))).collect();
        }
        let swapped = self.shared.origin.swap_heads(swaps);
        for (swap, done) in swaps.iter().zip(&swapped) {
            if let Ok(Ok(_)) = done {
                self.shared.keep_small(&format!("heads/{}", swap.name), &swap.bytes);
            }
        }
        swapped
    }

    fn put_new(&self, name: &str, bytes: &[u8]) -> io::Result<bool> {
        self.shared.writable()?;
        let made = self.shared.observe(self.shared.origin.put_new(name, bytes))?;
        if made && is_small(name) {
            self.shared.keep_small(name, bytes);
        }
        Ok(made)
    }

    fn can_punch(&self) -> bool {
        self.shared.origin.can_punch()
    }

    fn is_remote(&self) -> bool {
        self.shared.origin.is_remote()
    }

    fn prove(&self) -> io::Result<()> {
        self.shared.origin.prove()
    }

    fn now_ms(&self) -> io::Result<u64> {
        self.shared.origin.now_ms()
    }

    fn made_ms(&self, name: &str) -> io::Result<Option<u64>> {
        self.shared.origin.made_ms(name)
    }

    fn health(&self) -> Health {
        self.shared.origin.health()
    }
}
