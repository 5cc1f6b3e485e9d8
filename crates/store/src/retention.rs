//! Which snapshots of a series may go.

use std::collections::HashSet;
use std::time::Duration;

/// A rule for a series of snapshots. What it keeps is kept by any of its parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many are kept.
    pub keep_last: usize,
    /// Those not older than this are kept.
    pub keep_within: Duration,
}

/// One member of a series.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The head's name.
    pub head: String,
    /// When it was made, in milliseconds since 1970.
    pub made_ms: u64,
    /// Whether a running VM, a tag or a user holds it: it stays whatever the rule says.
    pub held: bool,
}

impl Retention {
    /// The heads to drop at `now_ms`, oldest first. A series is never emptied by its age alone: the newest member
    /// stays unless the rule keeps none at all (`keep_last` 0 and `keep_within` 0 keep all: no rule).
    #[must_use]
    pub fn drops(&self, members: &[Member], now_ms: u64) -> Vec<String> {
        if *self == Self::default() {
            return Vec::new();
        }
        let mut order: Vec<&Member> = members.iter().collect();
        order.sort_by(|a, b| (b.made_ms, &b.head).cmp(&(a.made_ms, &a.head)));
        let oldest_kept = u128::from(now_ms).saturating_sub(self.keep_within.as_millis());
        let kept: HashSet<&str> = order
            .iter()
            .enumerate()
            .filter(|(place, member)| {
                let recent = !self.keep_within.is_zero() && u128::from(member.made_ms) >= oldest_kept;
                *place < self.keep_last.max(1) || recent || member.held
            })
            .map(|(_, member)| member.head.as_str())
            .collect();
        let dropped = order.iter().rev().filter(|member| !kept.contains(member.head.as_str()));
        dropped.map(|member| member.head.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(of: &[(&str, u64, bool)]) -> Vec<Member> {
        of.iter()
            .map(|(head, made_ms, held)| Member { head: (*head).to_owned(), made_ms: *made_ms, held: *held })
            .collect()
    }

    #[test]
    fn the_last_the_recent_and_the_held_stay() {
        let series = members(&[
            ("a", 1000, false),
            ("b", 2000, true),
            ("c", 3000, false),
            ("d", 4000, false),
            ("e", 5000, false),
        ]);
        let check = |keep_last, within_ms, expected: &[&str]| {
            let rule = Retention { keep_last, keep_within: Duration::from_millis(within_ms) };
            assert_eq!(rule.drops(&series, 6000), expected, "{rule:?}");
        };
        check(0, 0, &[]);
        check(2, 0, &["a", "c"]);
        check(0, 3000, &["a"]);
        check(0, 2999, &["a", "c"]);
        check(1, 2000, &["a", "c"]);
        check(9, 0, &[]);
        check(0, 1, &["a", "c", "d"]);
    }

    #[test]
    fn odd_times_harm_nothing() {
        let future = members(&[("x", u64::MAX, false), ("y", 0, false)]);
        let rule = Retention { keep_last: 1, keep_within: Duration::MAX };
        assert!(rule.drops(&future, 5).is_empty());
        let rule = Retention { keep_last: 1, keep_within: Duration::ZERO };
        assert_eq!(rule.drops(&future, 5), ["y"]);
        assert!(rule.drops(&[], 5).is_empty());
    }
}
