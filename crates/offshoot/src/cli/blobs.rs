//! Commands of blobs.

use super::{BlobCommand, Outcome, output};
use api::{
    Blob, BlobChanged, BlobClone, BlobCreate, BlobDiff, BlobFile, BlobFileChange, BlobFileOpen, BlobResize,
    BlobSnapshot, BlobSnapshotRequest, BlobTag, BlobVersion, Client, Progress, path_segment,
};
use base::units::human;
use serde_json::Value;
use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// Does what a blob command says.
pub(super) fn blob(client: &Client, command: &BlobCommand) -> Outcome {
    match command {
        BlobCommand::Create { name, size, block, json } => {
            let request = BlobCreate { name: name.clone(), size_bytes: *size, block_bytes: block.map(|b| b as u32) };
            let made: Blob = client.post("/v1/blobs", &request)?;
            said(&made, &made.name, *json)
        }
        BlobCommand::Ls(args) => list(client, args.json),
        BlobCommand::Info { name } => {
            output::json(&client.get::<Blob>(&at(name, ""))?);
            Ok(())
        }
        BlobCommand::Read { version, offset, length, output } => {
            read(client, version, *offset, *length, output.as_deref())
        }
        BlobCommand::Write { name, offset, file } => {
            changed(&upload(client, "PUT", &format!("{}?offset={offset}", at(name, "/data")), file.as_deref())?, name)
        }
        BlobCommand::Append { name, file } => {
            changed(&upload(client, "POST", &at(name, "/append"), file.as_deref())?, name)
        }
        BlobCommand::Zero { name, offset, length } => {
            changed(&client.delete(&format!("{}?offset={offset}&length={length}", at(name, "/data")))?, name)
        }
        BlobCommand::Resize { name, size } => {
            changed(&client.post(&at(name, "/resize"), &BlobResize { size_bytes: *size })?, name)
        }
        BlobCommand::Log { name, last, json } => log(client, name, *last, *json),
        BlobCommand::Diff { name, from, to, json } => diff(client, name, from, to, *json),
        BlobCommand::Open { version, json } => {
            let request = BlobFileOpen { version: version.clone() };
            let file: BlobFile = client.post("/v1/blob-files/open", &request)?;
            said(&file, &file.path, *json)
        }
        BlobCommand::Files(list) => files(client, list.json),
        BlobCommand::Commit { file } => {
            let done: BlobFile = client.post("/v1/blob-files/commit", &file_change(client, file, None)?)?;
            println!("{}@{}", done.blob, done.number);
            Ok(())
        }
        BlobCommand::Discard { file } => {
            client.post::<Value>("/v1/blob-files/discard", &file_change(client, file, None)?).map(drop)?;
            Ok(())
        }
        BlobCommand::Clone { version, names } if version.starts_with('/') => {
            let [name] = names.as_slice() else {
                return Err("a file of the tree becomes one clone: give one name".into());
            };
            let done: BlobFile = client.post("/v1/blob-files/clone", &file_change(client, version, Some(name))?)?;
            println!("{}", done.blob);
            Ok(())
        }
        BlobCommand::Clone { version, names } => {
            let (blob, version) = split(client, version)?;
            let made: Vec<Blob> = client.post(&at(&blob, "/clone"), &BlobClone { version, names: names.clone() })?;
            made.iter().for_each(|blob| println!("{}", blob.name));
            Ok(())
        }
        BlobCommand::Tag { name, tag, number, remove } => {
            let path = at(name, &format!("/tags/{}", path_segment(tag)));
            let done: BlobChanged = match remove {
                true => client.delete(&path)?,
                false => client.put(&path, &BlobTag { number: *number })?,
            };
            changed(&done, name)
        }
        BlobCommand::Rm { names } => {
            for name in names {
                match split(client, name)? {
                    (blob, None) => client.delete::<Value>(&at(&blob, ""))?,
                    (blob, Some(version)) => {
                        let number: u64 = version.parse().map_err(|_| {
                            format!("{name}: give the number of the version; a tag goes with `tag --remove`")
                        })?;
                        client.delete::<Value>(&at(&blob, &format!("/versions/{number}")))?
                    }
                };
                println!("{name}");
            }
            Ok(())
        }
        BlobCommand::Snapshot { name, blobs } => {
            let request = BlobSnapshotRequest { name: name.clone(), blobs: blobs.clone() };
            let made: BlobSnapshot = client.post("/v1/blob-snapshots", &request)?;
            made.versions.iter().for_each(|(blob, number)| println!("{blob}@{number}"));
            Ok(())
        }
        BlobCommand::Snapshots { json, remove } => snapshots(client, *json, remove),
    }
}

