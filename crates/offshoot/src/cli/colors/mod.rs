//! `offshoot colors` and `offshoot dedup`: what memory is for, as tables and as pictures.

mod paint;
mod picture;
mod svg;
mod terminal;
mod watch;

#[cfg(test)]
mod tests;

use super::{Outcome, output};
use api::{Client, Colors, DedupPart, DedupReport, DedupRequest, PageState};
use base::units::human;
use picture::Pages;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use terminal::Style;

/// What is asked.
#[derive(clap::Args)]
pub(super) struct ColorsArgs {
    /// A running VM, as in web, or a snapshot, as in web@1
    target: String,
    /// Write the map to this file, as SVG; - is the standard output
    #[arg(short, long, conflicts_with = "watch")]
    output: Option<PathBuf>,
    /// Go on showing it as it changes, until the VM ends or you press Ctrl-C
    #[arg(short, long, conflicts_with = "json")]
    watch: bool,
    /// Print JSON: runs of pages of one color, and of one state
    #[arg(long)]
    json: bool,
}

/// Lines of a map that is printed, whatever the terminal has: the table shall stay in sight.
const MAP_LINES: usize = 20;

/// Shows the memory of a VM or of a snapshot.
pub(super) fn colors(client: &Client, args: &ColorsArgs) -> Outcome {
    if args.watch {
        if args.target.contains('@') {
            return Err(format!("{} is a snapshot, which never changes; watch a VM", args.target).into());
        }
        return watch::watch(client, &args.target);
    }
    if let Some(file) = args.output.as_deref().filter(|file| *file != Path::new("-"))
        && file.extension().is_none_or(|extension| !extension.eq_ignore_ascii_case("svg"))
    {
        return Err(format!("{}: the map is written as SVG; name it so, as in map.svg", file.display()).into());
    }
    let colors: Colors = client.get(&path(&args.target))?;
    let pages = Pages::of(&colors)?;
    if let Some(file) = &args.output {
        write(file, &svg::draw(&colors, &pages))?;
    }
    if args.json {
        // In one line: runs are many, and are meant for programs.
        println!("{}", serde_json::to_string(&colors)?);
    } else if args.output.is_none() {
        show(&colors, &pages);
    }
    Ok(())
}

/// Where the daemon tells of a VM or a snapshot. What no name has in it is left to the daemon to refuse.
fn path(target: &str) -> String {
    match target.split_once('@') {
        Some((vm, tag)) => format!("/v1/snapshots/{vm}/{tag}/colors"),
        None => format!("/v1/vms/{target}/colors"),
    }
}

fn write(file: &Path, text: &str) -> Outcome {
    if file == Path::new("-") {
        return Ok(std::io::stdout().lock().write_all(text.as_bytes())?);
    }
    std::fs::write(file, text).map_err(|error| format!("cannot write {}: {error}", file.display()))?;
    println!("{}", file.display());
    Ok(())
}

fn show(colors: &Colors, pages: &Pages) {
    if std::io::stdout().is_terminal() {
        let (columns, lines) = size();
        let style = Style::of(|name| std::env::var(name).ok());
        let most = MAP_LINES.min(lines.saturating_sub(4)).max(4);
        terminal::map(colors, pages, style, (columns, most)).iter().for_each(|line| println!("{line}"));
        println!();
        terminal::legend(colors, style, columns).iter().for_each(|line| println!("{line}"));
        println!();
    }
    let (heading, rows) = table(colors);
    output::table(&heading, &rows);
    println!();
    account(colors).iter().for_each(|line| println!("{line}"));
}

/// Columns and lines of the terminal.
fn size() -> (usize, usize) {
    let found = rustix::termios::tcgetwinsize(std::io::stdout()).ok().filter(|size| size.ws_col > 0 && size.ws_row > 0);
    found.map_or((80, 24), |size| (usize::from(size.ws_col), usize::from(size.ws_row)))
}

