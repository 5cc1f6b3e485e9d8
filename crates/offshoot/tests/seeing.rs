//! Guest memory seen from outside: the maps of a real guest and of its copies, at rest, at work and live; and that to
//! look changes nothing.

use crate::common;

use api::{Colors, DedupReport, DedupRequest, PageState, VmStats};
use bench::Outcome;
use common::{MINUTES, PageCache, TestHost, eventually, host, program, ready};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const MEMORY: u64 = 256 << 20;
const PAGES: u64 = MEMORY / 4096;
const MIB: u64 = 256; // pages

fn look(host: &TestHost, path: &str) -> Outcome<Colors> {
    let colors: Colors = host.client.get(path)?;
    assert_eq!(colors.pages, PAGES);
    for runs in [&colors.color_runs, &colors.state_runs] {
        assert_eq!(runs.iter().map(|(pages, _)| pages).sum::<u64>(), PAGES, "{path}");
        assert!(runs.windows(2).all(|pair| pair[0].1 != pair[1].1), "{path}: runs that could be one");
    }
    for color in &colors.legend {
        assert_eq!(color.by_state.iter().sum::<u64>(), color.pages, "{path}: {}", color.color);
    }
    assert_eq!(colors.legend.iter().map(|color| color.pages).sum::<u64>(), PAGES);
    Ok(colors)
}

fn of_state(colors: &Colors, state: PageState) -> u64 {
    colors.legend.iter().map(|color| color.by_state[state as usize]).sum()
}

fn of_color(colors: &Colors, name: &str) -> api::ColorCount {
    colors.legend.iter().find(|color| color.color == name).cloned().unwrap_or_else(|| panic!("no color {name}"))
}

/// Colors or states page by page.
fn unpacked(runs: &[(u64, u8)]) -> Vec<u8> {
    runs.iter().flat_map(|&(pages, number)| std::iter::repeat_n(number, pages as usize)).collect()
}

/// Reads of RAM that no VM made: what looking would have brought.
fn strangers(host: &TestHost) -> Outcome<u64> {
    let stats: api::NodeStats = host.client.get("/v1/stats")?;
    stats.mirror["others"]["ram_faults"].as_u64().ok_or_else(|| "the mirror counts faults".into())
}

fn stats(host: &TestHost, name: &str) -> Outcome<VmStats> {
    let stats: VmStats = host.client.get(&format!("/v1/vms/{name}/stats?by_color=true"))?;
    let (all, rows) = stats.by_color.split_last().ok_or("stats by color")?;
    let sum = |of: fn(&api::ColorUse) -> u64| rows.iter().map(of).sum::<u64>();
    assert_eq!((all.color.as_str(), all.private * 4096), ("all", stats.private_bytes));
    assert_eq!((sum(|r| r.resident), sum(|r| r.private)), (all.resident, all.private));
    assert_eq!(sum(|r| r.fetched), all.fetched);
    assert_eq!((sum(|r| r.ahead_used), sum(|r| r.ahead_wasted)), (all.ahead_used, all.ahead_wasted));
    assert!(stats.ahead.used_bytes + stats.ahead.wasted_bytes <= stats.ahead.fetched_bytes);
    Ok(stats)
}

#[test]
fn memory_is_seen_as_it_is_and_looking_fetches_nothing() {
    seen().unwrap_or_else(|error| panic!("{error}"));
}

fn seen() -> Outcome {
    let host = host("seeing");
    let guest = host.booted("web", MEMORY)?;
    let live = look(&host, "/v1/vms/web/colors")?;
    assert_eq!((live.account.source.as_str(), live.account.basis.as_str()), ("memory", "descriptors"));
    assert!(live.account.kernel.is_some() && live.account.roots > 5, "{:?}", live.account);
    for (color, least) in [("user data", 10 * MIB), ("kernel text", 2 * MIB), ("slab", 2 * MIB), ("user text", MIB)] {
        assert!(of_color(&live, color).pages >= least, "{color}: {:?}", of_color(&live, color));
    }
    // It was booted and shares with nobody; what it only read is the page of zeros.
    assert!(of_state(&live, PageState::Local) < 256, "{:?}", live.legend);

    host.command(&["snapshot", "web", "--tag", "1"])?;
    let kept = look(&host, "/v1/snapshots/web/1/colors")?;
    assert_eq!((kept.snapshot, kept.account.basis.as_str()), (true, "descriptors"), "{:?}", kept.account);
    assert!(of_color(&kept, "user data").by_state[PageState::Stored as usize] > 8 * MIB);
    assert!(of_state(&kept, PageState::Absent) > PAGES / 4, "zeros are not stored");

    host.command(&["rm", "--force", "web"])?;
    drop(guest);
    restored(&host, &kept)?;
    fetched_ahead(&host)?;
    files(&host)?;
    shared(&host)?;
    live_on_a_terminal(&host)
}