/// The file that a path in the tree of blobs is, or `NAME@NUMBER`, `NAME@TAG` or `NAME`.
fn file_change(client: &Client, text: &str, name: Option<&str>) -> Result<BlobFileChange, Box<dyn std::error::Error>> {
    let mut version = text.to_owned();
    if text.starts_with('/') {
        let parts: Vec<&str> = text.rsplitn(3, '/').collect();
        let [number, blob, _] = parts.as_slice() else { return Err(format!("{text} is no file of a blob").into()) };
        let blob = blob.replace("%2F", "/");
        version = if *number == "latest" { blob } else { format!("{blob}@{number}") };
    }
    let found: BlobFile = client.post("/v1/blob-files/open", &BlobFileOpen { version })?;
    Ok(BlobFileChange { blob: found.blob, number: found.number, name: name.map(str::to_owned) })
}

fn files(client: &Client, json: bool) -> Outcome {
    let files: Vec<BlobFile> = client.get("/v1/blob-files")?;
    if json {
        output::json(&files);
        return Ok(());
    }
    let row = |f: &BlobFile| {
        vec![format!("{}@{}", f.blob, f.number), human(f.changed_bytes), f.opened.to_string(), f.path.clone()]
    };
    output::table(&["VERSION", "CHANGED", "OPEN", "PATH"], &files.iter().map(row).collect::<Vec<_>>());
    Ok(())
}

/// The path of a blob, or of something of it.
fn at(name: &str, what: &str) -> String {
    format!("/v1/blobs/{}{what}", path_segment(name))
}

fn said(value: &impl serde::Serialize, name: &str, json: bool) -> Outcome {
    if json {
        output::json(value)
    } else {
        println!("{name}")
    }
    Ok(())
}

fn changed(done: &BlobChanged, name: &str) -> Outcome {
    println!("{name}@{}", done.number);
    Ok(())
}

/// Name and version out of `NAME`, `NAME@NUMBER` or `NAME@TAG`; a blob whose whole name that is comes first.
fn split(client: &Client, text: &str) -> Result<(String, Option<String>), Box<dyn std::error::Error>> {
    match text.rsplit_once('@') {
        Some((name, version)) if client.get::<Blob>(&at(text, "")).is_err() => {
            Ok((name.to_owned(), Some(version.to_owned())))
        }
        _ => Ok((text.to_owned(), None)),
    }
}

fn list(client: &Client, json: bool) -> Outcome {
    let blobs: Vec<Blob> = client.get("/v1/blobs")?;
    if json {
        output::json(&blobs);
        return Ok(());
    }
    let row = |b: &Blob| {
        let tags: Vec<String> = b.tags.iter().map(|(tag, number)| format!("{tag}={number}")).collect();
        let or_dash = |text: String| if text.is_empty() { "-".into() } else { text };
        vec![
            b.name.clone(),
            b.latest.to_string(),
            human(b.size_bytes),
            human(u64::from(b.block_bytes)),
            or_dash(b.origin.clone().unwrap_or_default()),
            or_dash(tags.join(" ")),
            b.created.clone(),
        ]
    };
    let heading = ["NAME", "LATEST", "SIZE", "BLOCK", "CLONE OF", "TAGS", "CREATED"];
    output::table(&heading, &blobs.iter().map(row).collect::<Vec<_>>());
    Ok(())
}

fn log(client: &Client, name: &str, last: u64, json: bool) -> Outcome {
    let blob: Blob = client.get(&at(name, ""))?;
    let from = (blob.latest + 1).saturating_sub(last);
    let mut versions: Vec<BlobVersion> = client.get(&format!("{}?from={from}", at(name, "/log")))?;
    versions.reverse();
    if json {
        output::json(&versions);
        return Ok(());
    }
    let row = |v: &BlobVersion| {
        let change = if v.deleted { format!("{} (deleted)", v.change) } else { v.change.clone() };
        vec![v.number.to_string(), v.time.clone(), change, human(v.bytes), human(v.size_bytes), v.parent.to_string()]
    };
    let heading = ["VERSION", "TIME", "CHANGE", "BYTES", "SIZE", "MADE FROM"];
    output::table(&heading, &versions.iter().map(row).collect::<Vec<_>>());
    Ok(())
}

