//! Plots as SVG: lines with error bars over a number of instances, and bars side by side.
//!
//! Written out by hand because two kinds of plot need no library: a scale, ticks at round numbers, marks. A point is
//! the median of its repetitions, its bar reaches from the least to the most. Series differ by colour and by mark,
//! so that they are told apart in grey too (colours: Okabe and Ito, "Color Universal Design", 2008).

#[cfg(test)]
mod tests;

use crate::Outcome;
use crate::report::median;
use std::fmt::Write as _;
use std::path::Path;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 86.0;
const BOTTOM: f64 = 62.0;
/// As many as there are policies to compare; told apart by most people who see colours otherwise (after Okabe and Ito).
const COLOURS: [&str; 8] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a89f00", "#555555"];

/// Repetitions of one measurement at one place of the horizontal axis.
#[derive(Clone, Debug)]
pub struct Point {
    /// Where on the horizontal axis.
    pub x: f64,
    /// What was measured there.
    pub runs: Vec<f64>,
}

/// What belongs together: one line, or the bars of one colour.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Its points, ascending.
    pub points: Vec<Point>,
}

/// What the horizontal axis shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Across {
    /// Numbers, evenly.
    Linear,
    /// Numbers, each doubling as far as the last.
    Doubling,
}

/// Lines over a number.
#[derive(Clone, Debug)]
pub struct Lines {
    /// What it shows.
    pub title: String,
    /// How and on what it was measured.
    pub subtitle: String,
    /// Label of the horizontal axis, with the unit.
    pub x: String,
    /// Label of the vertical axis, with the unit.
    pub y: String,
    /// How the horizontal axis runs.
    pub across: Across,
    /// The lines.
    pub series: Vec<Series>,
}

/// Bars side by side, in groups.
#[derive(Clone, Debug)]
pub struct Bars {
    /// What it shows.
    pub title: String,
    /// How and on what it was measured.
    pub subtitle: String,
    /// Label of the vertical axis, with the unit.
    pub y: String,
    /// Names of the groups, from left to right.
    pub groups: Vec<String>,
    /// Bars of one colour; the `x` of a point is the number of its group.
    pub series: Vec<Series>,
}

impl Lines {
    /// The plot as SVG.
    #[must_use]
    pub fn svg(&self) -> String {
        let xs: Vec<f64> = self.series.iter().flat_map(|s| s.points.iter().map(|p| p.x)).collect();
        let scale = |x: f64| if self.across == Across::Doubling { x.max(f64::MIN_POSITIVE).log2() } else { x };
        let least =
            if self.across == Across::Doubling { xs.iter().copied().fold(f64::INFINITY, f64::min) } else { 0.0 };
        let most = xs.iter().copied().fold(least, f64::max);
        let (from, span) = (scale(least), (scale(most) - scale(least)).max(f64::MIN_POSITIVE));
        let room = WIDTH - LEFT - RIGHT - 24.0;
        let at = |x: f64| LEFT + 12.0 + (scale(x) - from) / span * room;
        let mut out = Canvas::new(&self.title, &self.subtitle, &self.y, &self.series);
        let ticks = match self.across {
            Across::Linear => round_ticks(most).0,
            Across::Doubling => {
                let mut ticks = xs;
                ticks.sort_by(f64::total_cmp);
                ticks.dedup();
                ticks
            }
        };
        for tick in ticks.into_iter().filter(|&tick| tick <= most) {
            out.x_tick(at(tick), &number(tick));
        }
        out.x_label(&self.x);
        for (i, series) in self.series.iter().enumerate() {
            let points: Vec<(f64, f64)> = series.points.iter().map(|p| (at(p.x), out.y(median(&p.runs)))).collect();
            let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let colour = colour(i);
            out.add(&format!(
                "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/>",
                path.join(" ")
            ));
            for (point, (x, y)) in series.points.iter().zip(points) {
                out.error_bar(x, &point.runs, colour);
                out.mark(i, x, y);
            }
        }
        out.finish()
    }
}

impl Bars {
    /// The plot as SVG.
    #[must_use]
    pub fn svg(&self) -> String {
        let mut out = Canvas::new(&self.title, &self.subtitle, &self.y, &self.series);
        let group = (WIDTH - LEFT - RIGHT) / self.groups.len().max(1) as f64;
        let width = group * 0.76 / self.series.len().max(1) as f64;
        for (i, name) in self.groups.iter().enumerate() {
            out.x_name(LEFT + group * (i as f64 + 0.5), name);
        }
        for (i, series) in self.series.iter().enumerate() {
            for point in &series.points {
                let left = LEFT + group * (point.x + 0.12) + width * i as f64;
                let (top, bottom) = (out.y(median(&point.runs)), out.y(0.0));
                out.add(&format!(
                    "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\"/>",
                    width - 2.0,
                    (bottom - top).max(0.0),
                    colour(i)
                ));
                out.error_bar(left + width / 2.0 - 1.0, &point.runs, "#222");
                out.text(
                    left + width / 2.0 - 1.0,
                    out.y(most(&point.runs)) - 5.0,
                    10.5,
                    "middle",
                    &number(median(&point.runs)),
                );
            }
        }
        out.finish()
    }
}

/// Writes a plot into a directory.
///
/// # Errors
/// Where it cannot be written.
pub fn write(dir: &Path, name: &str, svg: &str) -> Outcome {
    std::fs::create_dir_all(dir)?;
    let path = dir.join(format!("{name}.svg"));
    std::fs::write(&path, svg).map_err(|e| format!("{}: {e}", path.display()))?;
    println!("plotted {}", path.display());
    Ok(())
}

