//! The picture in a terminal: each character shows two cells, one above the other, by the color of a half block and
//! the color behind it. Where a terminal has no colors, or none are wanted, a letter stands for two cells.

use super::paint::{Ground, Rgb, nearest, paint};
use super::picture::{Cell, Grid, Layout, Pages, address, round};
use super::svg::percent;
use api::{ColorCount, Colors};
use std::fmt::Write as _;

/// Columns for addresses.
const AXIS: usize = 10;
/// Cells along the side of a square.
const SIDE: usize = 8;

/// What a terminal can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// Any color.
    True,
    /// One of 256.
    Indexed,
    /// Letters alone.
    Letters,
}

/// How to draw for a terminal.
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    pub(super) depth: Depth,
    pub(super) ground: Ground,
}

impl Style {
    /// What the environment says of the terminal: `NO_COLOR` (no-color.org), `COLORTERM`, `TERM`, `COLORFGBG`.
    pub(super) fn of(variable: impl Fn(&str) -> Option<String>) -> Self {
        let is = |name: &str, test: &dyn Fn(&str) -> bool| variable(name).is_some_and(|value| test(&value));
        let depth = if is("NO_COLOR", &|v| !v.is_empty()) || is("TERM", &|v| v == "dumb" || v.is_empty()) {
            Depth::Letters
        } else if is("COLORTERM", &|v| v == "truecolor" || v == "24bit") || is("TERM", &|v| v.ends_with("-direct")) {
            Depth::True
        } else if is("TERM", &|v| v.contains("256color")) {
            Depth::Indexed
        } else {
            Depth::Letters
        };
        // Foreground and background by their numbers in the first sixteen; most terminals say nothing and are dark.
        let is_light = |v: &str| matches!(v.rsplit(';').next(), Some("7" | "15"));
        let ground = if is("COLORFGBG", &is_light) { Ground::Light } else { Ground::Dark };
        Self { depth, ground }
    }

    fn color(self, rgb: Rgb, layer: u8) -> String {
        match self.depth {
            Depth::True => format!("\x1b[{layer}8;2;{};{};{}m", rgb[0], rgb[1], rgb[2]),
            Depth::Indexed => format!("\x1b[{layer}8;5;{}m", nearest(rgb)),
            Depth::Letters => String::new(),
        }
    }

    fn plain(self) -> &'static str {
        if self.depth == Depth::Letters { "" } else { "\x1b[0m" }
    }

    pub(super) fn dim(self, text: &str) -> String {
        if self.depth == Depth::Letters { text.to_owned() } else { format!("\x1b[2m{text}\x1b[0m") }
    }

    pub(super) fn bold(self, text: &str) -> String {
        if self.depth == Depth::Letters { text.to_owned() } else { format!("\x1b[1m{text}\x1b[0m") }
    }
}

/// The letter of a color: upper case where the memory is here.
pub(super) fn letter(color: &ColorCount, level: u8) -> char {
    let letter = match color.color.as_str() {
        "free" => '.',
        "zero" => '_',
        "kernel text" => 't',
        "kernel data" => 'k',
        "slab" => 's',
        "page table" => 'p',
        "page cache" => 'c',
        "user text" => 'x',
        "user data" => 'u',
        "device" => 'd',
        _ => '?',
    };
    if level >= 2 { letter.to_ascii_uppercase() } else { letter }
}

/// Lines of the map, for a terminal of `columns`, no more than `lines` of them.
pub(super) fn map(colors: &Colors, pages: &Pages, style: Style, (columns, lines): (usize, usize)) -> Vec<String> {
    let across = (columns.saturating_sub(AXIS) / SIDE * SIDE).max(SIDE);
    let bands = (lines * 2 / SIDE).max(1);
    let layout = Layout::new(pages.len(), across, SIDE, bands);
    let grid = Grid::new(pages, layout);
    let last_row = (0..layout.rows()).rev().find(|&y| grid.runs(y).next().is_some()).unwrap_or(0);
    let mut out = Vec::new();
    for y in (0..=last_row).step_by(2) {
        let label = match y.is_multiple_of(SIDE) {
            true => round(address(colors, y / SIDE * layout.band_pages())),
            false => String::new(),
        };
        let mut line = style.dim(&format!("{label:>width$} ", width = AXIS - 1));
        let mut pens: (Option<Rgb>, Option<Rgb>) = (None, None);
        for x in 0..layout.columns {
            let (upper, lower) = (grid.get(x, y), grid.get(x, y + 1));
            if style.depth == Depth::Letters {
                let shown = upper.max_by_level(lower);
                line.push(shown.map_or(' ', |cell| letter(&colors.legend[usize::from(cell.color)], cell.level)));
                continue;
            }
            let rgb = |cell: Cell| paint(&colors.legend[usize::from(cell.color)], cell.level, style.ground);
            block(&mut line, style, &mut pens, (upper.map(rgb), lower.map(rgb)));
        }
        line.push_str(style.plain());
        out.push(line.trim_end().to_owned());
    }
    out
}

trait Brighter {
    fn max_by_level(self, other: Self) -> Self;
}

impl Brighter for Option<Cell> {
    /// The brighter of two; of equals the first.
    fn max_by_level(self, other: Self) -> Self {
        match (self, other) {
            (Some(a), Some(b)) => Some(if b.level > a.level { b } else { a }),
            (a, b) => a.or(b),
        }
    }
}

/// One character, with as little said of colors as the last one leaves to say.
fn block(
    line: &mut String,
    style: Style,
    pens: &mut (Option<Rgb>, Option<Rgb>),
    (upper, lower): (Option<Rgb>, Option<Rgb>),
) {
    if lower != pens.1 {
        match lower {
            Some(rgb) => line.push_str(&style.color(rgb, 4)),
            None => line.push_str("\x1b[49m"),
        }
        pens.1 = lower;
    }
    let Some(rgb) = upper else {
        line.push(' ');
        return;
    };
    if upper == lower {
        line.push(' ');
        return;
    }
    if pens.0 != upper {
        line.push_str(&style.color(rgb, 3));
        pens.0 = upper;
    }
    line.push('▀');
}

/// What the paints stand for, wrapped to a terminal of `columns`.
pub(super) fn legend(colors: &Colors, style: Style, columns: usize) -> Vec<String> {
    let mut found: Vec<&ColorCount> = colors.legend.iter().filter(|color| color.pages > 0).collect();
    found.sort_by_key(|color| (color.saturation < 20, std::cmp::Reverse(color.pages)));
    let mut out = vec![String::new()];
    let mut width = 0;
    for color in found {
        let mark = match style.depth {
            Depth::Letters => format!("{} ", letter(color, 3)),
            _ => format!("{}██{} ", style.color(paint(color, 2, style.ground), 3), style.plain()),
        };
        let text = format!("{} {}", color.color, percent(color.pages, colors.pages));
        let needed = text.chars().count() + 6;
        if width > 0 && width + needed > columns {
            out.push(String::new());
            width = 0;
        }
        let line = out.last_mut().expect("one at least");
        let _ = write!(line, "{}{mark}{text}", if width > 0 { "   " } else { "" });
        width += needed;
    }
    out
}
