//! Descriptions of objects, as they lie in files.

use crate::control::{Below, RamSource};
use crate::disk::{Lower, Overlay, View};
use crate::ram::RamObject;
use serde::{Deserialize, Serialize};

/// One object, as its file says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Description {
    /// A RAM file.
    Ram { id: u64, map: String, source: RamSource },
    /// A writable disk.
    Overlay { id: u64, vm: String, size: u64, block_size: u64, layer: u64, below: Below },
    /// A frozen disk.
    View { id: u64, size: u64, block_size: u64, layer: u64, below: Below, committed: bool },
}

impl Description {
    /// The object's id.
    pub(crate) fn id(&self) -> u64 {
        match self {
            Self::Ram { id, .. } | Self::Overlay { id, .. } | Self::View { id, .. } => *id,
        }
    }

    /// The layer it owns.
    pub(crate) fn layer(&self) -> Option<u64> {
        match self {
            Self::Ram { .. } => None,
            Self::Overlay { layer, .. } | Self::View { layer, .. } => Some(*layer),
        }
    }

    /// The view it stands on.
    pub(crate) fn view_below(&self) -> Option<u64> {
        match self {
            Self::Overlay { below: Below::View(v), .. } | Self::View { below: Below::View(v), .. } => Some(*v),
            _ => None,
        }
    }

    /// Of a RAM file.
    pub(crate) fn ram(ram: &RamObject) -> Self {
        Self::Ram { id: ram.id, map: ram.map.encode(), source: ram.source() }
    }

    /// Of an overlay with the stack given.
    pub(crate) fn overlay(o: &Overlay, layer: u64, below: Below) -> Self {
        Self::Overlay { id: o.id, vm: o.vm.clone(), size: o.size, block_size: o.block_size, layer, below }
    }

    /// Of a view as it is.
    pub(crate) fn view(v: &View) -> Self {
        Self::View {
            id: v.id,
            size: v.size,
            block_size: v.block_size,
            layer: v.layer.id(),
            below: below_of(&v.lower()),
            committed: v.committed.load(std::sync::atomic::Ordering::Acquire),
        }
    }
}

/// What lies below, by name.
pub(crate) fn below_of(lower: &Lower) -> Below {
    match lower {
        Lower::Zero => Below::Zero,
        Lower::Version(version) => Below::Version(version.to_string()),
        Lower::View(view) => Below::View(view.id),
    }
}
