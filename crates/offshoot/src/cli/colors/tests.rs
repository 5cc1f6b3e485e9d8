//! Pictures, judged by what they must hold whatever they look like.

use super::paint::{Ground, hex, nearest, paint};
use super::picture::{Cell, Grid, Layout, Pages, address};
use super::terminal::{Depth, Style, legend, map};
use super::{account, svg, table};
use api::{ColorCount, Colors, PageState, Region};
use quick_xml::events::Event;
use std::collections::{BTreeMap, BTreeSet};

/// Names, degrees and saturations as the daemon sends them.
fn palette() -> Vec<ColorCount> {
    let of = |color: guest::Color| ColorCount {
        color: color.name().into(),
        degrees: color.hue().degrees,
        saturation: color.hue().saturation,
        ..ColorCount::default()
    };
    guest::Color::ALL.into_iter().map(of).collect()
}

/// A memory of runs: pages, color, state.
fn memory(runs: &[(u64, guest::Color, PageState)]) -> Colors {
    let mut colors = Colors {
        name: "web".into(),
        taken: "2026-11-21T18:40:07Z".into(),
        page_bytes: 4096,
        legend: palette(),
        states: PageState::ALL.to_vec(),
        ..Colors::default()
    };
    for &(pages, color, state) in runs {
        colors.pages += pages;
        colors.color_runs.push((pages, color as u8));
        colors.state_runs.push((pages, state as u8));
        let count = &mut colors.legend[color as usize];
        count.pages += pages;
        count.by_state[state as usize] += pages;
    }
    colors.regions = vec![Region { physical: 0, page: 0, pages: colors.pages }];
    colors
}

/// A memory that is nothing but change: the worst that a picture has to hold.
fn noise(pages: u64) -> Colors {
    let mut seed = 7_u64;
    let runs: Vec<_> = (0..pages)
        .map(|_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (color, state) = ((seed >> 33) as usize % 11, (seed >> 50) as usize % 4);
            (1, guest::Color::ALL[color], PageState::ALL[state])
        })
        .collect();
    memory(&runs)
}

fn some() -> Colors {
    use guest::Color::{Free, KernelText, PageCache, UserData};
    memory(&[
        (1000, KernelText, PageState::Local),
        (20_000, Free, PageState::Absent),
        (3000, UserData, PageState::Dirty),
        (1500, UserData, PageState::Ready),
        (40_000, Free, PageState::Absent),
        (36, PageCache, PageState::Local),
    ])
}

/// Every cell of a drawing: its class at its place, read from the paths; fails where two lie on each other.
fn painted(svg: &str) -> BTreeMap<(i64, i64), String> {
    let mut cells = BTreeMap::new();
    let mut reader = quick_xml::Reader::from_str(svg);
    loop {
        let element = match reader.read_event().expect("well-formed") {
            Event::Eof => return cells,
            Event::Empty(element) | Event::Start(element) => element,
            _ => continue,
        };
        let attribute = |name: &str| {
            let found = element.try_get_attribute(name).expect("well-formed")?;
            Some(String::from_utf8(found.value.into_owned()).expect("UTF-8"))
        };
        let (Some(data), Some(class)) = (attribute("d"), attribute("class")) else { continue };
        if element.name().as_ref() != b"path" || class == "line" {
            continue;
        }
        let (mut x, mut y) = (0_i64, 0_i64);
        for step in data.split(['M', 'm']).skip(1) {
            let (to, length) = step.split_once('h').expect("a move, then a line");
            let (dx, dy) = to.split_once(' ').expect("two numbers");
            let first = dy.ends_with(".5");
            let (dx, dy): (i64, i64) = (dx.parse().unwrap(), dy.trim_end_matches(".5").parse().unwrap());
            (x, y) = if first { (dx, dy) } else { (x + dx, y + dy) };
            let length: i64 = length.parse().unwrap();
            for cell in x..x + length {
                assert!(cells.insert((cell, y), class.clone()).is_none(), "two cells at {cell}, {y}");
            }
            x += length;
        }
    }
}

fn drawn(colors: &Colors) -> String {
    svg::draw(colors, &Pages::of(colors).unwrap())
}

#[test]
fn every_page_is_one_cell_of_its_color_and_state() {
    let colors = some();
    let cells = painted(&drawn(&colors));
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    cells.values().for_each(|class| *counts.entry(class).or_default() += 1);
    let wanted = [("c1-0", 60_000), ("c3-2", 1000), ("c7-2", 36), ("c9-1", 1500), ("c9-3", 3000)];
    assert_eq!(counts, wanted.into());
}

#[test]
fn where_pages_are_many_a_cell_is_what_most_of_its_pages_are() {
    let layout = Layout::new(8, 2, 2, 1);
    assert_eq!((layout.each, layout.bands(), layout.rows()), (2, 1, 2));
    use guest::Color::{Free, Slab, UserData};
    let colors = memory(&[
        (1, Free, PageState::Dirty),
        (1, Slab, PageState::Absent),
        (1, UserData, PageState::Dirty),
        (1, UserData, PageState::Local),
        (2, Slab, PageState::Ready),
        (1, Slab, PageState::Dirty),
        (1, Slab, PageState::Absent),
    ]);
    let grid = Grid::new(&Pages::of(&colors).unwrap(), layout);
    let of = |color, level| Some(Cell { color: color as u8, level });
    let cells = [grid.get(0, 0), grid.get(0, 1), grid.get(1, 1), grid.get(1, 0)];
    assert_eq!(cells, [of(Slab, 0), of(UserData, 3), of(Slab, 1), of(Slab, 2)]);
}

