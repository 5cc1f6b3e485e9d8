//! The picture as one SVG file that needs nothing else.
//!
//! Cells of one paint are one path, a line of width 1 for each run of them in a row: some seven bytes a run, and no
//! seams. What each square holds is told where the pointer rests on it. Light or dark is the reader's choice.

use super::paint::{Ground, hex, paint};
use super::picture::{Grid, LEVELS, Layout, Pages, address, round};
use api::{ColorCount, Colors, PageState};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Units of the picture: pixels where nobody scales it.
const MAP: usize = 1024;
const LEFT: usize = 96;
const WIDTH: usize = LEFT + MAP + 40;
const TOP: usize = 140;
/// Between two bands, in cells of the finest grid.
const GAP: usize = 4;
/// The most cells: what the file's size is bounded by.
const CELLS: usize = 512 * 256;

/// The grid that suits so many pages: fine where there are many, and broader than high.
pub(super) fn layout(pages: usize) -> Layout {
    let columns = match pages {
        0..=32_768 => 256,
        _ => 512,
    };
    let side = columns / 16;
    Layout::new(pages, columns, side, CELLS / 512 / side)
}

/// Draws it.
pub(super) fn draw(colors: &Colors, pages: &Pages) -> String {
    let grid = Grid::new(pages, layout(pages.len()));
    let layout = grid.layout;
    let scale = MAP / layout.columns;
    let gap = GAP / scale.min(GAP);
    let band_height = layout.side + gap;
    let height = layout.bands() * band_height * scale;
    let legend = TOP + height + 44;
    let rows = shown(colors).count().div_ceil(4);
    let total = legend + 62 + rows * 58 + notes(colors).len() * 24 + 20;
    let mut out = String::with_capacity(1 << 17);
    let _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {total}\" width=\"{WIDTH}\" \
         height=\"{total}\" role=\"img\" aria-labelledby=\"name about\" font-family=\"Inter, ui-sans-serif, \
         system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif\">\n\
         <title id=\"name\">Memory of {name}</title>\n<desc id=\"about\">{about}</desc>\n",
        name = escape(&colors.name),
        about = escape(&about(colors)),
    );
    style(&mut out, colors, &grid);
    let _ = writeln!(out, "<rect class=\"ground\" width=\"{WIDTH}\" height=\"{total}\" rx=\"14\"/>");
    head(&mut out, colors);
    let _ = writeln!(
        out,
        "<g transform=\"translate({LEFT} {TOP}) scale({scale})\" shape-rendering=\"crispEdges\" stroke-width=\"1\">"
    );
    cells(&mut out, &grid, gap);
    out.push_str("</g>\n");
    axis(&mut out, colors, layout, band_height * scale);
    squares(&mut out, colors, pages, layout, (scale, band_height));
    shares(&mut out, colors, legend);
    table(&mut out, colors, legend + 62);
    for (at, note) in notes(colors).iter().enumerate() {
        let y = legend + 62 + rows * 58 + 16 + at * 24;
        let _ = writeln!(out, "<text class=\"dim\" x=\"{LEFT}\" y=\"{y}\" font-size=\"14\">{}</text>", escape(note));
    }
    out.push_str("</svg>\n");
    out
}

/// The colors that there are, the most frequent first, what nobody needs last.
fn shown(colors: &Colors) -> impl Iterator<Item = (usize, &ColorCount)> {
    let mut found: Vec<_> = colors.legend.iter().enumerate().filter(|(_, color)| color.pages > 0).collect();
    found.sort_by_key(|(number, color)| (color.saturation < 20, std::cmp::Reverse(color.pages), *number));
    found.into_iter()
}

/// One sentence for who cannot see it.
fn about(colors: &Colors) -> String {
    let part = |(_, c): (usize, &ColorCount)| format!("{} {}", c.color, percent(c.pages, colors.pages));
    let parts: Vec<String> = shown(colors).map(part).collect();
    format!("{}: {}", subtitle(colors), parts.join(", "))
}