fn restored(host: &TestHost, kept: &Colors) -> Outcome {
    drop(PageCache::emptied("1")?);
    let guest = host.restore("copy", "web@1")?;
    let before = strangers(host)?;
    let cold = look(host, "/v1/vms/copy/colors")?;
    let here = of_state(&cold, PageState::Dirty) + of_state(&cold, PageState::Local);
    assert!(here * 10 < PAGES, "{here} of {PAGES} pages are here");
    assert_eq!((cold.account.source.as_str(), cold.account.basis.as_str()), ("memory", "descriptors"));
    // What it has not touched is what it was.
    let (then, now) = (unpacked(&kept.color_runs), unpacked(&cold.color_runs));
    let same = then.iter().zip(&now).filter(|(a, b)| a == b).count() as u64;
    assert!(same * 100 > PAGES * 95, "only {same} pages have the color that they had");

    // Every page of it, seen many times over: nobody but the guest fetched anything.
    for _ in 0..20 {
        look(host, "/v1/vms/copy/colors")?;
    }
    host.command(&["colors", "copy"])?;
    stats(host, "copy")?;
    assert_eq!(strangers(host)?, before, "to look at memory fetched some of it");

    ready(&guest)?;
    let idle = look(host, "/v1/vms/copy/colors")?;
    guest.load(64 << 20, "touched")?;
    let busy = look(host, "/v1/vms/copy/colors")?;
    let dirty = |colors: &Colors| of_color(colors, "user data").by_state[PageState::Dirty as usize];
    assert!(dirty(&busy) > dirty(&idle) + 60 * MIB, "{} dirty pages, {} before", dirty(&busy), dirty(&idle));
    let counted = stats(host, "copy")?;
    let row = counted.by_color.iter().find(|row| row.color == "user data").ok_or("a row for user data")?;
    assert!(row.private > 60 * MIB && counted.by_color.last().is_some_and(|all| all.fetched > 0), "{row:?}");
    // Where it wrote was free before, by the colors, and absent, by the states.
    let states = unpacked(&busy.state_runs);
    let changed =
        (0..PAGES as usize).filter(|&page| now[page] == ::guest::Color::Free as u8 && states[page] == 3).count();
    assert!(changed as u64 > 50 * MIB, "{changed} free pages became dirty");
    Ok(())
}

fn fetched_ahead(host: &TestHost) -> Outcome {
    let _cache = PageCache::emptied("1")?;
    let guest = host.restore_ahead("full", "web@1", Some("all"), None)?;
    ready(&guest)?;
    eventually("all is fetched ahead", || {
        let stats = stats(host, "full")?;
        Ok(stats.prefetch.is_some_and(|stream| stream["idle"] == true && stream["flying_bytes"] == 0))
    })?;
    let colors = look(host, "/v1/vms/full/colors")?;
    let stats = stats(host, "full")?;
    assert!(stats.ahead.used_bytes > 1 << 20 && stats.ahead.wasted_bytes > 8 << 20, "{:?}", stats.ahead);
    // What was brought and is not used is ready: in the host's memory, and nowhere in the VM's.
    let wasted = stats.ahead.wasted_bytes / 4096;
    let ready = of_state(&colors, PageState::Ready);
    assert!(ready.abs_diff(wasted) * 10 < wasted, "{ready} pages are ready, {wasted} were brought and not used");
    host.command(&["rm", "--force", "full"]).map(drop)
}

fn files(host: &TestHost) -> Outcome {
    let place = host.home.join("map.svg");
    let path = place.to_str().ok_or("UTF-8")?;
    for target in ["copy", "web@1"] {
        assert_eq!(host.command(&["colors", target, "-o", path])?.trim(), path);
        let svg = std::fs::read_to_string(&place)?;
        assert!(svg.len() < 1 << 20, "{} bytes", svg.len());
        let mut reader = quick_xml::Reader::from_str(&svg);
        let mut depth = 0;
        loop {
            match reader.read_event()? {
                quick_xml::events::Event::Start(_) => depth += 1,
                quick_xml::events::Event::End(_) => depth -= 1,
                quick_xml::events::Event::Eof => break,
                _ => {}
            }
        }
        assert_eq!(depth, 0);
        assert!(svg.contains(&format!(">{target}</text>")) && svg.contains(">user data</text>"));
    }
    let printed = host.command(&["colors", "copy", "-o", "-"])?;
    assert!(printed.starts_with("<svg ") && printed.trim_end().ends_with("</svg>"));
    let table = host.command(&["colors", "copy"])?;
    assert!(table.starts_with("COLOR") && table.contains("\nuser data ") && table.contains("Linux "), "{table}");
    let json: serde_json::Value = serde_json::from_str(&host.command(&["colors", "web@1", "--json"])?)?;
    assert_eq!(json["pages"], PAGES);
    let of_one = host.command(&["stats", "copy"])?;
    assert!(of_one.contains("AHEAD, WASTED") && of_one.contains("\nslab "), "{of_one}");
    for (words, why) in [
        (&["colors", "nobody"][..], "no VM is named nobody"),
        (&["colors", "web@9"], "no snapshot is named web@9"),
        (&["colors", "copy", "-o", "map.png"], "SVG"),
        (&["colors", "copy", "-o", "/nowhere/map.svg"], "/nowhere/map.svg"),
        (&["colors", "web@1", "--watch"], "never changes"),
        (&["colors", "nobody", "--watch"], "no VM is named nobody"),
        (&["dedup", "report", "web@1", "web@1"], "named twice"),
        (&["dedup", "report", "web@1", "copy@9"], "no snapshot is named copy@9"),
    ] {
        let said = host.command(words).unwrap_err().to_string();
        assert!(said.contains(why), "{words:?}: {said}");
    }
    Ok(())
}

