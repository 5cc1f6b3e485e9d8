//! Commands about VMs and their snapshots.

use super::{ForkArgs, Outcome, RunArgs, output};
use api::{
    BalloonRequest, Client, ClientError, ColorUse, Ended, FetchCost, ForkReply, ForkRequest, From, RunRequest,
    Snapshot, SnapshotArranged, SnapshotRequest, StopRequest, Vm, VmState, VmStats,
};
use base::units::human;
use std::io::{Read, Write};

/// Starts a VM.
pub(super) fn run(client: &Client, args: &RunArgs) -> Outcome {
    let from = match (&args.image, &args.from) {
        (_, Some(snapshot)) => From::Snapshot(snapshot.clone()),
        (Some(image), None) => From::Image(image.clone()),
        (None, None) => unreachable!("clap asks for one"),
    };
    let request = RunRequest {
        name: args.name.clone(),
        from,
        memory_bytes: args.memory,
        cpus: args.cpus,
        publish: args.publish.clone(),
        accelerator: args.accelerator.clone(),
        append: args.append.clone(),
        prefetch: args.prefetch.clone(),
        eager: args.eager,
        learn: args.no_learn.then_some(false),
    };
    let vm: Vm = client.post("/v1/vms", &request)?;
    if args.json {
        output::json(&vm);
    } else {
        println!("{}", vm.name);
    }
    Ok(())
}

/// Forks a VM.
pub(super) fn fork(client: &Client, args: &ForkArgs) -> Outcome {
    let request =
        ForkRequest { count: args.count, name_prefix: args.name_prefix.clone(), publish_base: args.publish_base };
    let mut show = output::Show::new();
    let reply: ForkReply = client.post_long(&format!("/v1/vms/{}/fork", args.name), &request, |p| show.update(p))?;
    drop(show);
    if args.json {
        output::json(&reply);
    } else {
        eprintln!("{} stood still for {:.1} ms; {} had changed", args.name, reply.pause_ms, human(reply.changed_bytes));
        let rows: Vec<Vec<String>> = reply
            .offshoots
            .iter()
            .map(|o| vec![o.name.clone(), format!("{:.0} ms", o.running_ms), o.publish.join(" ")])
            .collect();
        output::table(&["NAME", "RUNNING AFTER", "PUBLISHED"], &rows);
    }
    match &reply.failed[..] {
        [] => Ok(()),
        failed => {
            Err(failed.iter().map(|f| format!("{}: {}", f.name, f.error.message)).collect::<Vec<_>>().join("\n").into())
        }
    }
}

/// Takes a snapshot.
pub(super) fn snapshot(client: &Client, name: &str, tag: Option<&str>, json: bool) -> Outcome {
    let mut show = output::Show::new();
    let request = SnapshotRequest { tag: tag.map(str::to_owned) };
    let snapshot: Snapshot = client.post_long(&format!("/v1/vms/{name}/snapshot"), &request, |p| show.update(p))?;
    drop(show);
    if json {
        output::json(&snapshot);
    } else {
        println!("{}", snapshot.name);
    }
    Ok(())
}

/// Lists snapshots.
pub(super) fn snapshots(client: &Client, json: bool) -> Outcome {
    let list: Vec<Snapshot> = client.get("/v1/snapshots")?;
    if json {
        output::json(&list);
        return Ok(());
    }
    let row = |s: &Snapshot| {
        vec![
            s.name.clone(),
            human(s.memory_bytes),
            human(s.disk_bytes),
            human(s.stored_bytes),
            format!("{:.1} ms", s.pause_ms),
            s.created.clone(),
        ]
    };
    output::table(
        &["NAME", "MEMORY", "DISKS", "STORED", "PAUSE", "CREATED"],
        &list.iter().map(row).collect::<Vec<_>>(),
    );
    Ok(())
}

/// Lays a snapshot down in order.
pub(super) fn arrange_snapshot(client: &Client, name: &str, json: bool) -> Outcome {
    arrange(client, &format!("/v1/snapshots/{name}/arrange"), "pages that offshoots touch", json)
}

