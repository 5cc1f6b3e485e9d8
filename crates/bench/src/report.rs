//! Figures: what was asked, what was measured, and how to measure it again.

use crate::Outcome;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// Its name.
    pub figure: String,
    /// What was measured: the median of `runs`.
    pub value: f64,
    /// Its unit.
    pub unit: String,
    /// What was asked, where something was.
    pub bar: Option<f64>,
    /// How the value shall stand to the bar.
    pub op: Option<&'static str>,
    /// What it was compared with in the same run.
    pub peer: Option<String>,
    /// The peer's value.
    pub peer_value: Option<f64>,
    /// The repetitions.
    pub runs: Vec<f64>,
    /// The command that measures it.
    pub command: String,
}

impl Figure {
    /// A figure with the median of its repetitions.
    #[must_use]
    pub fn new(figure: &str, unit: &str, runs: Vec<f64>, command: &str) -> Self {
        Self {
            figure: figure.into(),
            value: median(&runs),
            unit: unit.into(),
            bar: None,
            op: None,
            peer: None,
            peer_value: None,
            runs,
            command: command.into(),
        }
    }

    /// What was asked: `op` is `<=` or `>=`.
    #[must_use]
    pub fn asked(mut self, op: &'static str, bar: f64) -> Self {
        (self.op, self.bar) = (Some(op), Some(bar));
        self
    }

    /// What it was compared with.
    #[must_use]
    pub fn against(mut self, peer: &str, value: f64) -> Self {
        (self.peer, self.peer_value) = (Some(peer.into()), Some(value));
        self
    }

    fn verdict(&self) -> &'static str {
        match (self.op, self.bar) {
            (Some("<="), Some(bar)) if self.value <= bar => "met",
            (Some(">="), Some(bar)) if self.value >= bar => "met",
            (Some(_), Some(_)) => "missed",
            _ => "",
        }
    }
}

/// The middle of the values; of an even number the mean of the two in the middle.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// Writes figures as JSON: all of them, or what was there stays. Figures of the file that were not measured now stay in
/// it: a benchmark may be run in parts. A short run's say so in their command.
///
/// # Errors
/// Where the file cannot be written.
pub fn save(path: &Path, figures: &[Figure]) -> Outcome {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let before: Vec<serde_json::Value> =
        std::fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
    let now: Vec<&str> = figures.iter().map(|f| f.figure.as_str()).collect();
    let mut all: Vec<serde_json::Value> =
        before.into_iter().filter(|f| f["figure"].as_str().is_some_and(|name| !now.contains(&name))).collect();
    let short = std::env::var("BENCH_QUICK").is_ok_and(|v| !v.is_empty() && v != "0");
    for figure in figures {
        let mut value = serde_json::to_value(figure)?;
        if short {
            value["command"] = format!("BENCH_QUICK=1 {}", figure.command).into();
        }
        all.push(value);
    }
    let new = path.with_extension("json.new");
    std::fs::write(&new, serde_json::to_vec_pretty(&all)?)?;
    std::fs::rename(new, path)?;
    Ok(())
}

/// Figures of a benchmark that is measured part by part.
#[derive(Debug)]
pub struct Parts {
    to: PathBuf,
    figures: Vec<Figure>,
    failed: Vec<&'static str>,
}

impl Parts {
    /// None measured yet; figures go to the file `to`. `only` names parts of those that are `known`.
    ///
    /// # Errors
    /// Where it names another.
    pub fn new(to: &Path, known: &[&str], only: &[String]) -> Outcome<Self> {
        if let Some(unknown) = only.iter().find(|name| !known.contains(&name.as_str())) {
            return Err(format!("there is no part `{unknown}`; give some of: {}", known.join(" ")).into());
        }
        Ok(Self { to: to.to_owned(), figures: Vec::new(), failed: Vec::new() })
    }

    /// Adds what was found for a part. What was measured lasts, whatever becomes of the parts that follow; where one
    /// fails, the others are worth having all the same.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn add(&mut self, name: &'static str, found: Outcome<Vec<Figure>>) -> Outcome {
        match found {
            Ok(found) => {
                self.figures.extend(found);
                save(&self.to, &self.figures)?;
            }
            Err(error) => {
                eprintln!("{name}: {error}");
                self.failed.push(name);
            }
        }
        Ok(())
    }

    /// Prints all as a table.
    ///
    /// # Errors
    /// Where a part could not be measured, or the file not be written.
    pub fn end(self) -> Outcome {
        write(&self.to, &self.figures)?;
        if self.failed.is_empty() { Ok(()) } else { Err(format!("not measured: {}", self.failed.join(", ")).into()) }
    }
}

/// Writes figures as JSON and prints them as a table.
///
/// # Errors
/// Where the file cannot be written.
pub fn write(path: &Path, figures: &[Figure]) -> Outcome {
    save(path, figures)?;
    println!(
        "{:<28} {:>12} {:<6} {:>10}  {:<7} {:>12} {:>12}  peer",
        "figure", "median", "unit", "asked", "", "least", "most"
    );
    for f in figures {
        let asked = match (f.op, f.bar) {
            (Some(op), Some(bar)) => format!("{op} {bar}"),
            _ => "-".into(),
        };
        let least = f.runs.iter().copied().fold(f64::INFINITY, f64::min);
        let most = f.runs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let peer = match (&f.peer, f.peer_value) {
            (Some(peer), Some(value)) => format!("{peer}: {value:.3}"),
            (Some(peer), None) => peer.clone(),
            _ => String::new(),
        };
        println!(
            "{:<28} {:>12.4} {:<6} {:>10}  {:<7} {:>12.4} {:>12.4}  {peer}",
            f.figure,
            f.value,
            f.unit,
            asked,
            f.verdict(),
            least,
            most
        );
    }
    println!("written to {}", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_part_that_fails_is_named_and_what_was_measured_lasts() {
        let to = std::env::temp_dir().join(format!("parts-{}.json", std::process::id()));
        let unknown = Parts::new(&to, &["one", "two"], &["three".to_owned()]).unwrap_err().to_string();
        assert!(unknown.contains("`three`") && unknown.contains("one two"), "{unknown}");
        let mut parts = Parts::new(&to, &["one", "two"], &["two".to_owned()]).unwrap();
        parts.add("one", Ok(vec![Figure::new("speed", "x", vec![2.0], "make")])).unwrap();
        parts.add("two", Err("no disk".into())).unwrap();
        let failed = parts.end().unwrap_err().to_string();
        let kept: Vec<serde_json::Value> = serde_json::from_slice(&std::fs::read(&to).unwrap()).unwrap();
        std::fs::remove_file(&to).unwrap();
        assert!(failed.contains("two") && !failed.contains("one"), "{failed}");
        assert_eq!((kept.len(), &kept[0]["figure"]), (1, &"speed".into()));
    }
}
