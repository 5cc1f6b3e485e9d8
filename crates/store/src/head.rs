//! Heads: the names by which versions are found, and what keeps them.

use crate::error::Error;
use crate::name::{Keys, Version};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// What a head publishes: versions of several blobs at one instant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    /// The versions by the caller's name for each.
    pub versions: BTreeMap<String, Version>,
    /// The caller's own description, kept as it is.
    pub meta: String,
}

#[derive(Serialize, Deserialize)]
struct Wire<'a> {
    name: Cow<'a, str>,
    versions: Cow<'a, BTreeMap<String, Version>>,
    meta: Cow<'a, str>,
}

const MAGIC: &[u8; 8] = b"OFFSHEAD";
const FORMAT: u32 = 1;
const HEADER: usize = 16;
/// The longest name of a head; `/` takes three bytes in a file name, which may have 255.
const NAME_MAX: usize = 200;

/// Refuses names that would not survive as a file name or object key.
pub(crate) fn check_name(name: &str) -> Result<(), Error> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-+@:".contains(c);
    let part_is_fine = |part: &str| !part.is_empty() && !part.starts_with('.') && part.chars().all(fine);
    if name.len() + 2 * name.matches('/').count() <= NAME_MAX && name.split('/').all(part_is_fine) {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "`{name}` cannot name a head: use up to {NAME_MAX} letters, digits and ._-+@: in parts divided by /, none starting with a dot"
    )))
}

/// The object a head's errors speak of.
pub(crate) fn object(name: &str) -> String {
    format!("heads/{name}")
}

impl Manifest {
    /// The bytes of the head `name`.
    pub(crate) fn encode(&self, name: &str, keys: &Keys) -> Vec<u8> {
        let wire = Wire {
            name: Cow::Borrowed(name),
            versions: Cow::Borrowed(&self.versions),
            meta: Cow::Borrowed(self.meta.as_str()),
        };
        let json = serde_json::to_vec(&wire).expect("strings and maps of strings always serialize");
        let mut out = Vec::with_capacity(HEADER + json.len() + 32);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&FORMAT.to_le_bytes());
        out.extend_from_slice(&(json.len() as u32).to_le_bytes());
        out.extend_from_slice(&json);
        let seal = keys.seal(&out);
        out.extend_from_slice(&seal);
        out
    }

    /// Reads what [`Manifest::encode`] wrote under this name.
    pub(crate) fn decode(bytes: &[u8], name: &str, keys: &Keys) -> Result<Self, Error> {
        let corrupt = |offset: usize, what: &str| Error::Corrupt {
            object: object(name),
            offset: offset as u64,
            what: what.to_owned(),
        };
        if bytes.len() < HEADER + 32 {
            return Err(corrupt(bytes.len(), "the head is cut short"));
        }
        let (body, seal) = bytes.split_at(bytes.len() - 32);
        if keys.seal(body) != seal {
            return Err(corrupt(0, "the head does not match its checksum"));
        }
        let length = u32::from_le_bytes(body[12..16].try_into().expect("four bytes")) as usize;
        if &body[..8] != MAGIC || body[8..12] != FORMAT.to_le_bytes() || length != body.len() - HEADER {
            return Err(corrupt(0, "not a head of format 1"));
        }
        let wire: Wire<'_> =
            serde_json::from_slice(&body[HEADER..]).map_err(|error| corrupt(HEADER, &error.to_string()))?;
        if wire.name != name {
            return Err(corrupt(HEADER, &format!("the head was published as `{}`", wire.name)));
        }
        Ok(Self { versions: wire.versions.into_owned(), meta: wire.meta.into_owned() })
    }
}
