//! Which policy, as people write it.

use std::fmt;
use std::str::FromStr;

/// How pages are chosen. See [`FromStr`] for how it is written.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Policy {
    /// Nothing is fetched ahead.
    None,
    /// A fault brings so many pages behind it, by address.
    Readahead(u32),
    /// Everything, by address.
    All,
    /// The working set before the start; later the rest of every segment of `pages` in which more than `faults` pages
    /// faulted.
    Twinkle {
        /// N of the paper.
        pages: u32,
        /// P of the paper.
        faults: u32,
    },
    /// What the last recording touched, in its order.
    Replay,
    /// What the last two recordings both touched, in the order of the last.
    Intersect,
    /// A fault brings the next pages of its color.
    Color(Windows),
    /// The profile first, color windows where it is silent or wrong.
    #[default]
    Auto,
    /// The same, blind to colors: what they are worth is measured against it.
    Plain,
}

/// Pages that a fault brings under [`Policy::Color`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// For pages that are executed.
    pub executable: u32,
    /// For all others.
    pub data: u32,
}

impl Default for Windows {
    /// Data windows four times the executable one: the ratio that Kaleidoscope's authors found best is 3 to 4.
    fn default() -> Self {
        Self { executable: 4, data: 16 }
    }
}

impl FromStr for Policy {
    type Err = String;

    /// `none`, `readahead:N`, `all`, `twinkle[:N,P]`, `replay`, `intersect`, `color[:EXECUTABLE,DATA]`, `auto`, and
    /// `auto:plain` for measurements.
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto:plain" {
            return Ok(Self::Plain);
        }
        let (word, arguments) = text.split_once(':').map_or((text, None), |(word, rest)| (word, Some(rest)));
        let numbers: Option<Vec<u32>> = arguments
            .map(|rest| {
                let parsed =
                    rest.split(',').map(|n| n.trim().parse::<u32>().ok().filter(|n| (1..=1 << 20).contains(n)));
                parsed.collect::<Option<Vec<u32>>>().ok_or_else(|| {
                    format!("`{text}`: behind the colon stand whole numbers of pages from 1 to 1048576, with commas")
                })
            })
            .transpose()?;
        match (word, numbers.as_deref()) {
            ("none", None) => Ok(Self::None),
            ("all", None) => Ok(Self::All),
            ("replay", None) => Ok(Self::Replay),
            ("intersect", None) => Ok(Self::Intersect),
            ("auto", None) => Ok(Self::Auto),
            ("readahead", Some(&[pages])) => Ok(Self::Readahead(pages)),
            ("twinkle", None) => Ok(Self::Twinkle { pages: 64, faults: 4 }),
            ("twinkle", Some(&[pages, faults])) => Ok(Self::Twinkle { pages, faults }),
            ("color", None) => Ok(Self::Color(Windows::default())),
            ("color", Some(&[executable, data])) => Ok(Self::Color(Windows { executable, data })),
            _ => Err(format!(
                "`{text}` is not a prefetch policy; there are: none, readahead:N, all, twinkle[:N,P], replay, intersect, \
                 color[:EXECUTABLE,DATA] and auto"
            )),
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Readahead(pages) => write!(f, "readahead:{pages}"),
            Self::All => f.write_str("all"),
            Self::Twinkle { pages, faults } => write!(f, "twinkle:{pages},{faults}"),
            Self::Replay => f.write_str("replay"),
            Self::Intersect => f.write_str("intersect"),
            Self::Color(w) => write!(f, "color:{},{}", w.executable, w.data),
            Self::Auto => f.write_str("auto"),
            Self::Plain => f.write_str("auto:plain"),
        }
    }
}

/// How much to fetch ahead: from 0, the least, to 1, a full copy.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Eager(f32);

impl Default for Eager {
    fn default() -> Self {
        Self(0.5)
    }
}

impl Eager {
    /// From 0 to 1.
    ///
    /// # Errors
    /// Says what would be right.
    pub fn new(dial: f32) -> Result<Self, String> {
        if (0.0..=1.0).contains(&dial) { Ok(Self(dial)) } else { Err(format!("{dial} is not a number from 0 to 1")) }
    }

    /// The dial.
    #[must_use]
    pub fn dial(self) -> f32 {
        self.0
    }

    /// The likelihood from which a page is fetched ahead: one in four by default, and anything at 1. The second power,
    /// because a page that is fetched in vain costs a hundredth of what a fault does, or less, and somebody's bytes.
    #[must_use]
    pub fn threshold(self) -> f32 {
        (1.0 - self.0).powi(2)
    }
}

impl FromStr for Eager {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| format!("`{text}` is not a number from 0 to 1")).and_then(Self::new)
    }
}