fn subtitle(colors: &Colors) -> String {
    let kernel = colors.account.kernel.as_ref().map(|release| format!("Linux {release}"));
    let kernel = kernel.unwrap_or_else(|| "kernel not recognised".into());
    let memory = round(colors.pages * colors.page_bytes);
    format!("{memory} of guest memory · {kernel} · {}", date(&colors.taken))
}

/// RFC 3339 as people read it.
fn date(taken: &str) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let parse = || -> Option<String> {
        let (day, time) = taken.split_once('T')?;
        let mut parts = day.split('-');
        let (year, month, day) = (parts.next()?, parts.next()?.parse::<usize>().ok()?, parts.next()?);
        Some(format!("{} {} {year}, {} UTC", day.parse::<u8>().ok()?, MONTHS.get(month - 1)?, time.get(..5)?))
    };
    parse().unwrap_or_else(|| taken.to_owned())
}

fn notes(colors: &Colors) -> Vec<String> {
    let whole = layout(colors.pages as usize).each;
    let merged = (whole > 1).then(|| {
        format!(
            "A cell is {}: the color of most of its pages, as bright as these are in the mean.",
            round(whole as u64 * colors.page_bytes)
        )
    });
    merged.into_iter().chain(colors.account.notes.iter().take(4).cloned()).collect()
}

/// Paints as classes, `c` with the number of the color and of the brightness; dark ones where the reader likes that.
fn style(out: &mut String, colors: &Colors, grid: &Grid) {
    let mut used: Vec<(u8, u8)> = (0..grid.layout.rows())
        .flat_map(|y| grid.runs(y).map(|(_, _, cell)| (cell.color, cell.level)))
        .chain(shown(colors).flat_map(|(number, _)| (0..LEVELS as u8).map(move |level| (number as u8, level))))
        .chain((0..LEVELS as u8).map(|level| (key_color(colors) as u8, level)))
        .collect();
    used.sort_unstable();
    used.dedup();
    let paints = |ground| {
        used.iter().fold(String::new(), |mut text, &(color, level)| {
            let paint = hex(paint(&colors.legend[usize::from(color)], level, ground));
            let _ = write!(text, ".c{color}-{level}{{fill:{paint};stroke:{paint}}}");
            text
        })
    };
    let _ = write!(
        out,
        "<style>\n.ground{{fill:#fff}}.ink{{fill:#1b1f24}}.dim{{fill:#5b6570}}.line{{stroke:#c9d1d9;fill:none}}\
         .square{{fill:none;pointer-events:all;stroke:none}}.square:hover{{stroke:#1b1f24;stroke-width:1.5}}\
         .share{{stroke-width:0}}\n{}\n\
         @media (prefers-color-scheme:dark){{.ground{{fill:#0d1117}}.ink{{fill:#e6edf3}}.dim{{fill:#8d96a0}}\
         .line{{stroke:#30363d}}.square:hover{{stroke:#e6edf3}}\n{}\n}}\n</style>\n",
        paints(Ground::Light),
        paints(Ground::Dark),
    );
}

/// The color that brightness is explained by: the most frequent one that is no grey.
fn key_color(colors: &Colors) -> usize {
    shown(colors).next().map_or(0, |(number, _)| number)
}

fn head(out: &mut String, colors: &Colors) {
    let _ = writeln!(
        out,
        "<text class=\"ink\" x=\"{LEFT}\" y=\"66\" font-size=\"34\" font-weight=\"650\">{}</text>\n\
         <text class=\"dim\" x=\"{LEFT}\" y=\"106\" font-size=\"16\">{}</text>",
        escape(&colors.name),
        escape(&subtitle(colors)),
    );
    let key = key_color(colors);
    let states: &[(PageState, u8)] = if colors.snapshot {
        &[(PageState::Absent, 0), (PageState::Stored, 2)]
    } else {
        &[(PageState::Absent, 0), (PageState::Ready, 1), (PageState::Local, 2), (PageState::Dirty, 3)]
    };
    let width = 112;
    let from = LEFT + MAP - width * states.len();
    for (at, (state, level)) in states.iter().enumerate() {
        let x = from + at * width;
        let pages: u64 = colors.legend.iter().map(|c| c.by_state[*state as usize]).sum();
        let name = if colors.snapshot && *state == PageState::Absent { "zero" } else { state.name() };
        let _ = writeln!(
            out,
            "<g><title>{}</title><rect class=\"share c{key}-{level}\" x=\"{x}\" y=\"30\" width=\"{width}\" height=\"10\"/>\
             <text class=\"ink\" x=\"{x}\" y=\"60\" font-size=\"15\">{name}</text>\
             <text class=\"dim\" x=\"{x}\" y=\"80\" font-size=\"14\">{}</text></g>",
            meaning(*state, colors.snapshot),
            round(pages * colors.page_bytes),
        );
    }
}

