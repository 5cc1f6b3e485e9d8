//! Disks of images and snapshots, served and exported, as users and other people's programs meet them.

use crate::common;

use bench::Outcome;
use common::{TestHost, eventually, halting_kernel, host, kill, program};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

const MIB: usize = 1 << 20;

/// A home with the image `tiny`, whose disk holds an ext4 file system.
struct Scene {
    host: TestHost,
    dir: tempfile::TempDir,
}

impl Scene {
    fn new(name: &str) -> Outcome<Self> {
        let scene = Self { host: host(name), dir: tempfile::tempdir()? };
        fs::create_dir_all(scene.at("tree/etc"))?;
        let noise: Vec<u8> = (0..3 * MIB as u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u8).collect();
        fs::write(scene.at("tree/noise"), noise)?;
        fs::write(scene.at("tree/etc/hostname"), "tiny")?;
        fs::write(scene.at("halt"), halting_kernel())?;
        fs::File::create(scene.at("disk"))?.set_len(32 * MIB as u64)?;
        run(&["mke2fs", "-q", "-t", "ext4", "-d", &scene.text("tree"), &scene.text("disk")]);
        let (disk, kernel) = (scene.text("disk"), scene.text("halt"));
        let words = ["image", "import", &disk, "--name", "tiny", "--kernel", &kernel, "--cmdline", "quiet"];
        scene.host.command(&words)?;
        Ok(scene)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.at(name).display().to_string()
    }

    fn offshoot(&self, words: &[&str]) -> Output {
        Command::new(program()).arg("--home").arg(&self.host.home).args(words).output().expect("the program starts")
    }

    /// What `nbd ls` says of an export.
    fn listed(&self, name: &str) -> Outcome<Option<Value>> {
        let list: Value = serde_json::from_str(&self.host.command(&["nbd", "ls", "--json"])?)?;
        Ok(list.as_array().ok_or("no list")?.iter().find(|e| e["name"] == name).cloned())
    }

    fn uri(&self, name: &str) -> Outcome<String> {
        let listed = self.listed(name)?.ok_or("not listed")?;
        Ok(listed["uri"].as_str().ok_or("not served")?.to_owned())
    }

    fn same(&self, uri: &str, file: &str) {
        run(&["qemu-img", "compare", "-f", "raw", "-F", "raw", uri, &self.text(file)]);
    }
}

