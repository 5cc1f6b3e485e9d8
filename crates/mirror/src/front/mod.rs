//! The fronts. NBD is in [`nbd`]; the rest is FUSE: a thin server of our own on `/dev/fuse`.
//!
//! Why not a library: a mirror that takes over must not begin with INIT, must send RESEND before it reads, answers
//! requests later and from another thread (reads that wait), and pushes pages; and the whole protocol that is left
//! for a tree of files of fixed size is a few hundred lines.
//!
//! Several workers read one descriptor. Whatever they answer is a whole request, and every request may be answered
//! twice with the same effect, so a mirror may be killed at any instant: the kernel keeps what it had in hand, and
//! sends it again to the next one.

pub(crate) mod abi;
pub(crate) mod aio;
pub(crate) mod buffer;
pub(crate) mod direct;
mod files;
#[cfg(test)]
mod fuzz;
pub(crate) use files::{Answer, name_of};
pub(crate) mod nbd;
#[expect(unsafe_code, reason = "an ioctl that no library has")]
pub(crate) mod pagemap;
pub(crate) mod session;
pub(crate) mod tree;
pub(crate) mod waiting;
pub(crate) mod workers;
