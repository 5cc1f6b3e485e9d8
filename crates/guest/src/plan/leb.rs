//! LEB128: seven bits a byte, the lowest first.

use super::ProfileError;

pub(crate) fn put(out: &mut Vec<u8>, value: u32) {
    put_wide(out, value.into());
}

pub(crate) fn put_wide(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(crate) fn take(bytes: &[u8], at: &mut usize) -> Result<u32, ProfileError> {
    let began = *at;
    u32::try_from(take_wide(bytes, at)?).map_err(|_| ProfileError::Damaged(began))
}

/// At most five bytes: 35 bits.
pub(crate) fn take_wide(bytes: &[u8], at: &mut usize) -> Result<u64, ProfileError> {
    let began = *at;
    let mut value = 0_u64;
    for shift in (0..35).step_by(7) {
        let byte = *bytes.get(*at).ok_or(ProfileError::Damaged(began))?;
        *at += 1;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(ProfileError::Damaged(began))
}