#[test]
fn neighbours_in_memory_are_neighbours_in_the_picture_and_each_has_a_place_of_its_own() {
    for side in [1, 2, 8, 32] {
        let layout = Layout::new(side * side * 7, side * 4, side, 2);
        let places: Vec<(usize, usize)> = (0..layout.pages / layout.each).map(|cell| layout.place(cell)).collect();
        assert_eq!(places.iter().collect::<BTreeSet<_>>().len(), places.len());
        for (at, pair) in places.windows(2).enumerate() {
            let apart = pair[0].0.abs_diff(pair[1].0) + pair[0].1.abs_diff(pair[1].1);
            let leaps = (at + 1) % (layout.columns * side) == 0;
            assert!(apart == 1 || leaps, "side {side}: {:?} follows {:?}", pair[1], pair[0]);
        }
    }
}

#[test]
fn a_file_stays_small_however_much_memory_there_is_and_however_wild() {
    // 64 MiB to 64 GiB.
    for (pages, most) in [(1 << 14, 1 << 20), (1 << 17, 2 << 20), (1 << 20, 2 << 20), (1 << 24, 2 << 20)] {
        let svg = drawn(&noise(pages));
        assert!(svg.len() < most, "{pages} pages take {} bytes", svg.len());
        assert!(painted(&svg).len() as u64 <= pages);
    }
}

#[test]
fn bars_side_by_side_fill_the_width_and_squares_tell_of_all_memory() {
    for colors in [some(), noise(5000)] {
        let svg = drawn(&colors);
        let mut reader = quick_xml::Reader::from_str(&svg);
        let (mut bars, mut squares, mut titles) = (Vec::new(), 0, 0);
        loop {
            match reader.read_event().expect("well-formed") {
                Event::Eof => break,
                Event::Empty(e) | Event::Start(e) => {
                    let number = |name: &str| -> f64 {
                        let found = e.try_get_attribute(name).unwrap();
                        found.map_or(0.0, |a| std::str::from_utf8(&a.value).unwrap().parse().unwrap())
                    };
                    let class = e.try_get_attribute("class").unwrap().map_or(Vec::new(), |a| a.value.into_owned());
                    if class.starts_with(b"share") && number("height") == 18.0 {
                        bars.push((number("x"), number("width")));
                    }
                    squares += u32::from(class == b"square");
                    titles += u32::from(e.name().as_ref() == b"title");
                }
                _ => {}
            }
        }
        assert!(squares > 0 && titles == squares + 1 + 4, "{squares} squares, {titles} titles");
        let end = bars.iter().fold(bars[0].0, |at, (x, width)| {
            assert!((x - at).abs() < 0.02, "a bar begins at {x}, the last one ended at {at}");
            x + width
        });
        assert!((end - bars[0].0 - 1024.0).abs() < 0.02 * bars.len() as f64);
    }
}

#[test]
fn names_that_mean_something_to_xml_are_escaped() {
    let mut colors = some();
    colors.name = "<a & \"b\">\u{1}".into();
    colors.account.kernel = Some("6.1 <script>]]>\u{0}".into());
    colors.account.notes = vec!["a < b\u{7}".into()];
    // So few that their share is written as less than something.
    colors.color_runs.last_mut().unwrap().0 -= 1;
    colors.color_runs.push((1, guest::Color::Slab as u8));
    (colors.legend[7].pages, colors.legend[5].pages) = (35, 1);
    let svg = drawn(&colors);
    assert!(svg.contains("&lt;0.1%"));
    assert!(!painted(&svg).is_empty());
    assert!(svg.contains("&lt;a &amp; &quot;b&quot;&gt;") && !svg.contains("<script>") && !svg.contains('\u{1}'));
}

#[test]
fn an_answer_that_makes_no_sense_is_refused() {
    let good = some();
    assert!(Pages::of(&good).is_ok());
    let bad = |change: &dyn Fn(&mut Colors)| {
        let mut colors = some();
        change(&mut colors);
        Pages::of(&colors).is_err()
    };
    assert!(bad(&|c| c.pages += 1));
    assert!(bad(&|c| c.pages -= 1));
    assert!(bad(&|c| c.color_runs[0].1 = 11));
    assert!(bad(&|c| c.state_runs[0].1 = 5));
    assert!(bad(&|c| c.state_runs[0].0 = u64::MAX));
}

#[test]
fn addresses_leap_over_the_window_for_devices() {
    let mut colors = some();
    colors.regions =
        vec![Region { physical: 0, page: 0, pages: 1000 }, Region { physical: 4 << 30, page: 1000, pages: 64_536 }];
    assert_eq!(address(&colors, 999), 999 * 4096);
    assert_eq!(address(&colors, 1002), (4 << 30) + 2 * 4096);
}

