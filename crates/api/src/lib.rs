//! The wire types of Offshoot's HTTP API, and a blocking client.
//!
//! The API speaks HTTP/1.1 over a unix socket (mode 0600). Bodies are JSON. Operations that take long answer with
//! `application/x-ndjson`: lines `{"progress": …}` and, last, one of `{"result": …}` or `{"error": …}`; an
//! operation that fails before it begins answers with an [`ErrorBody`] and a status. `docs/api.md` lists the routes.

#[cfg(test)]
#[macro_use]
#[path = "../../base/fuzz/edits.rs"]
mod edits;

mod blobs;
pub mod client;
mod colors;
mod transfer;
mod types;

pub use blobs::*;
pub use client::{Client, ClientError, Upgraded};
pub use colors::*;
pub use transfer::*;
pub use types::*;