/// Lays something down in the order of what is touched of it.
pub(super) fn arrange(client: &Client, path: &str, what: &str, json: bool) -> Outcome {
    let mut show = output::Show::new();
    let nothing = serde_json::json!({});
    let done: SnapshotArranged = client.post_long(path, &nothing, |p| show.update(p))?;
    drop(show);
    if json {
        output::json(&done);
        return Ok(());
    }
    println!("{}", done.name);
    let cost = |c: &FetchCost| format!("{} in {} requests", human(c.fetched_bytes), c.requests);
    eprintln!("{}: {} {what}, {} moved, {} written", done.name, done.pages, done.moved, human(done.written_bytes));
    eprintln!("fetching them from afar takes {}; it took {}", cost(&done.after), cost(&done.before));
    Ok(())
}

/// Removes snapshots.
pub(super) fn remove_snapshots(client: &Client, names: &[String]) -> Outcome {
    for name in names {
        client.delete::<serde_json::Value>(&format!("/v1/snapshots/{name}"))?;
        println!("{name}");
    }
    Ok(())
}

/// Lists VMs.
pub(super) fn ps(client: &Client, json: bool) -> Outcome {
    let vms: Vec<Vm> = client.get("/v1/vms")?;
    if json {
        output::json(&vms);
        return Ok(());
    }
    let row = |v: &Vm| {
        let state = match &v.detail {
            Some(detail) => format!("{} ({})", v.state, shorten(detail)),
            None => v.state.to_string(),
        };
        let parent = v.parent.clone().unwrap_or_else(|| v.image.clone());
        vec![
            v.name.clone(),
            state,
            parent,
            v.generation.to_string(),
            human(v.memory_bytes),
            v.publish.join(" "),
            v.created.clone(),
        ]
    };
    let rows: Vec<Vec<String>> = vms.iter().map(row).collect();
    output::table(&["NAME", "STATE", "FROM", "GEN", "MEMORY", "PUBLISHED", "CREATED"], &rows);
    Ok(())
}

fn shorten(text: &str) -> String {
    let mut short: String = text.chars().take(60).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// Shows a VM.
pub(super) fn inspect(client: &Client, name: &str) -> Outcome {
    output::json(&client.get::<serde_json::Value>(&format!("/v1/vms/{name}"))?);
    Ok(())
}

/// Shows counters of VMs.
pub(super) fn stats(client: &Client, names: &[String], json: bool) -> Outcome {
    let names: Vec<String> = if names.is_empty() {
        let running = |v: &Vm| v.state == VmState::Running;
        client.get::<Vec<Vm>>("/v1/vms")?.into_iter().filter(running).map(|v| v.name).collect()
    } else {
        names.to_vec()
    };
    let by_color = json || names.len() == 1;
    let ask = |name: &String| client.get(&format!("/v1/vms/{name}/stats?by_color={by_color}"));
    let all: Vec<VmStats> = names.iter().map(ask).collect::<Result<_, _>>()?;
    if json {
        output::json(&all);
        return Ok(());
    }
    let row = |s: &VmStats| {
        let counter = |name: &str| s.mirror[name].as_u64().unwrap_or(0);
        vec![
            s.name.clone(),
            human(s.private_bytes),
            human(s.shared_bytes),
            counter("ram_faults").to_string(),
            human(counter("ram_fetched_bytes")),
            human(s.ahead.fetched_bytes),
            human(s.ahead.wasted_bytes),
            human(counter("disk_read_bytes")),
            human(counter("disk_written_bytes")),
            format!("{:.1} s", s.cpu_s),
        ]
    };
    let heading =
        ["NAME", "PRIVATE", "SHARED", "FAULTS", "FETCHED", "AHEAD", "WASTED", "DISK READ", "DISK WRITTEN", "CPU"];
    output::table(&heading, &all.iter().map(row).collect::<Vec<_>>());
    if let [one] = &all[..] {
        println!();
        uses(&one.by_color);
    }
    Ok(())
}

/// What a VM has and was brought, by color.
fn uses(rows: &[ColorUse]) {
    let row = |of: &ColorUse| {
        let pages = [of.resident, of.private, of.fetched, of.ahead_used, of.ahead_wasted];
        let bytes = pages.map(|pages| human(pages * base::PAGE));
        [vec![of.color.clone()], bytes.to_vec()].concat()
    };
    let any = |of: &&ColorUse| of.color == "all" || of.resident + of.fetched + of.ahead_used + of.ahead_wasted > 0;
    let heading = ["COLOR", "RESIDENT", "PRIVATE", "FETCHED", "AHEAD, USED", "AHEAD, WASTED"];
    output::table(&heading, &rows.iter().filter(any).map(row).collect::<Vec<_>>());
}

/// Prints a log.
pub(super) fn logs(client: &Client, name: &str, follow: bool, hypervisor: bool) -> Outcome {
    let which = if hypervisor { "hypervisor" } else { "console" };
    let mut out = std::io::stdout().lock();
    let printed = client.get_lines(&format!("/v1/vms/{name}/logs?which={which}&follow={follow}"), |line| {
        let written = out.write_all(line).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush());
        written.map_err(|e| ClientError::Broken { request: "logs".into(), reason: e.to_string() })
    });
    Ok(printed?)
}

