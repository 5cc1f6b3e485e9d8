//! The origin: one S3 server, SeaweedFS, and what is published on it: the image as Offshoot keeps it, and as files
//! that are copied whole; and, for the third system, the same image served by `qemu-nbd`.

use super::net::{Network, Place};
use super::trace::Guest;
use crate::Outcome;
use crate::stores::{images, origin};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) const KEY_ID: &str = "OFFSHOOTBENCHKEY";
pub(crate) const SECRET: &str = "the-secret-of-the-benchmarks-0123456789";
pub(crate) const BUCKET: &str = "offshoot";
pub(crate) const S3_PORT: u16 = 8333;
const NBD_PORT: u16 = 10809;
/// Name of the image, and of every export.
pub(super) const IMAGE: &str = "disk";

/// The origin's servers; they end when dropped.
pub(super) struct Server {
    weed: Child,
    nbd: Child,
}

impl Drop for Server {
    fn drop(&mut self) {
        for child in [&mut self.weed, &mut self.nbd] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Makes a command know the store that all nodes share.
pub(super) fn shared_store(command: &mut Command) -> &mut Command {
    let url = format!("s3://{BUCKET}/fleet?endpoint=http://{}:{S3_PORT}", Place::Origin.address());
    command.env("OFFSHOOT_STORE", url).env("OFFSHOOT_CACHE_SIZE", "4G");
    command.env("AWS_ACCESS_KEY_ID", KEY_ID).env("AWS_SECRET_ACCESS_KEY", SECRET)
}

/// Where anybody may fetch a published file.
pub(crate) fn url(file: &str) -> String {
    format!("http://{}:{S3_PORT}/{BUCKET}/{file}", Place::Origin.address())
}

/// Where the image is served over NBD.
pub(super) fn nbd_url() -> String {
    format!("nbd://{}:{NBD_PORT}/{IMAGE}", Place::Origin.address())
}

/// Runs a command to its end.
pub(crate) fn finish(command: &mut Command) -> Outcome<String> {
    let out = command.output().map_err(|e| format!("{:?}: {e}", command.get_program()))?;
    if !out.status.success() {
        // The words alone: the environment holds keys.
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
        return Err(format!("{}: {}", words.join(" "), String::from_utf8_lossy(&out.stderr).trim()).into());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

impl Server {
    /// Starts the servers and publishes the guest's disk; files go to `dir`.
    pub(super) fn start(network: &Network, program: &Path, guest: &Guest<'_>, dir: &Path) -> Outcome<Self> {
        let server = Self { weed: weed(network, dir)?, nbd: nbd(network, guest.disk, dir)? };
        let packed = [dir.join("disk.qcow2"), dir.join("disk.raw.zst")];
        finish(
            Command::new("qemu-img")
                .args(["convert", "-c", "-W", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd"])
                .arg(guest.disk)
                .arg(&packed[0]),
        )?;
        finish(Command::new("zstd").args(["-q", "-f", "-T0"]).arg(guest.disk).arg("-o").arg(&packed[1]))?;
        for file in &packed {
            upload(network, file)?;
            println!("full copy: {} is {} bytes", file.display(), file.metadata()?.len());
        }
        publish(network, program, guest, &dir.join("publisher"))?;
        Ok(server)
    }

    /// Process id of the S3 server.
    pub(super) fn s3_pid(&self) -> u32 {
        self.weed.id()
    }

    /// Process id of the NBD server.
    pub(super) fn nbd_pid(&self) -> u32 {
        self.nbd.id()
    }
}

pub(crate) fn weed(network: &Network, dir: &Path) -> Outcome<Child> {
    let config = dir.join("s3.json");
    let actions = ["Admin", "Read", "List", "Tagging", "Write"];
    let keys = serde_json::json!([{"accessKey": KEY_ID, "secretKey": SECRET}]);
    // Whole copies are fetched by whoever can speak HTTP, at the least cost.
    let identities = serde_json::json!([
        {"name": "bench", "actions": actions, "credentials": keys},
        {"name": "anonymous", "actions": ["Read"]},
    ]);
    std::fs::write(&config, serde_json::json!({ "identities": identities }).to_string())?;
    let data = dir.join("data");
    std::fs::create_dir_all(&data)?;
    let log = File::create(dir.join("weed.log"))?;
    let address = Place::Origin.address();
    // The namespace is its own, so its usual ports are free.
    let child = network
        .command(Place::Origin, origin::program()?)
        .args(["server", "-s3", "-master.telemetry=false", "-volume.max=64", "-master.volumeSizeLimitMB=1024"])
        .args(["-s3.port.iceberg=0", "-s3.port.lance=0"])
        .args([format!("-ip={address}"), format!("-ip.bind={address}"), format!("-s3.port={S3_PORT}")])
        .arg(format!("-dir={}", data.display()))
        .arg(format!("-s3.config={}", config.display()))
        .arg(format!("-filer.localSocket={}", data.join("filer.sock").display()))
        .arg(format!("-s3.localSocket={}", data.join("s3.sock").display()))
        .current_dir(&data)
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .map_err(|e| format!("nsenter: {e}"))?;
    let end = Instant::now() + Duration::from_secs(90);
    let bucket = || match finish(signed(network).args(["-X", "PUT"]).arg(url(""))) {
        // It is there, from an earlier run.
        Err(error) if error.to_string().contains("error: 409") => Ok(String::new()),
        done => done,
    };
    // Known before the server can write into it: an object with content needs a volume.
    let probe = || finish(signed(network).arg("--upload-file").arg(&config).arg(url("probe")));
    while let Err(error) = bucket().and_then(|_| probe()) {
        if Instant::now() > end {
            return Err(format!("the S3 server does not serve: {error}").into());
        }
        std::thread::sleep(Duration::from_millis(300));
    }
    Ok(child)
}

/// `curl` at the origin with the right to write.
pub(crate) fn signed(network: &Network) -> Command {
    let mut curl = network.command(Place::Origin, "curl");
    curl.args(["--silent", "--show-error", "--fail", "--max-time", "120"]);
    curl.args(["--aws-sigv4", "aws:amz:us-east-1:s3", "--user"]).arg(format!("{KEY_ID}:{SECRET}"));
    curl
}

fn upload(network: &Network, file: &Path) -> Outcome {
    let name = file.file_name().ok_or("a file without a name")?.to_string_lossy();
    finish(signed(network).arg("--upload-file").arg(file).arg(url(&name))).map(drop)
}

/// The image over NBD, read through the page cache: the faster way where the image fits it.
fn nbd(network: &Network, disk: &Path, dir: &Path) -> Outcome<Child> {
    let child = network
        .command(Place::Origin, "qemu-nbd")
        .args(["--persistent", "--shared=64", "--read-only", "--format=raw", "--cache=writeback", "--aio=threads"])
        .args([format!("--bind={}", Place::Origin.address()), format!("--port={NBD_PORT}")])
        .args(["--export-name", IMAGE])
        .arg(disk)
        .stderr(File::create(dir.join("qemu-nbd.log"))?)
        .spawn()?;
    Ok(child)
}

/// Brings the image into the store that all nodes share, as an administrator does, beside the origin.
fn publish(network: &Network, program: &Path, guest: &Guest<'_>, home: &Path) -> Outcome {
    std::fs::create_dir_all(home)?;
    let offshoot = |words: &[&str]| {
        let mut command = network.command(Place::Origin, program);
        command.arg("--home").arg(home).args(words);
        finish(shared_store(&mut command))
    };
    let [disk, kernel, initrd] = [guest.disk, guest.kernel, guest.initrd].map(|path| path.to_string_lossy());
    let source = ["image", "import", &disk, "--name", IMAGE];
    let boot = ["--kernel", &kernel, "--initrd", &initrd, "--cmdline", guest.cmdline];
    let imported = offshoot(&[&source[..], &boot[..]].concat());
    let ended = offshoot(&["shutdown", "--stop"]);
    imported.and(ended).map(drop)
}

/// The default guest as files: its disk, kernel and initial RAM disk, in `dir`.
pub(super) struct Files {
    pub(super) disk: PathBuf,
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    pub(super) cmdline: String,
}

impl Files {
    pub(super) fn of_default_guest(program: &Path, dir: &Path) -> Outcome<Self> {
        let home = dir.join("home");
        let host = images::Home::open(program, &home)?;
        host.0.command(&["image", "build"])?;
        let images: Vec<api::Image> = host.0.client.get("/v1/images")?;
        let image = images.into_iter().find(|image| image.name == "debian").ok_or("the default guest is not listed")?;
        let files = Self {
            disk: dir.join("debian.raw"),
            kernel: dir.join("vmlinuz"),
            initrd: dir.join("initrd.img"),
            cmdline: image.cmdline,
        };
        host.0.command(&["export", "debian", &files.disk.to_string_lossy(), "--force"])?;
        drop(host);
        images::extract(&files.disk, "/vmlinuz", &files.kernel)?;
        images::extract(&files.disk, "/initrd.img", &files.initrd)?;
        std::fs::remove_dir_all(&home)?;
        Ok(files)
    }

    pub(super) fn guest(&self) -> Guest<'_> {
        Guest { disk: &self.disk, kernel: &self.kernel, initrd: &self.initrd, cmdline: &self.cmdline }
    }
}

/// A process that serves one disk on a unix socket, with the output it may have.
pub(super) fn serve(command: &mut Command, log: &Path) -> Outcome<Child> {
    Ok(command.stdout(Stdio::null()).stderr(File::create(log)?).spawn()?)
}
