//! Names of VMs, tags and images.

use crate::error::{Error, Result};

/// Longest name.
pub const NAME_MAX: usize = 63;

/// Checks that `name` is `[a-z0-9][a-z0-9._-]*` and at most [`NAME_MAX`] long.
///
/// # Errors
/// Says what it may be.
pub fn check(what: &str, name: &str) -> Result<()> {
    let letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    fits(name, letter).then_some(()).ok_or_else(|| {
        Error::Invalid(format!(
            "`{name}` is no name for a {what}: use 1 to {NAME_MAX} of a-z, 0-9, `.`, `_` and `-`, starting with a letter or digit"
        ))
    })
}

/// Checks a tag, which may have capitals: people write `v1.0-RC1`.
///
/// # Errors
/// Says what it may be.
pub fn check_tag(tag: &str) -> Result<()> {
    fits(tag, |c| c.is_ascii_alphanumeric()).then_some(()).ok_or_else(|| {
        Error::Invalid(format!(
            "`{tag}` is no tag: use 1 to {NAME_MAX} of a-z, A-Z, 0-9, `.`, `_` and `-`, starting with a letter or digit"
        ))
    })
}

fn fits(name: &str, letter: impl Fn(char) -> bool) -> bool {
    name.len() <= NAME_MAX && name.starts_with(&letter) && name.chars().all(|c| letter(c) || "._-".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_lead_elsewhere_are_refused() {
        for good in ["web", "web-1", "a.b_c", "0"] {
            check("VM", good).unwrap();
        }
        for bad in ["", ".", "..", "a/b", "-a", "A", "web@1", "a b", &"x".repeat(64)] {
            assert!(check("VM", bad).is_err(), "{bad}");
        }
        check_tag("v1.0-RC1").unwrap();
        assert!(check_tag("../x").is_err() && check_tag("a@b").is_err());
    }
}