/// Connects the terminal to a VM's console.
pub(super) fn console(client: &Client, name: &str) -> Outcome {
    const LEAVE: u8 = 0x1d; // Ctrl-]
    let api::Upgraded { early, stream } = client.upgrade(&format!("/v1/vms/{name}/console"))?;
    eprintln!("connected to the console of {name}; Ctrl-] leaves it");
    let raw = RawTerminal::enter();
    let mut from_guest = stream.try_clone()?;
    let printing = std::thread::spawn(move || {
        let mut out = std::io::stdout();
        let mut print = |bytes: &[u8]| out.write_all(bytes).and_then(|()| out.flush()).is_ok();
        let mut going = print(&early);
        let mut buffer = [0; 4096];
        while going && let Ok(n @ 1..) = from_guest.read(&mut buffer) {
            going = print(&buffer[..n]);
        }
    });
    let mut to_guest = &stream;
    let mut buffer = [0; 512];
    while let Ok(n @ 1..) = std::io::stdin().read(&mut buffer) {
        let typed = &buffer[..n];
        let end = typed.iter().position(|&b| b == LEAVE);
        if to_guest.write_all(&typed[..end.unwrap_or(n)]).is_err() || end.is_some() {
            break;
        }
    }
    let _ = stream.shutdown(std::net::Shutdown::Both);
    let _ = printing.join();
    drop(raw);
    eprintln!();
    Ok(())
}

/// A terminal that passes every key on; as it was before when dropped.
struct RawTerminal(Option<rustix::termios::Termios>);

impl RawTerminal {
    fn enter() -> Self {
        let Ok(before) = rustix::termios::tcgetattr(std::io::stdin()) else { return Self(None) };
        let mut raw = before.clone();
        raw.make_raw();
        let _ = rustix::termios::tcsetattr(std::io::stdin(), rustix::termios::OptionalActions::Now, &raw);
        Self(Some(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = rustix::termios::tcsetattr(std::io::stdin(), rustix::termios::OptionalActions::Now, before);
        }
    }
}

/// Powers VMs down.
pub(super) fn stop(client: &Client, names: &[String], grace_s: u64) -> Outcome {
    for name in names {
        client.post::<serde_json::Value>(&format!("/v1/vms/{name}/stop"), &StopRequest { grace_s })?;
        println!("{name}");
    }
    Ok(())
}

/// Removes VMs.
pub(super) fn rm(client: &Client, names: &[String], force: bool, all: bool) -> Outcome {
    let names =
        if all { client.get::<Vec<Vm>>("/v1/vms")?.into_iter().map(|v| v.name).collect() } else { names.to_vec() };
    for name in names {
        client.delete::<serde_json::Value>(&format!("/v1/vms/{name}?force={force}"))?;
        println!("{name}");
    }
    Ok(())
}

/// Waits for the end of VMs.
pub(super) fn wait(client: &Client, names: &[String]) -> Outcome {
    for name in names {
        let ended: Ended = client.get(&format!("/v1/vms/{name}/wait"))?;
        println!("{}: {}", ended.name, ended.detail);
    }
    Ok(())
}

/// Sets a balloon.
pub(super) fn balloon(client: &Client, name: &str, bytes: u64) -> Outcome {
    client.post::<serde_json::Value>(&format!("/v1/vms/{name}/balloon"), &BalloonRequest { bytes })?;
    Ok(())
}