fn shared(host: &TestHost) -> Outcome {
    host.command(&["snapshot", "copy", "--tag", "2"])?;
    let request = DedupRequest { snapshots: vec!["web@1".into(), "copy@2".into()] };
    let report: DedupReport = host.client.post("/v1/dedup", &request)?;
    let [first, second] = &report.snapshots[..] else { return Err("two snapshots".into()) };
    assert_eq!((first.pages, second.pages, report.all.pages), (PAGES, PAGES, 2 * PAGES));
    assert_eq!(report.colors.iter().map(|color| color.pages).sum::<u64>(), 2 * PAGES);
    assert_eq!(report.colors.iter().map(|color| color.either).sum::<u64>(), report.all.either);
    let stored = report.all.pages - report.all.zero;
    assert!(report.distinct < stored && report.distinct + report.all.either >= stored, "{report:?}");
    let color = |name: &str| report.colors.iter().find(|c| c.name == name).ok_or("a color that both have");
    let (text, data) = (color("kernel text")?.likelihood(), color("user data")?.likelihood());
    assert!(text > 0.9 && text > data, "{text} of the kernel's text and {data} of the data stand twice");
    let order: Vec<f64> = report.colors.iter().map(api::DedupPart::likelihood).collect();
    assert!(order.is_sorted_by(|a, b| a >= b), "{order:?}");
    let alone: DedupReport = host.client.post("/v1/dedup", &DedupRequest { snapshots: vec!["web@1".into()] })?;
    assert_eq!((alone.all.shared, alone.all.zero), (0, first.zero));
    let text = host.command(&["dedup", "report", "web@1", "copy@2"])?;
    assert!(text.contains("kernel text") && text.contains("different content"), "{text}");
    Ok(())
}

/// Without a terminal: lines, until the VM ends. On one: a screen that is left again.
fn live_on_a_terminal(host: &TestHost) -> Outcome {
    let home = host.home.to_str().ok_or("UTF-8")?;
    // A shell that stays would answer Ctrl-C itself, with a status of its own.
    let line = format!("exec {} --home {home} colors copy --watch", program().display());
    // Reading from it has no limit of its own.
    let mut script = Command::new("timeout")
        .args(["--foreground", "300", "script", "--quiet", "--return", "--command", &line, "/dev/null"])
        .env("TERM", "xterm-256color")
        .env("COLORTERM", "truecolor")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let (mut keys, mut screen) = (script.stdin.take().ok_or("stdin")?, script.stdout.take().ok_or("stdout")?);
    let mut shown = Vec::new();
    let mut buffer = [0; 65536];
    // Three pictures, then Ctrl-C.
    let pictures = |shown: &[u8]| shown.windows(8).filter(|w| *w == b"\x1b[?2026h").count();
    while pictures(&shown) < 3 {
        match screen.read(&mut buffer)? {
            0 => break,
            n => shown.extend_from_slice(&buffer[..n]),
        }
    }
    keys.write_all(&[3])?;
    keys.flush()?;
    screen.read_to_end(&mut shown)?;
    drop(keys);
    let status = ended(&mut script)?;
    let text = String::from_utf8_lossy(&shown);
    let tail = text.chars().skip(text.chars().count().saturating_sub(400)).collect::<String>();
    assert!(status.success() && pictures(&shown) >= 3, "{status}, {} pictures: ...{tail:?}", pictures(&shown));
    assert!(text.contains("\x1b[?1049h") && text.contains('▀') && text.contains("dirty"), "...{tail:?}");
    let left = text.rfind("\x1b[?25h\x1b[?1049l").ok_or("the screen is left")?;
    assert!(!text[left..].contains("\x1b[H"), "something was drawn afterwards");

    let mut watcher = Command::new("timeout")
        .args(["--foreground", "300"])
        .arg(program())
        .args(["--home", home, "colors", "copy", "--watch"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(watcher.stdout.take().ok_or("stdout")?).lines();
    for _ in 0..2 {
        let line = lines.next().ok_or("a line each second")??;
        assert!(line.contains("dirty ") && line.contains("faults ") && !line.contains('\x1b'), "{line}");
    }
    host.command(&["rm", "--force", "copy"])?;
    let status = ended(&mut watcher)?;
    let mut said = String::new();
    watcher.stderr.take().ok_or("stderr")?.read_to_string(&mut said)?;
    assert!(status.success() && said.contains("copy has ended"), "{status}: {said}");
    Ok(())
}

fn ended(child: &mut std::process::Child) -> Outcome<std::process::ExitStatus> {
    let end = Instant::now() + MINUTES;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() > end {
            child.kill()?;
            return Err("it does not end".into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