fn meaning(state: PageState, snapshot: bool) -> &'static str {
    match state {
        PageState::Absent if snapshot => "zero: takes no space",
        PageState::Absent => "not in this host's memory: fetched when it is touched, or zero",
        PageState::Ready => "in the host's memory, and not touched by this VM",
        PageState::Local => "mapped by this VM and shared with others",
        PageState::Dirty => "written by this VM: its own",
        PageState::Stored => "in the store",
    }
}

/// The map itself, in units of cells.
fn cells(out: &mut String, grid: &Grid, gap: usize) {
    /// A path under way, and where its pen is.
    #[derive(Default)]
    struct Path {
        data: String,
        pen: (usize, usize),
    }
    let mut paths: BTreeMap<(u8, u8), Path> = BTreeMap::new();
    for y in 0..grid.layout.rows() {
        let line = y + y / grid.layout.side * gap;
        for (x, length, cell) in grid.runs(y) {
            let path = paths.entry((cell.color, cell.level)).or_default();
            let _ = if path.data.is_empty() {
                write!(path.data, "M{x} {line}.5h{length}")
            } else if path.pen.1 == line {
                write!(path.data, "m{} 0h{length}", x - path.pen.0)
            } else {
                write!(path.data, "m{} {}h{length}", x as i64 - path.pen.0 as i64, line - path.pen.1)
            };
            path.pen = (x + length, line);
        }
    }
    for ((color, level), path) in paths {
        let _ = writeln!(out, "<path class=\"c{color}-{level}\" d=\"{}\"/>", path.data);
    }
}

/// Guest-physical addresses, one for each band.
fn axis(out: &mut String, colors: &Colors, layout: Layout, step: usize) {
    let mut before = None;
    for band in 0..layout.bands() {
        let first = band * layout.band_pages();
        let (at, y) = (address(colors, first), TOP + band * step);
        let _ = writeln!(
            out,
            "<text class=\"dim\" x=\"{}\" y=\"{}\" font-size=\"14\" text-anchor=\"end\">{}</text>",
            LEFT - 14,
            y + 12,
            round(at)
        );
        // Where addresses leap there is no memory: a window for devices.
        if before.is_some_and(|before| at > before + layout.band_pages() as u64 * colors.page_bytes) {
            let _ = writeln!(
                out,
                "<path class=\"line\" stroke-dasharray=\"4 4\" d=\"M{} {}H{}\"/>",
                LEFT - 80,
                y - 2,
                LEFT + MAP
            );
        }
        before = Some(at);
    }
}

/// What each square holds, told where the pointer rests.
fn squares(out: &mut String, colors: &Colors, pages: &Pages, layout: Layout, (scale, band_height): (usize, usize)) {
    out.push_str("<g>\n");
    let across = layout.columns / layout.side;
    for (number, first) in (0..pages.len()).step_by(layout.square_pages()).enumerate() {
        let end = pages.len().min(first + layout.square_pages());
        let size = layout.side * scale;
        let (x, y) = (LEFT + number % across * size, TOP + number / across * band_height * scale);
        let _ = writeln!(
            out,
            "<rect class=\"square\" x=\"{x}\" y=\"{y}\" width=\"{size}\" height=\"{size}\"><title>{}</title></rect>",
            escape(&square(colors, pages, first..end))
        );
    }
    out.push_str("</g>\n");
}

