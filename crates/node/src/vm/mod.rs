//! The life of a VM: one thread owns each VM's state and is the only one that speaks to its hypervisor.
//!
//! ```text
//!   launch ──> Running ──(power off, stop, death)──> Stopped ──> removed
//!     │           │ ^
//!     │           └─┘ freeze (fork, snapshot), reboot
//!     └─> removed (start failed)
//! ```

mod freeze;
mod launch;
mod owner;

pub use launch::{Coming, DisksAhead, Source, Starting};
pub use owner::adopt;
pub use owner::{keep_stopped, start};

use crate::error::{Error, Result};
use crate::record::{FreezeRecord, Life, VmRecord};
use base::RamMap;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::mpsc::{Sender, SyncSender, sync_channel};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// A VM that is frozen, ready for copies to start from.
#[derive(Clone, Debug)]
pub struct Frozen {
    /// What a later daemon needs to know.
    pub record: FreezeRecord,
    /// The map copies start with.
    pub start_map: RamMap,
    /// File of the device state.
    pub device: PathBuf,
    /// Parts of the pause, in milliseconds, by name.
    pub parts: BTreeMap<String, f64>,
}

/// What the owner is asked.
pub(crate) enum Message {
    /// Freeze for a fork or snapshot under this id; the tag goes into the record.
    Freeze { id: u64, tag: Option<String>, reply: SyncSender<Result<Frozen>> },
    /// Power down within the grace, else end.
    Stop { grace: Duration, reply: SyncSender<Result<()>> },
    /// Set the balloon.
    Balloon { bytes: u64, reply: SyncSender<Result<()>> },
    /// What the resident library counts, and where RAM lies.
    Resident { reply: SyncSender<Result<(BTreeMap<String, u64>, RamPlace)>> },
    /// A snapshot reached the store: its holder may go.
    Committed { id: u64, holder: vmm::process::ProcessId },
    /// Something happened at the hypervisor.
    Wake,
    /// The hypervisor ended.
    Ended,
    /// The daemon shuts down and leaves the guest running.
    Leave,
}

/// Where RAM lies in a hypervisor.
#[derive(Clone, Copy, Debug)]
pub struct RamPlace {
    /// Its process.
    pub pid: u32,
    /// First address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// A VM as the rest of the node sees it.
pub struct Vm {
    /// Its id.
    pub id: u64,
    /// Its name.
    pub name: String,
    tx: Sender<Message>,
    view: Mutex<View>,
    changed: Condvar,
}

/// What others may see without asking the owner.
#[derive(Clone, Debug)]
pub struct View {
    /// Its record.
    pub record: VmRecord,
    /// Why its guest stands still, where it does.
    pub paused: Option<String>,
    /// Extents of the map it started with, and the files they name.
    pub ram_extents: usize,
    /// RAM files that its next freeze builds upon or that it maps.
    pub ram_files: Vec<u64>,
    /// Freezes so far.
    pub freezes: u32,
}

impl Vm {
    fn new(record: VmRecord, tx: Sender<Message>) -> Self {
        let view = View { record, paused: None, ram_extents: 0, ram_files: Vec::new(), freezes: 0 };
        Self { id: view.record.id, name: view.record.name.clone(), tx, view: Mutex::new(view), changed: Condvar::new() }
    }

    /// What is known of it.
    pub fn view(&self) -> View {
        self.view.lock().expect("no holder panics").clone()
    }

    fn update(&self, change: impl FnOnce(&mut View)) {
        change(&mut self.view.lock().expect("no holder panics"));
        self.changed.notify_all();
    }

    /// Freezes it, under an id that is nobody's yet.
    ///
    /// # Errors
    /// What the owner met; the guest goes on.
    pub fn freeze(&self, id: u64, tag: Option<String>) -> Result<Frozen> {
        self.ask(|reply| Message::Freeze { id, tag, reply })
    }

    /// Powers it down, or ends it.
    ///
    /// # Errors
    /// Where the owner is gone.
    pub fn stop(&self, grace: Duration) -> Result<()> {
        self.ask(|reply| Message::Stop { grace, reply })
    }

    /// Sets the balloon's target.
    ///
    /// # Errors
    /// What the hypervisor answered.
    pub fn balloon(&self, bytes: u64) -> Result<()> {
        self.ask(|reply| Message::Balloon { bytes, reply })
    }

    /// The counters of the resident library, and where RAM lies.
    ///
    /// # Errors
    /// What the library answered.
    pub fn resident(&self) -> Result<(BTreeMap<String, u64>, RamPlace)> {
        self.ask(|reply| Message::Resident { reply })
    }

    /// Tells the owner that a snapshot of it is in the store.
    pub fn committed(&self, id: u64, holder: vmm::process::ProcessId) {
        if self.tx.send(Message::Committed { id, holder }).is_err() {
            holder.end(Duration::ZERO);
        }
    }

    /// Tells the owner to leave the guest running and end.
    pub fn leave(&self) {
        let _ = self.tx.send(Message::Leave);
    }

    /// Waits until it has stopped; none when `limit` passed first.
    pub fn wait(&self, limit: Duration) -> Option<String> {
        let end = Instant::now() + limit;
        let mut view = self.view.lock().expect("no holder panics");
        loop {
            if let Life::Stopped { detail } = &view.record.life {
                return Some(detail.clone());
            }
            let left = end.checked_duration_since(Instant::now())?;
            view = self.changed.wait_timeout(view, left).expect("no holder panics").0;
        }
    }

    fn ask<T>(&self, message: impl FnOnce(SyncSender<Result<T>>) -> Message) -> Result<T> {
        let (reply, answer) = sync_channel(1);
        let stopped = || Error::Conflict(format!("{} is not running", self.name));
        self.tx.send(message(reply)).map_err(|_| stopped())?;
        answer.recv().map_err(|_| stopped())?
    }
}