fn run(words: &[&str]) -> String {
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap_or_else(|e| panic!("{}: {e}", words[0]));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{words:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn disks_are_served_through_deaths_and_kept_until_discarded() -> Outcome {
    let scene = Scene::new("nb")?;
    let host = &scene.host;
    host.command(&["run", "tiny", "--name", "t", "--memory", "64M"])?;
    host.command(&["snapshot", "t", "--tag", "one"])?;
    host.command(&["rm", "--force", "t"])?;
    let said = host.command(&["nbd", "serve", "t@one", "--name", "snap"])?;
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines[0].ends_with("/run/nbd/snap.sock") && lines[1].starts_with("nbd+unix:///snap?socket=/"), "{said}");
    let own = scene.text("own.sock");
    host.command(&["nbd", "serve", "tiny", "--socket", &own])?;
    host.command(&["nbd", "serve", "t@one", "--writable", "--name", "w"])?;
    let refused = scene.offshoot(&["nbd", "serve", "tiny", "--name", "w"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("an export named w is there already"));
    let (snap, image, scratch) = (scene.uri("snap")?, scene.uri("tiny")?, scene.uri("w")?);
    assert!(image.ends_with(&own));
    scene.same(&snap, "disk");
    // What is served stays, whatever becomes of its name.
    host.command(&["snapshot", "rm", "t@one"])?;
    host.command(&["image", "rm", "tiny"])?;
    scene.same(&snap, "disk");
    // More files in a copy of the file system, and that copy into the scratch disk.
    fs::copy(scene.at("disk"), scene.at("copy"))?;
    let commands: String = (0..8).map(|n| format!("write {} more{n}\n", scene.text("tree/noise"))).collect();
    fs::write(scene.at("script"), commands)?;
    run(&["debugfs", "-w", "-f", &scene.text("script"), &scene.text("copy")]);
    run(&["nbdcopy", "--flush", &scene.text("copy"), &scratch]);
    // Daemon and mirror die at once, with nothing left that holds the session; then each by itself.
    let (daemon, mirror) = (host.daemon_pid()?, host.mirror_pid()?);
    kill(daemon);
    kill(mirror);
    for (name, uri, file) in [("snap", &snap, "disk"), ("tiny", &image, "disk"), ("w", &scratch, "copy")] {
        assert_eq!(&scene.uri(name)?, uri, "{name}");
        scene.same(uri, file);
    }
    kill(host.mirror_pid()?);
    eventually("the mirror is replaced", || {
        Ok(Command::new("nbdinfo").args(["--size", &scratch]).output()?.status.success())
    })?;
    kill(host.daemon_pid()?);
    run(&["nbdcopy", &scratch, &scene.text("back")]);
    run(&["e2fsck", "-fn", &scene.text("back")]);
    scene.same(&scratch, "copy");
    // Not served, and served again; over the end of everything as well.
    host.command(&["nbd", "stop", "w"])?;
    assert_eq!(scene.listed("w")?.ok_or("w is gone")?["state"], "stopped");
    assert!(!Command::new("nbdinfo").args(["--size", &scratch]).output()?.status.success());
    host.command(&["nbd", "serve", "scratch:w"])?;
    host.command(&["shutdown", "--stop"])?;
    assert_eq!(fs::read_dir(host.home.join("run/nbd"))?.count(), 0, "sockets are gone");
    assert!(!scene.at("own.sock").exists());
    assert!(scene.listed("snap")?.is_none(), "what shows something else ends with all");
    host.command(&["nbd", "serve", "scratch:w"])?;
    scene.same(&scratch, "copy");
    let before = host.command(&["stats", "--node", "--json"])?;
    host.command(&["nbd", "stop", "w", "--discard"])?;
    assert!(scene.listed("w")?.is_none());
    let stored = |text: &str| Outcome::Ok(serde_json::from_str::<Value>(text)?["store_stored_bytes"].as_u64());
    assert!(stored(&host.command(&["stats", "--node", "--json"])?)? < stored(&before)?, "nothing names it any more");
    assert_eq!(fs::read_dir(host.home.join("exports"))?.count(), 0);
    Ok(())
}

#[test]
fn exports_to_files_are_whole_sparse_or_not_there() -> Outcome {
    let scene = Scene::new("ex")?;
    let (raw, qcow2) = (scene.text("out.raw"), scene.text("out.qcow2"));
    scene.host.command(&["export", "tiny", &raw])?;
    let (out, disk) = (fs::metadata(&raw)?, fs::metadata(scene.at("disk"))?);
    assert!(fs::read(&raw)? == fs::read(scene.at("disk"))?);
    assert!(out.blocks() <= disk.blocks() + 64, "holes are kept: {} of {} sectors", out.blocks(), disk.blocks());
    scene.host.command(&["export", "tiny", &qcow2, "--format", "qcow2"])?;
    assert!(run(&["qemu-img", "check", &qcow2]).contains("No errors"));
    run(&["qemu-img", "compare", "-f", "qcow2", "-F", "raw", &qcow2, &scene.text("disk")]);
    assert!(scene.offshoot(&["export", "tiny", "-"]).stdout == fs::read(scene.at("disk"))?);
    // What was written to a scratch disk, while it is served.
    scene.host.command(&["nbd", "serve", "tiny", "-w", "--name", "w"])?;
    run(&["qemu-io", "-f", "raw", "-c", "write -P 7 1M 1M", "-c", "write -z 2M 1M", &scene.uri("w")?]);
    scene.host.command(&["export", "scratch:w", &qcow2, "--format", "qcow2", "--force"])?;
    run(&["qemu-img", "compare", "-f", "qcow2", "-F", "raw", &qcow2, &scene.uri("w")?]);
    // A file that is there is not touched, and one that cannot be finished is not there.
    fs::write(&raw, "mine")?;
    let refused = scene.offshoot(&["export", "tiny", &raw]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--force") && !refused.status.success());
    let count = || fs::read_dir(scene.dir.path()).map(Iterator::count);
    let (before, fresh) = (count()?, scene.text("fresh"));
    for delay_ms in [1, 3, 6, 10, 15, 25, 40] {
        let mut command = Command::new(program());
        command.arg("--home").arg(&scene.host.home).args(["export", "tiny", &fresh, "--format", "qcow2"]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        std::thread::sleep(std::time::Duration::from_millis(delay_ms));
        let pid = rustix::process::Pid::from_raw(child.id().cast_signed()).ok_or("no pid")?;
        rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
        child.wait()?;
        if scene.at("fresh").exists() {
            run(&["qemu-img", "compare", "-f", "qcow2", "-F", "raw", &fresh, &scene.text("disk")]);
            fs::remove_file(&fresh)?;
        }
        assert_eq!(count()?, before, "interrupted after {delay_ms} ms");
    }
    assert_eq!(fs::read(&raw)?, b"mine");
    eventually("exports under way are over", || {
        scene.host.command(&["nbd", "ls"])?;
        Ok(fs::read_dir(scene.host.home.join("exports"))?.count() == 1)
    })?;
    Ok(())
}

/// `fio` over NBD while mirror and daemon are killed. It knows no second connection, so a chain of nbdkit stands
/// between: its filter `retry` connects again and repeats what was not answered.
#[test]
fn fio_verifies_over_nbd_through_kills_of_mirror_and_daemon() -> Outcome {
    let scene = Scene::new("nf")?;
    let host = &scene.host;
    // A machine holds the mirror's session when all else dies.
    host.command(&["run", "tiny", "--name", "keeper", "--memory", "64M"])?;
    host.command(&["blob", "create", "b", "64M"])?;
    host.command(&["nbd", "serve", "blob:b", "--writable", "--name", "w"])?;
    let served = format!("socket={}", host.home.join("run/nbd/w.sock").display());
    let fio = |more: &str| {
        let line = format!(
            "fio --name=v --ioengine=nbd --uri=$uri --rw=randwrite --bs=4k-64k --size=64M --iodepth=8 --randseed=7 \
             --verify=crc32c --verify_fatal=1 --verify_state_save=0 --output=/dev/null {more}"
        );
        Command::new("timeout")
            .args(["120", "nbdkit", "--unix", "-", "--filter=retry", "nbd", &served, "export=w"])
            .args(["retries=60", "retry-delay=1", "retry-exponential=no", "--run", &line])
            .current_dir(scene.dir.path())
            .spawn()
    };
    for round in 0..2 {
        // At so many bytes a second that it cannot be over before they die.
        let mut writing = fio("--do_verify=0 --rate=16M")?;
        for which in 0..3_u64 {
            std::thread::sleep(std::time::Duration::from_millis(700));
            assert!(writing.try_wait()?.is_none(), "fio was over before anything died");
            common::kill_some(host, which)?;
        }
        assert!(writing.wait()?.success(), "writing, round {round}");
        common::kill_some(host, 2)?;
        assert!(fio("--verify_only")?.wait()?.success(), "verifying, round {round}");
    }
    host.command(&["verify"]).map(drop)
}