fn diff(client: &Client, name: &str, from: &str, to: &str, json: bool) -> Outcome {
    let query = format!("?from={}&to={}", path_segment(from), path_segment(to));
    let found: BlobDiff = client.get(&format!("{}{query}", at(name, "/diff")))?;
    if json {
        output::json(&found);
        return Ok(());
    }
    found.ranges.iter().for_each(|(start, end)| println!("{start:#014x} {:>12}", end - start));
    eprintln!("{} in {} ranges differ", human(found.bytes), found.ranges.len());
    Ok(())
}

fn snapshots(client: &Client, json: bool, remove: &[String]) -> Outcome {
    for name in remove {
        client.delete::<Value>(&format!("/v1/blob-snapshots/{}", path_segment(name)))?;
        println!("{name}");
    }
    if !remove.is_empty() {
        return Ok(());
    }
    let found: Vec<BlobSnapshot> = client.get("/v1/blob-snapshots")?;
    if json {
        output::json(&found);
        return Ok(());
    }
    let row = |s: &BlobSnapshot| {
        let versions: Vec<String> = s.versions.iter().map(|(blob, number)| format!("{blob}@{number}")).collect();
        vec![s.name.clone(), versions.join(" ")]
    };
    output::table(&["NAME", "VERSIONS"], &found.iter().map(row).collect::<Vec<_>>());
    Ok(())
}

fn read(client: &Client, version: &str, offset: u64, length: Option<u64>, to: Option<&Path>) -> Outcome {
    let (blob, version) = split(client, version)?;
    let mut path = format!("{}?offset={offset}", at(&blob, "/data"));
    if let Some(version) = version {
        path += &format!("&version={}", path_segment(&version));
    }
    if let Some(length) = length {
        path += &format!("&length={length}");
    }
    let mut show = output::Show::new();
    let mut progress = |done| show.update(&Progress { step: format!("reading {blob}"), done, total: 0 });
    match to {
        Some(file) => {
            // A name of its own until it is whole.
            let part = file.with_extension("part");
            let mut out = File::create(&part).map_err(|e| format!("{}: {e}", part.display()))?;
            let done = client
                .download(&path, &mut out, &mut progress)
                .map_err(Box::<dyn std::error::Error>::from)
                .and_then(|_| Ok(out.sync_all().and_then(|()| std::fs::rename(&part, file))?));
            if done.is_err() {
                let _ = std::fs::remove_file(&part);
            }
            done
        }
        None if std::io::stdout().is_terminal() => {
            Err("the standard output is a terminal; send it to a file or a program, or give --output".into())
        }
        None => {
            let mut out = std::io::stdout().lock();
            client.download(&path, &mut out, &mut |_| {})?;
            Ok(out.flush()?)
        }
    }
}

/// Sends a file, or the standard input.
fn upload(
    client: &Client,
    method: &str,
    path: &str,
    from: Option<&Path>,
) -> Result<BlobChanged, Box<dyn std::error::Error>> {
    let (source, total): (Box<dyn Read + Send>, u64) = match from {
        Some(file) if file.as_os_str() != "-" => {
            let opened = File::open(file).map_err(|e| format!("{}: {e}", file.display()))?;
            let total = opened.metadata().map_or(0, |m| m.len());
            (Box::new(opened), total)
        }
        _ => (Box::new(std::io::stdin()), 0),
    };
    // Elsewhere than on a terminal a line that says no more than that bytes are sent is of no use.
    let show = Arc::new(Mutex::new(std::io::stderr().is_terminal().then(output::Show::new)));
    let shown = show.clone();
    let progress = move |done| {
        if let Some(show) = &mut *shown.lock().expect("no panic while showing") {
            show.update(&Progress { step: "sending".into(), done, total });
        }
    };
    let done = client.upload(method, path, source, progress);
    drop(show);
    Ok(done?)
}
