//! Commands that give disks to other programs.

use super::{ExportArgs, NbdCommand, Outcome, output};
use crate::export;
use api::{Client, NbdExport, NbdRequest, Progress};
use base::units::human;
use std::io::IsTerminal;
use std::path::Path;

pub(super) use crate::export::Format;

/// Does what an NBD command says.
pub(super) fn nbd(client: &Client, command: &NbdCommand) -> Outcome {
    match command {
        NbdCommand::Serve { source, writable, name, socket, prefetch, no_learn, json } => {
            let request = NbdRequest {
                source: source.clone(),
                name: name.clone(),
                writable: *writable,
                socket: socket.as_deref().map(absolute).transpose()?,
                ephemeral: false,
                prefetch: prefetch.clone(),
                learn: no_learn.then_some(false),
            };
            let served: NbdExport = client.post("/v1/nbd", &request)?;
            if *json {
                output::json(&served);
            } else {
                println!("{}\n{}", served.socket.unwrap_or_default(), served.uri.unwrap_or_default());
            }
            Ok(())
        }
        NbdCommand::Ls(args) => {
            let exports: Vec<NbdExport> = client.get("/v1/nbd")?;
            if args.json {
                output::json(&exports);
                return Ok(());
            }
            let row = |e: &NbdExport| {
                let mode = if e.writable { "scratch" } else { "read-only" };
                vec![
                    e.name.clone(),
                    e.source.clone(),
                    mode.to_owned(),
                    e.state.to_string(),
                    human(e.size_bytes),
                    e.connections.to_string(),
                    e.uri.clone().unwrap_or_else(|| "-".into()),
                ]
            };
            let heading = ["NAME", "SOURCE", "MODE", "STATE", "SIZE", "CLIENTS", "URI"];
            output::table(&heading, &exports.iter().map(row).collect::<Vec<_>>());
            Ok(())
        }
        NbdCommand::Stop { names, discard } => {
            for name in names {
                client.delete::<serde_json::Value>(&format!("/v1/nbd/{name}?discard={discard}"))?;
                println!("{name}");
            }
            Ok(())
        }
    }
}

/// Writes a disk to a file.
pub(super) fn export(client: &Client, args: &ExportArgs) -> Outcome {
    let stream = args.file.as_os_str() == "-";
    if stream && args.format != Format::Raw {
        return Err("only raw disks can be written to the standard output; name a file for qcow2".into());
    }
    if stream && std::io::stdout().is_terminal() {
        return Err("the standard output is a terminal; send it to a file or a program".into());
    }
    let request = NbdRequest {
        source: args.source.clone(),
        name: None,
        writable: false,
        socket: None,
        ephemeral: true,
        prefetch: None,
        learn: None,
    };
    let served: NbdExport = client.post("/v1/nbd", &request)?;
    let socket = served.socket.unwrap_or_default();
    let mut show = output::Show::new();
    let step = if stream { "writing".to_owned() } else { format!("writing {}", args.file.display()) };
    let mut progress = |done, total| show.update(&Progress { step: step.clone(), done, total });
    let done = if stream {
        export::to_stream(Path::new(&socket), &mut std::io::stdout().lock(), &mut progress)
    } else {
        export::to_file(Path::new(&socket), &args.file, args.format, args.force, &mut progress)
    };
    drop(show);
    // It ends by itself as well, but a moment later.
    let _ = client.delete::<serde_json::Value>(&format!("/v1/nbd/{}", served.name));
    done.map_err(|why| format!("exporting {}: {why}", args.source))?;
    if !stream {
        println!("{}", args.file.display());
    }
    Ok(())
}

/// The daemon has a directory of its own: paths go to it absolute.
fn absolute(path: &Path) -> Result<String, Box<dyn std::error::Error>> {
    let path = std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()))?;
    path.into_os_string().into_string().map_err(|p| format!("{} is not UTF-8", p.to_string_lossy()).into())
}