fn square(colors: &Colors, pages: &Pages, range: std::ops::Range<usize>) -> String {
    let mut by_color = vec![0_u64; colors.legend.len()];
    let mut by_level = [0_u64; LEVELS];
    for page in range.clone() {
        let (color, level) = pages.get(page);
        by_color[usize::from(color)] += 1;
        by_level[usize::from(level)] += 1;
    }
    let all = range.len() as u64;
    let (first, last) = (address(colors, range.start), address(colors, range.end - 1) + colors.page_bytes);
    let mut order: Vec<usize> = (0..by_color.len()).filter(|&color| by_color[color] > 0).collect();
    order.sort_by_key(|&color| std::cmp::Reverse(by_color[color]));
    let part = |&color: &usize| format!("{} {}", colors.legend[color].color, percent(by_color[color], all));
    let parts: Vec<String> = order.iter().take(4).map(part).collect();
    let states = if colors.snapshot { ["zero", "", "stored", ""] } else { ["absent", "ready", "local", "dirty"] };
    let state = |(name, &count): (&str, &u64)| (count > 0).then(|| format!("{name} {}", percent(count, all)));
    let states: Vec<String> = states.into_iter().zip(&by_level).filter_map(state).collect();
    format!("{} to {}\n{}\n{}", round(first), round(last), parts.join(", "), states.join(", "))
}

/// All of memory as one bar: colors side by side, each from dirty to absent.
fn shares(out: &mut String, colors: &Colors, y: usize) {
    let _ = writeln!(out, "<g shape-rendering=\"crispEdges\">");
    let mut at = 0;
    let place = |pages: u64| LEFT as f64 + MAP as f64 * pages as f64 / colors.pages.max(1) as f64;
    for (number, color) in shown(colors) {
        for level in (0..LEVELS as u8).rev() {
            let pages: u64 = PageState::ALL
                .iter()
                .filter(|state| super::picture::level(**state) == level)
                .map(|state| color.by_state[*state as usize])
                .sum();
            if pages == 0 {
                continue;
            }
            let (from, to) = (place(at), place(at + pages));
            let _ = writeln!(
                out,
                "<rect class=\"share c{number}-{level}\" x=\"{from:.2}\" y=\"{y}\" width=\"{:.2}\" height=\"18\"/>",
                to - from
            );
            at += pages;
        }
    }
    out.push_str("</g>\n");
}

/// The legend: four colors in a row.
fn table(out: &mut String, colors: &Colors, top: usize) {
    for (at, (number, color)) in shown(colors).enumerate() {
        let (x, y) = (LEFT + at % 4 * (MAP / 4), top + at / 4 * 58);
        for level in 0..LEVELS {
            let _ = write!(
                out,
                "<rect class=\"share c{number}-{level}\" x=\"{}\" y=\"{}\" width=\"9\" height=\"34\"/>",
                x + (LEVELS - 1 - level) * 9,
                y - 14
            );
        }
        let _ = writeln!(
            out,
            "<text class=\"ink\" x=\"{tx}\" y=\"{y}\" font-size=\"16\">{}</text>\
             <text class=\"dim\" x=\"{tx}\" y=\"{}\" font-size=\"14\">{} · {}</text>",
            escape(&color.color),
            y + 20,
            escape(&percent(color.pages, colors.pages)),
            round(color.pages * colors.page_bytes),
            tx = x + LEVELS * 9 + 14,
        );
    }
}

/// A part in percent, so that none looks like nothing.
pub(super) fn percent(part: u64, whole: u64) -> String {
    let share = 100.0 * part as f64 / whole.max(1) as f64;
    match share {
        _ if part == 0 => "0%".into(),
        ..0.1 => "<0.1%".into(),
        ..9.95 => format!("{share:.1}%"),
        _ => format!("{share:.0}%"),
    }
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' => out.push('\n'),
            // Not even an escape may stand for these in XML.
            letter if letter.is_control() || matches!(letter, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            letter => out.push(letter),
        }
    }
    out
}
