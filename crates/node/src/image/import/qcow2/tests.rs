use super::*;

/// A minimal version 3 header of a 1 MiB disk.
fn plain() -> Vec<u8> {
    let mut head = vec![0; 512];
    head[..4].copy_from_slice(MAGIC);
    head[4..8].copy_from_slice(&3u32.to_be_bytes());
    head[24..32].copy_from_slice(&(1u64 << 20).to_be_bytes());
    head[100..104].copy_from_slice(&104u32.to_be_bytes());
    head
}

#[test]
fn a_plain_header_gives_the_size() {
    assert_eq!(header(&plain()), Ok(1 << 20));
}

#[test]
fn headers_that_name_other_files_are_refused_by_that_name() {
    let mut backed = plain();
    backed[8..16].copy_from_slice(&200u64.to_be_bytes());
    backed[16..20].copy_from_slice(&11u32.to_be_bytes());
    backed[200..211].copy_from_slice(b"/etc/shadow");
    assert!(header(&backed).unwrap_err().contains("`/etc/shadow`"));
    backed[8..16].copy_from_slice(&u64::MAX.to_be_bytes());
    assert!(header(&backed).unwrap_err().contains("outside the header"));

    let mut external = plain();
    external[104..108].copy_from_slice(&DATA_FILE_NAME.to_be_bytes());
    external[108..112].copy_from_slice(&6u32.to_be_bytes());
    external[112..118].copy_from_slice(b"secret");
    assert!(header(&external).unwrap_err().contains("`secret`"));
    external[108..112].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(header(&external).unwrap_err().contains("extension"));

    let mut unnamed = plain();
    unnamed[79] = EXTERNAL_DATA as u8;
    assert!(header(&unnamed).unwrap_err().contains("external file"));
}

#[test]
fn short_and_odd_headers_are_refused() {
    for len in [0, 4, 71, 103] {
        assert!(header(&plain()[..len]).is_err(), "{len} bytes");
    }
    for (at, value, word) in [(7, 9, "version 9"), (35, 1, "encrypted")] {
        let mut odd = plain();
        odd[at] = value;
        assert!(header(&odd).unwrap_err().contains(word));
    }
}

mod fuzz {
    use super::*;
    use crate::edits::{SMALL, within};

    /// Whatever a foreign disk's header says, it is read within its own bytes.
    #[test]
    fn headers() {
        let mut backed = plain();
        backed[8..16].copy_from_slice(&200u64.to_be_bytes());
        backed[16..20].copy_from_slice(&11u32.to_be_bytes());
        let mut external = plain();
        external[104..108].copy_from_slice(&DATA_FILE_NAME.to_be_bytes());
        external[108..112].copy_from_slice(&6u32.to_be_bytes());
        fuzz!(vec![plain(), backed, external], |head, _| {
            // A refusal quotes the name of another file, escaped where it is no text.
            match within(8 * head.len() + SMALL, || header(head)) {
                Ok(size) => assert_eq!(size.to_be_bytes(), head[24..32]),
                Err(why) => assert!(!why.is_empty()),
            }
        });
    }
}