/// An SVG under way: frame, title, legend and vertical axis are there.
struct Canvas {
    text: String,
    top: f64,
}

impl Canvas {
    fn new(title: &str, subtitle: &str, y: &str, series: &[Series]) -> Self {
        let highest = series.iter().flat_map(|s| &s.points).map(|p| most(&p.runs)).fold(0.0, f64::max);
        let (ticks, top) = round_ticks(highest);
        let mut out = Self { text: String::new(), top };
        out.add(&format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" \
             height=\"{HEIGHT}\" font-family=\"system-ui, sans-serif\" fill=\"#222\" role=\"img\" aria-label=\"{}\">",
            escape(title)
        ));
        out.add(&format!("<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>"));
        out.add(&format!("<text x=\"16\" y=\"25\" font-size=\"16\" font-weight=\"600\">{}</text>", escape(title)));
        out.add(&format!("<text x=\"16\" y=\"43\" font-size=\"11.5\" fill=\"#555\">{}</text>", escape(subtitle)));
        for tick in ticks {
            let at = out.y(tick);
            let (right, tint) = (WIDTH - RIGHT, if tick == 0.0 { "#222" } else { "#ddd" });
            out.add(&format!("<path d=\"M{LEFT} {at:.1}H{right}\" stroke=\"{tint}\"/>"));
            out.text(LEFT - 8.0, at + 4.0, 12.0, "end", &number(tick));
        }
        let middle = TOP + (HEIGHT - TOP - BOTTOM) / 2.0;
        out.add(&format!(
            "<text transform=\"translate(22 {middle}) rotate(-90)\" font-size=\"12.5\" text-anchor=\"middle\">{}</text>",
            escape(y)
        ));
        let mut x = LEFT;
        for (i, series) in series.iter().enumerate() {
            out.mark(i, x + 6.0, 65.0);
            out.text(x + 17.0, 69.0, 12.5, "start", &series.name);
            // No metrics of fonts here: as wide as most fonts make it, and a little more.
            x += 40.0 + 6.9 * series.name.chars().count() as f64;
        }
        out
    }

    fn add(&mut self, element: &str) {
        self.text.push_str(element);
        self.text.push('\n');
    }

    /// Where a value stands.
    fn y(&self, value: f64) -> f64 {
        HEIGHT - BOTTOM - value / self.top * (HEIGHT - TOP - BOTTOM)
    }

    fn text(&mut self, x: f64, y: f64, size: f64, anchor: &str, words: &str) {
        let words = escape(words);
        self.add(&format!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" text-anchor=\"{anchor}\">{words}</text>"
        ));
    }

    fn x_tick(&mut self, x: f64, label: &str) {
        let bottom = HEIGHT - BOTTOM;
        self.add(&format!("<path d=\"M{x:.1} {bottom}v5\" stroke=\"#222\"/>"));
        self.x_name(x, label);
    }

    fn x_name(&mut self, x: f64, label: &str) {
        self.text(x, HEIGHT - BOTTOM + 20.0, 12.0, "middle", label);
    }

    fn x_label(&mut self, label: &str) {
        self.text(LEFT + (WIDTH - LEFT - RIGHT) / 2.0, HEIGHT - 16.0, 12.5, "middle", label);
    }

    /// From the least to the most of several repetitions.
    fn error_bar(&mut self, x: f64, runs: &[f64], colour: &str) {
        if runs.len() > 1 {
            let low = self.y(runs.iter().copied().fold(f64::INFINITY, f64::min));
            let (high, left) = (self.y(most(runs)), x - 4.0);
            self.add(&format!(
                "<path d=\"M{left:.1} {low:.1}h8M{left:.1} {high:.1}h8M{x:.1} {low:.1}V{high:.1}\" stroke=\"{colour}\" \
                 stroke-width=\"1.2\"/>"
            ));
        }
    }

    /// The mark of a series.
    fn mark(&mut self, series: usize, x: f64, y: f64) {
        let fill = colour(series);
        let shape = match series % 3 {
            0 => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\" fill=\"{fill}\"/>"),
            1 => format!(
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"8.4\" height=\"8.4\" fill=\"{fill}\"/>",
                x - 4.2,
                y - 4.2
            ),
            _ => format!("<path d=\"M{:.1} {:.1}h10.4l-5.2 -9z\" fill=\"{fill}\"/>", x - 5.2, y + 4.0),
        };
        self.add(&shape);
    }

    fn finish(mut self) -> String {
        self.text.push_str("</svg>\n");
        self.text
    }
}

fn colour(series: usize) -> &'static str {
    COLOURS[series % COLOURS.len()]
}

fn most(runs: &[f64]) -> f64 {
    runs.iter().copied().fold(0.0, f64::max)
}

/// Round numbers from nothing up to what first covers `highest`, and that one.
fn round_ticks(highest: f64) -> (Vec<f64>, f64) {
    let highest = if highest.is_finite() && highest > 0.0 { highest } else { 1.0 };
    let rough = highest / 5.0;
    let magnitude = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|s| s * magnitude).find(|&s| s >= rough * 0.999_999);
    let step = step.unwrap_or(10.0 * magnitude);
    let count = (highest / step - 1e-9).ceil().max(1.0) as u32;
    ((0..=count).map(|i| f64::from(i) * step).collect(), f64::from(count) * step)
}

/// A number in as few digits as tell it.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    let mut text = String::new();
    let _ = write!(text, "{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
