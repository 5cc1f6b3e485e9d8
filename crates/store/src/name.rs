//! Content names, the keys that make them, and versions.
//!
//! A name is a keyed BLAKE3 hash of content. The key is random and belongs to one store, that is to one trust
//! domain: equal content in two domains has unrelated names, so nobody outside can ask "do you hold this?".
//! Blocks and nodes are hashed under different keys derived from it, so that no block can pass for a node.

use std::fmt;
use std::str::FromStr;

/// Bytes of a name that are not zero in stores of format 2. Two of 2^64 blocks agree in these by chance once in 2^65
/// stores, and who lacks the key cannot look for such blocks but by storing some 2^96 of them.
pub(crate) const SHORT_BYTES: usize = 24;
/// The format of stores that are made now.
pub(crate) const FORMAT: u32 = 2;
/// The oldest format that is read: its names have 32 bytes.
pub(crate) const FORMAT_OLDEST: u32 = 1;

/// The name of a block or a node: a keyed BLAKE3 hash, or the well-known name of an all-zero subtree.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(pub(crate) [u8; 32]);

impl Name {
    /// The well-known name of an all-zero subtree of `height`: 31 zero bytes, then the height. It is the same
    /// in every store, so an empty blob costs nothing and needs no IO.
    #[must_use]
    pub fn zero(height: u8) -> Self {
        let mut bytes = [0; 32];
        bytes[31] = height;
        Self(bytes)
    }

    /// Whether this is a well-known zero name.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.0[..31] == [0; 31]
    }

    /// The name that begins with up to 32 bytes; the rest is zero.
    pub(crate) fn padded(start: &[u8]) -> Self {
        let mut bytes = [0; 32];
        bytes[..start.len()].copy_from_slice(start);
        Self(bytes)
    }

    /// Whether it is as short as names of format 2 are.
    pub(crate) fn is_short(&self) -> bool {
        self.0[SHORT_BYTES..] == [0; 32 - SHORT_BYTES]
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Name {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        unhex(text).map(Self).ok_or_else(|| format!("`{text}` is not a name of 64 hexadecimal digits"))
    }
}

/// Reads exactly 64 lower- or upper-case hexadecimal digits.
pub(crate) fn unhex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut out = [0; 32];
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = (high << 4 | low) as u8;
    }
    Some(out)
}

/// One immutable state of one blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Version {
    /// The root of its tree.
    pub root: Name,
    /// Its length in bytes.
    pub size: u64,
    /// Bytes in a block: a power of two from 512 to 1 MiB.
    pub block_size: u32,
}

/// The smallest block.
pub const BLOCK_SIZE_MIN: u32 = 512;
/// The largest block.
pub const BLOCK_SIZE_MAX: u32 = 1 << 20;

impl Version {
    /// How many blocks it has, the last one perhaps in part.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(u64::from(self.block_size))
    }

    /// The height of its tree.
    #[must_use]
    pub fn height(&self) -> u8 {
        crate::tree::height_of(self.blocks())
    }

    /// Whether a block size may be used.
    #[must_use]
    pub fn block_size_is_valid(block_size: u32) -> bool {
        block_size.is_power_of_two() && (BLOCK_SIZE_MIN..=BLOCK_SIZE_MAX).contains(&block_size)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.root, self.size, self.block_size)
    }
}

impl FromStr for Version {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("`{text}` is not a version; it reads <root>.<size>.<block size>");
        let mut parts = text.split('.');
        let (Some(root), Some(size), Some(block_size), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(bad());
        };
        let version = Self {
            root: root.parse().map_err(|_| bad())?,
            size: size.parse().map_err(|_| bad())?,
            block_size: block_size.parse().map_err(|_| bad())?,
        };
        let valid = Self::block_size_is_valid(version.block_size)
            && version.size <= i64::MAX as u64
            && (!version.root.is_zero() || version.root == Name::zero(version.height()));
        if valid { Ok(version) } else { Err(bad()) }
    }
}

impl serde::Serialize for Version {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Version {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The keys of one store, derived from the random one in its key file.
#[derive(Clone)]
pub(crate) struct Keys {
    block: [u8; 32],
    node: [u8; 32],
    seal: [u8; 32],
    /// Bytes of a name that are not zero.
    name_bytes: usize,
    /// Says which store it is, and nothing about the others.
    pub(crate) id: [u8; 16],
}

impl Keys {
    /// The keys of a store of `format` with the random key `key`.
    pub(crate) fn derive(key: &[u8; 32], format: u32) -> Self {
        let id = blake3::derive_key("offshoot store 1 identity", key);
        Self {
            id: id[..16].try_into().expect("16 of 32 bytes"),
            name_bytes: if format == FORMAT_OLDEST { 32 } else { SHORT_BYTES },
            block: blake3::derive_key("offshoot store 1 block name", key),
            node: blake3::derive_key("offshoot store 1 node name", key),
            seal: blake3::derive_key("offshoot store 1 seal of an index or head", key),
        }
    }

    /// The name of a block.
    pub(crate) fn block(&self, bytes: &[u8]) -> Name {
        self.name(&self.block, bytes)
    }

    /// The name of an encoded node.
    pub(crate) fn node(&self, bytes: &[u8]) -> Name {
        self.name(&self.node, bytes)
    }

    fn name(&self, key: &[u8; 32], bytes: &[u8]) -> Name {
        let mut name = *blake3::keyed_hash(key, bytes).as_bytes();
        name[self.name_bytes..].fill(0);
        Name(name)
    }

    /// The checksum at the end of indexes and heads.
    pub(crate) fn seal(&self, bytes: &[u8]) -> [u8; 32] {
        *blake3::keyed_hash(&self.seal, bytes).as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_back_as_they_are_written() {
        let version = Version { root: Keys::derive(&[1; 32], FORMAT).node(b"x"), size: 12345, block_size: 4096 };
        assert_eq!(version.to_string().parse(), Ok(version));
        let json = serde_json::to_string(&version).unwrap();
        assert_eq!(json, format!("\"{version}\""));
        assert_eq!(serde_json::from_str::<Version>(&json).unwrap(), version);
        let root = version.root;
        for bad in [
            "",
            "x",
            &format!("{root}.1"),
            &format!("{root}.1.4095"),
            &format!("{root}.1.4096.1"),
            &format!("{}.100.4096", Name::zero(9)),
            &format!("{root}.{}.4096", u64::MAX),
        ] {
            assert!(bad.parse::<Version>().is_err(), "{bad}");
        }
    }

    #[test]
    fn blocks_nodes_and_domains_have_unrelated_names() {
        let (a, b) = (Keys::derive(&[1; 32], FORMAT), Keys::derive(&[2; 32], FORMAT));
        assert_ne!(a.block(b"x"), a.node(b"x"));
        assert_ne!(a.block(b"x"), b.block(b"x"));
        assert!(!a.block(&[0; 4096]).is_zero());
    }

    #[test]
    fn names_of_format_1_keep_their_length_and_later_ones_begin_alike() {
        let (old, new) = (Keys::derive(&[1; 32], 1), Keys::derive(&[1; 32], 2));
        assert!(!old.block(b"x").is_short() && new.block(b"x").is_short());
        assert_eq!(old.block(b"x").0[..SHORT_BYTES], new.block(b"x").0[..SHORT_BYTES]);
    }
}
