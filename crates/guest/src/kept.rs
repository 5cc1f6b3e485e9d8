//! A coloring as bytes, to be kept with the snapshot that it is of.
//!
//! All numbers are LEB128, texts are length and bytes. In this order: magic; basis; levels; roots; the kernel's release
//! and the row of encodings, empty where there are none; why free pages are kept, empty where they may be dropped; the
//! note's address plus one in two halves, zero where it is not known; notes; pages; color space.

use crate::color::{Account, Basis, Coloring};
use crate::free::FreePages;
use crate::kernel::Types;
use crate::memory::Hint;
use crate::plan::leb::{put, take};
use crate::plan::{ProfileError, Space};

const MAGIC: &[u8; 8] = b"OFFCOLR1";
/// More notes than this nobody wrote.
const NOTES_MAX: u32 = 1000;

impl Coloring {
    /// Bytes to keep; [`Account::bytes_read`] is not among them.
    ///
    /// # Panics
    /// For 2^32 pages (16 TiB) or more.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let Account { basis, release, encoding, levels, roots, free, hint, notes, bytes_read: _ } = &self.account;
        let mut out = MAGIC.to_vec();
        put(&mut out, *basis as u32);
        put(&mut out, (*levels).into());
        put(&mut out, *roots);
        put_text(&mut out, release.as_deref().unwrap_or_default());
        put_text(&mut out, encoding.unwrap_or_default());
        match free {
            FreePages::Droppable => put_text(&mut out, ""),
            FreePages::Kept { why } => put_text(&mut out, why),
        }
        let note = hint.map_or(0, |hint| hint.note + 1);
        put(&mut out, (note >> 32) as u32);
        put(&mut out, note as u32);
        put(&mut out, notes.len() as u32);
        notes.iter().for_each(|note| put_text(&mut out, note));
        put(&mut out, u32::try_from(self.len()).expect("fewer than 2^32 pages"));
        self.space().encode(&mut out);
        out
    }

    /// Reads what [`Coloring::encode`] wrote.
    ///
    /// # Errors
    /// The bytes are something else, of a later release, or damaged; says which, and where.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        if !bytes.starts_with(MAGIC) {
            return Err("not colors that this release knows".into());
        }
        let mut at = MAGIC.len();
        let decoded = Self::read(bytes, &mut at).ok().flatten().filter(|_| at == bytes.len());
        decoded.ok_or_else(|| format!("the colors are damaged at byte {at}"))
    }

    fn read(bytes: &[u8], at: &mut usize) -> Result<Option<Self>, ProfileError> {
        let mut account = Account::new();
        account.basis = match take(bytes, at)? {
            0 => Basis::Descriptors,
            1 => Basis::PageTables,
            2 => Basis::Nothing,
            _ => return Ok(None),
        };
        let Ok(levels) = u8::try_from(take(bytes, at)?) else { return Ok(None) };
        account.levels = levels;
        account.roots = take(bytes, at)?;
        account.release = Some(take_text(bytes, at)?).filter(|release| !release.is_empty());
        account.encoding = Types::named(&take_text(bytes, at)?);
        let why = take_text(bytes, at)?;
        account.free = if why.is_empty() { FreePages::Droppable } else { FreePages::Kept { why } };
        let note = u64::from(take(bytes, at)?) << 32 | u64::from(take(bytes, at)?);
        account.hint = note.checked_sub(1).map(|note| Hint { note });
        let notes = take(bytes, at)?;
        if notes > NOTES_MAX {
            return Ok(None);
        }
        account.notes = (0..notes).map(|_| take_text(bytes, at)).collect::<Result<_, _>>()?;
        let pages = take(bytes, at)?;
        let (colors, order) = Space::decode(bytes, at, pages as usize)?;
        Ok(Self::kept(colors, order, account))
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    put(out, text.len() as u32);
    out.extend_from_slice(text.as_bytes());
}

fn take_text(bytes: &[u8], at: &mut usize) -> Result<String, ProfileError> {
    let len = take(bytes, at)? as usize;
    let text = bytes.get(*at..at.saturating_add(len)).ok_or(ProfileError::Damaged(*at))?;
    *at += len;
    String::from_utf8(text.to_vec()).map_err(|_| ProfileError::Damaged(*at))
}
