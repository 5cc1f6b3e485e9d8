//! Short reads of disks that have to wait for the device: past the page cache, many at once, by no thread.
//!
//! A worker that finds such a read hands it to the device and takes the next request; one thread answers those that
//! have landed. Only what the disk's own top layer holds is read so: what lies below is shared by many, and worth the
//! host's page cache; what one guest alone reads is in that guest's cache already.

use super::abi::{Header, IN_HEADER, OUT_HEADER, u32_at, u64_at};
use super::aio::{Aio, ROOM, is_cached};
use super::files::Answer;
use super::workers;
use crate::core::Core;
use crate::stats::add;
use std::time::Instant;

/// Reads in flight at most; more are read by waiting threads.
pub(crate) const FLIGHTS: usize = 64;
/// A request to read: its head, and `fuse_read_in`.
const READ_LEN: usize = IN_HEADER + 40;

/// A request that waits for its bytes.
pub(crate) struct Ticket {
    header: Header,
    request: [u8; READ_LEN],
    began: Instant,
}

/// The queue, where the kernel has one for us.
pub(crate) fn queue() -> Option<Aio<Ticket>> {
    Aio::new(FLIGHTS, true).inspect_err(|e| log::warn!("disks are read by waiting threads: {e}")).ok()
}

impl Core {
    /// Hands a READ of a disk to the device; false: it needs no device or more than that, or there is no room.
    pub(crate) fn read_directly(&self, header: &Header, request: &[u8]) -> bool {
        let (Some(aio), Ok(request)) = (&self.direct, <[u8; READ_LEN]>::try_from(request)) else { return false };
        let (offset, size) = (u64_at(&request[IN_HEADER..], 8), u32_at(&request[IN_HEADER..], 16) as usize);
        if size == 0 || size > ROOM {
            return false;
        }
        let Some(disk) = self.objects.overlay(header.node) else { return false };
        if offset.checked_add(size as u64).is_none_or(|end| end > disk.size) {
            return false;
        }
        let began = Instant::now();
        let Some(layer) = disk.holds_directly(offset, size as u64) else { return false };
        if is_cached(layer.data(), offset, size) {
            return false;
        }
        self.demand.arrive();
        if aio.add(layer, offset, size, Ticket { header: *header, request, began }).is_err() {
            self.demand.leave();
            return false;
        }
        for refused in aio.kick() {
            self.read_by_waiting(&refused);
        }
        true
    }

    /// Works for ever: answers what has landed.
    pub(crate) fn answer_landed(&self, aio: &Aio<Ticket>) {
        let mut landed = Vec::new();
        loop {
            if let Err(e) = aio.wait(&mut landed) {
                return self.stop(Err(e));
            }
            for read in &mut landed {
                if !read.whole {
                    // The error, if it is one, is found and told where all can be told.
                    self.read_by_waiting(&read.ticket);
                    continue;
                }
                let (header, began, len) = (read.ticket.header, read.ticket.began, read.bytes().len());
                // Before the answer: whoever has it finds it counted.
                self.count_read(header.node, len, began);
                workers::reply(self, header.unique, Answer::InPlace(len), read.with_head(OUT_HEADER));
                self.demand.leave();
            }
            aio.give_back(&mut landed);
        }
    }

    fn read_by_waiting(&self, ticket: &Ticket) {
        self.crew.hand(ticket.header, ticket.request.to_vec());
        self.demand.leave();
    }

    fn count_read(&self, node: u64, len: usize, began: Instant) {
        let Some(disk) = self.objects.overlay(node) else { return };
        let counters = self.vms.known(&disk.vm);
        add(&counters.disk_reads, 1);
        add(&counters.disk_read_bytes, len as u64);
        add(&counters.disk_hits, 1);
        counters.disk_read_latency.add(began.elapsed());
    }
}