#[test]
fn brightness_alone_tells_states_apart_on_either_ground() {
    // What the eye makes of it, hues aside (relative luminance, WCAG 2).
    let luminance = |rgb: [u8; 3]| {
        let linear = rgb.map(|v| (f64::from(v) / 255.0).powf(2.2));
        0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    };
    for color in palette() {
        for (ground, back) in [(Ground::Light, 1.0), (Ground::Dark, luminance([0x0d, 0x11, 0x17]))] {
            let contrast = |level| {
                let own = luminance(paint(&color, level, ground)) + 0.05;
                (own / (back + 0.05)).max((back + 0.05) / own)
            };
            for level in 0..3 {
                let (less, more) = (contrast(level), contrast(level + 1));
                assert!(more > less * 1.08, "{} {ground:?}: {level} has {less:.2}, the next {more:.2}", color.color);
            }
        }
    }
}

#[test]
fn paints_are_written_and_approximated() {
    assert_eq!((hex([255, 0, 17]), hex([1, 2, 255])), ("#f01".into(), "#0102ff".into()));
    assert_eq!((nearest([0, 0, 0]), nearest([255, 255, 255]), nearest([255, 0, 0])), (16, 231, 196));
    assert_eq!((nearest([8, 8, 8]), nearest([118, 118, 118])), (232, 243));
}

#[test]
fn a_terminal_is_believed_what_it_says_of_itself() {
    let depth = |pairs: &'static [(&str, &str)]| {
        Style::of(|name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned())).depth
    };
    assert_eq!(depth(&[("TERM", "xterm-256color"), ("COLORTERM", "truecolor")]), Depth::True);
    assert_eq!(depth(&[("TERM", "xterm-256color")]), Depth::Indexed);
    assert_eq!(depth(&[("TERM", "xterm-256color"), ("COLORTERM", "24bit"), ("NO_COLOR", "1")]), Depth::Letters);
    assert_eq!(depth(&[("TERM", "xterm-256color"), ("NO_COLOR", "")]), Depth::Indexed);
    assert_eq!(depth(&[("TERM", "dumb"), ("COLORTERM", "truecolor")]), Depth::Letters);
    assert_eq!(depth(&[("TERM", "vt100")]), Depth::Letters);
    let light = Style::of(|name| (name == "COLORFGBG").then(|| "0;15".to_owned()));
    assert_eq!(light.ground, Ground::Light);
}

/// What a line shows, escapes taken away.
fn visible(line: &str) -> String {
    let mut out = String::new();
    let mut letters = line.chars();
    while let Some(letter) = letters.next() {
        if letter != '\x1b' {
            out.push(letter);
        } else {
            letters.by_ref().find(|l| l.is_ascii_alphabetic());
        }
    }
    out
}

#[test]
fn maps_fit_the_terminal_and_show_all_memory() {
    for depth in [Depth::True, Depth::Indexed, Depth::Letters] {
        let style = Style { depth, ground: Ground::Dark };
        for colors in [some(), noise(1 << 17), noise(3)] {
            let pages = Pages::of(&colors).unwrap();
            for (columns, lines) in [(80, 24), (200, 50), (10, 4), (33, 7)] {
                let map = map(&colors, &pages, style, (columns, lines));
                let wide = map.iter().map(|line| visible(line).chars().count()).max().unwrap();
                assert!(
                    map.len() <= lines && wide <= columns.max(18),
                    "{} lines of {wide} in {columns} by {lines}",
                    map.len()
                );
                assert!(visible(&map[0]).trim_start().starts_with("0 "), "{}", map[0]);
            }
            for line in legend(&colors, style, 40) {
                assert!(visible(&line).chars().count() <= 46, "{line}");
            }
        }
    }
    let letters =
        map(&some(), &Pages::of(&some()).unwrap(), Style { depth: Depth::Letters, ground: Ground::Dark }, (80, 24));
    let text = letters.join("");
    assert!(['T', '.', 'U', 'u'].iter().all(|letter| text.contains(*letter)), "{text}");
}

#[test]
fn tables_add_up() {
    let (heading, rows) = table(&some());
    assert_eq!(heading, ["COLOR", "PAGES", "BYTES", "SHARE", "DIRTY", "LOCAL", "READY", "ABSENT"]);
    assert_eq!(rows[0][..4], ["free", "60000", "234.4 MiB", "92%"]);
    assert_eq!(rows[1], ["user data", "4500", "17.6 MiB", "6.9%", "11.7 MiB", "0 B", "5.9 MiB", "0 B"]);
    assert_eq!(rows[4], ["all", "65536", "256.0 MiB", "100%", "11.7 MiB", "4.0 MiB", "5.9 MiB", "234.4 MiB"]);
    let mut snapshot = some();
    snapshot.snapshot = true;
    assert_eq!(table(&snapshot).0[4..], ["STORED"]);
    assert!(account(&some())[0].starts_with("kernel not recognised"));
}