/// One row for each color that there is, the most frequent first, and one for all.
fn table(colors: &Colors) -> (Vec<&'static str>, Vec<Vec<String>>) {
    let (states, heading): (&[PageState], &[&str]) = if colors.snapshot {
        (&[PageState::Stored], &["STORED"])
    } else {
        (
            &[PageState::Dirty, PageState::Local, PageState::Ready, PageState::Absent],
            &["DIRTY", "LOCAL", "READY", "ABSENT"],
        )
    };
    let row = |name: &str, pages: u64, by_state: &[u64; 5]| {
        let bytes = |pages: u64| human(pages * colors.page_bytes);
        let mut row = vec![name.to_owned(), pages.to_string(), bytes(pages), svg::percent(pages, colors.pages)];
        row.extend(states.iter().map(|state| bytes(by_state[*state as usize])));
        row
    };
    let mut found: Vec<_> = colors.legend.iter().filter(|color| color.pages > 0).collect();
    found.sort_by_key(|color| std::cmp::Reverse(color.pages));
    let mut all = [0; 5];
    found.iter().for_each(|color| all.iter_mut().zip(color.by_state).for_each(|(sum, count)| *sum += count));
    let mut rows: Vec<Vec<String>> =
        found.iter().map(|color| row(&color.color, color.pages, &color.by_state)).collect();
    rows.push(row("all", colors.pages, &all));
    ([["COLOR", "PAGES", "BYTES", "SHARE"].as_slice(), heading].concat(), rows)
}

fn kernel(colors: &Colors) -> String {
    colors.account.kernel.as_ref().map_or_else(|| "kernel not recognised".into(), |release| format!("Linux {release}"))
}

/// How the colors were found, in sentences.
fn account(colors: &Colors) -> Vec<String> {
    let account = &colors.account;
    let from = match account.source.as_str() {
        "memory" if account.age_ms < 1000 => format!("read just now, in {:.0} ms", account.took_ms),
        "memory" => format!("read {:.1} s ago", account.age_ms as f64 / 1e3),
        "kept" => "found when its snapshot was stored".into(),
        _ => "not known".into(),
    };
    let basis = match account.basis.as_str() {
        "descriptors" => {
            format!(
                "page descriptors and the tables of {} processes, {} read",
                account.roots,
                human(account.bytes_read)
            )
        }
        "page tables" => "one processor's page tables alone".into(),
        _ => "nothing could be told".into(),
    };
    let free = match &account.free_kept {
        None => "free pages may be dropped".into(),
        Some(why) => format!("free pages are kept: {why}"),
    };
    let mut out = vec![format!("{}; colors {from}, from {basis}; {free}", kernel(colors))];
    out.extend(account.notes.iter().map(|note| format!("note: {note}")));
    out
}

/// Shows what snapshots share.
pub(super) fn dedup(client: &Client, snapshots: &[String], json: bool) -> Outcome {
    let report: DedupReport = client.post("/v1/dedup", &DedupRequest { snapshots: snapshots.to_vec() })?;
    if json {
        output::json(&report);
        return Ok(());
    }
    let bytes = |pages: u64| human(pages * report.page_bytes);
    let row = |part: &DedupPart| {
        let stored = part.pages - part.zero;
        vec![
            part.name.clone(),
            bytes(part.pages),
            bytes(part.zero),
            bytes(stored),
            bytes(part.shared),
            bytes(part.repeated),
            svg::percent(part.either, stored),
        ]
    };
    let rest = ["MEMORY", "ZERO", "OTHER", "SHARED", "REPEATED", "LIKELY"];
    let mut rows: Vec<Vec<String>> = report.snapshots.iter().map(row).collect();
    rows.push(row(&report.all));
    output::table(&[["SNAPSHOT"].as_slice(), &rest].concat(), &rows);
    println!();
    output::table(&[["COLOR"].as_slice(), &rest].concat(), &report.colors.iter().map(row).collect::<Vec<_>>());
    println!();
    let stored = report.all.pages - report.all.zero;
    println!(
        "{} that are not zero have {} of different content: each stored once, {} less",
        bytes(stored),
        bytes(report.distinct),
        svg::percent(stored - report.distinct, stored)
    );
    report.notes.iter().for_each(|note| println!("note: {note}"));
    Ok(())
}
