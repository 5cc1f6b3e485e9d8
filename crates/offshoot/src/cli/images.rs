//! Commands about images.

use super::{ImageCommand, Outcome, output};
use api::{BuildRequest, Client, Image, ImportRequest};
use base::units::human;
use std::path::Path;

/// Does what an image command says.
pub(super) fn image(client: &Client, command: &ImageCommand) -> Outcome {
    match command {
        ImageCommand::Build { name, force, json } => {
            made(client, "/v1/images/build", &BuildRequest { name: name.clone(), force: *force }, *json)
        }
        ImageCommand::Import { path, name, kernel, initrd, cmdline, size, json } => {
            let request = ImportRequest {
                path: absolute(path)?,
                name: name.clone(),
                kernel: kernel.as_deref().map(absolute).transpose()?,
                initrd: initrd.as_deref().map(absolute).transpose()?,
                cmdline: cmdline.clone(),
                size: *size,
            };
            made(client, "/v1/images/import", &request, *json)
        }
        ImageCommand::Ls(args) => {
            let images: Vec<Image> = client.get("/v1/images")?;
            if args.json {
                output::json(&images);
                return Ok(());
            }
            let row = |i: &Image| {
                let kernel = i.kernel.clone().unwrap_or_else(|| "-".into());
                vec![i.name.clone(), human(i.disk_bytes), human(i.stored_bytes), kernel, i.created.clone()]
            };
            output::table(
                &["NAME", "DISK", "STORED", "KERNEL", "CREATED"],
                &images.iter().map(row).collect::<Vec<_>>(),
            );
            Ok(())
        }
        ImageCommand::Inspect { name } => {
            let image: serde_json::Value = client.get(&format!("/v1/images/{name}"))?;
            output::json(&image);
            Ok(())
        }
        ImageCommand::Arrange { name, json } => {
            super::vms::arrange(client, &format!("/v1/images/{name}/arrange"), "blocks that are read", *json)
        }
        ImageCommand::Rm { names } => {
            for name in names {
                client.delete::<serde_json::Value>(&format!("/v1/images/{name}"))?;
                println!("{name}");
            }
            Ok(())
        }
    }
}

fn made(client: &Client, path: &str, request: &impl serde::Serialize, json: bool) -> Outcome {
    let mut show = output::Show::new();
    let image: Image = client.post_long(path, request, |p| show.update(p))?;
    drop(show);
    if json {
        output::json(&image);
    } else {
        println!("{}", image.name);
    }
    Ok(())
}

/// The daemon has a directory of its own: paths go to it absolute.
fn absolute(path: &Path) -> Result<String, Box<dyn std::error::Error>> {
    let path = path.canonicalize().map_err(|e| format!("{}: {e}", path.display()))?;
    path.into_os_string().into_string().map_err(|p| format!("{} is not UTF-8", p.to_string_lossy()).into())
}
