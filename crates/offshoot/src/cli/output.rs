//! How results and progress are shown: stdout is data, stderr is for people.

use api::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::io::IsTerminal;
use std::time::Duration;

/// Prints a value as JSON.
pub(super) fn json(value: &impl Serialize) {
    println!("{}", serde_json::to_string_pretty(value).expect("wire types serialise"));
}

/// Prints rows under a heading, columns aligned.
pub(super) fn table(heading: &[&str], rows: &[Vec<String>]) {
    let mut widths: Vec<usize> = heading.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &[String]| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(c, &w)| format!("{c:<w$}")).collect();
        println!("{}", padded.join("  ").trim_end());
    };
    line(&heading.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>());
    rows.iter().for_each(|row| line(row));
}

/// Progress of a long operation: a bar on a terminal, a line at each new step elsewhere.
pub(super) struct Show {
    bar: Option<ProgressBar>,
    step: String,
}

impl Show {
    /// Nothing shown yet.
    pub(super) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { bar, step: String::new() }
    }

    /// Shows how far it is.
    pub(super) fn update(&mut self, progress: &Progress) {
        let new = progress.step != self.step;
        self.step.clone_from(&progress.step);
        let Some(bar) = &self.bar else {
            if new {
                eprintln!("{}", progress.step);
            }
            return;
        };
        if new {
            let bytes = progress.total > 1 << 20;
            let template = match (progress.total, bytes) {
                (0, _) => "{spinner} {msg} {elapsed}",
                (_, true) => "{msg} {wide_bar} {bytes}/{total_bytes} {eta}",
                (_, false) => "{msg} {wide_bar} {pos}/{len}",
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.set_message(progress.step.clone());
        }
        if progress.total > 0 {
            bar.set_length(progress.total);
            bar.set_position(progress.done);
        }
    }
}

impl Drop for Show {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
