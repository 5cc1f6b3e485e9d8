//! A home whose file system runs full: what cannot be done says so and leaves nothing, what runs stands still or goes
//! on, and when there is room again everything goes on by itself.
//!
//! The home is a tmpfs of its own, whose size is set anew whenever the test wants it full or not.

use crate::common;

use api::{ForkRequest, Vm, VmState};
use bench::Outcome;
use bench::guest::Guest;
use bench::host::free_ports;
use common::{MINUTES, TestHost, console_ready, eventually, host, kill};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const NONCE: &str = "before-it-was-full";

/// One test at a time: two cores carry one guest.
static TURN: Mutex<()> = Mutex::new(());

/// A home on a file system that can be made full.
struct Scene {
    host: TestHost,
}

fn tool(name: &str, arguments: &[&str]) -> Outcome {
    let output = Command::new(name).args(arguments).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{name} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr).trim()).into())
}

impl Scene {
    fn new(name: &str, bytes: u64) -> Outcome<Self> {
        let home = PathBuf::from(format!("/tmp/os-{name}-{}", std::process::id()));
        fs::create_dir_all(&home)?;
        tool("mount", &["-t", "tmpfs", "-o", &format!("size={bytes}"), "offshoot-test", &home.display().to_string()])?;
        Ok(Self { host: host(name) })
    }

    /// Leaves `bytes` of room in the home. What is in use may grow between the look and the limit, which is refused
    /// then: guests and commits go on meanwhile.
    fn room(&self, bytes: u64) -> Outcome {
        let mut tries = 0;
        loop {
            let stat = rustix::fs::statvfs(&self.host.home)?;
            let used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize;
            // A size of zero would be no bound at all.
            let size = (used + bytes).max(4096);
            match tool("mount", &["-o", &format!("remount,size={size}"), &self.host.home.display().to_string()]) {
                Err(_) if tries < 100 => tries += 1,
                done => return done,
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn fails(&self, words: &[&str], parts: &[&str]) {
        let said = self.host.command(words).expect_err("there is no room for it").to_string();
        for part in parts {
            assert!(said.contains(part), "{words:?} says `{said}`, but not `{part}`");
        }
    }

    fn state(&self, name: &str) -> Outcome<(VmState, String)> {
        let vms: Vec<Vm> = serde_json::from_str(&self.host.command(&["ps", "--json"])?)?;
        let vm = vms.into_iter().find(|vm| vm.name == name).ok_or("it is not listed")?;
        Ok((vm.state, vm.detail.unwrap_or_default()))
    }

    fn await_state(&self, name: &str, state: VmState) -> Outcome {
        eventually(&format!("{name} is {state}"), || Ok(self.state(name)?.0 == state))
    }

    fn verified(&self) -> Outcome {
        let said = self.host.command(&["verify"])?;
        assert!(said.contains(" 0 faults"), "{said}");
        Ok(())
    }

    fn stored(&self) -> Outcome<u64> {
        Ok(self.host.client.get::<api::NodeStats>("/v1/stats")?.store_stored_bytes)
    }

    fn shell(&self, guest: &Guest, command: &str) -> Outcome<String> {
        guest.shell(&self.host.client, command, MINUTES)
    }

    fn pending(&self, name: &str) -> Outcome<Vec<String>> {
        Ok(self.host.detail(name)?.pending)
    }
}

/// Files and directories below the parts of a home that imports use.
fn below(home: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    let mut rest = vec![home.join("work"), home.join("store"), home.join("kernels")];
    while let Some(dir) = rest.pop() {
        for path in fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()) {
            if path.is_dir() {
                rest.push(path.clone());
            }
            out.push(path);
        }
    }
    out.sort();
    out
}

#[test]
fn an_image_for_which_there_is_no_room_leaves_nothing() -> Outcome {
    let _turn = TURN.lock();
    let scene = Scene::new("fi", 40 * MIB)?;
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name).display().to_string();
    let mut random = fs::File::open("/dev/urandom")?;
    std::io::copy(&mut std::io::Read::take(&mut random, 64 * MIB), &mut fs::File::create(at("raw"))?)?;
    // Nothing that could be taken for a partition table.
    std::os::unix::fs::FileExt::write_all_at(&fs::File::options().write(true).open(at("raw"))?, &[0; 4096], 0)?;
    tool("qemu-img", &["convert", "-O", "qcow2", &at("raw"), &at("qcow2")])?;
    fs::create_dir(at("tree"))?;
    fs::rename(at("raw"), at("tree/big"))?;
    tool("tar", &["-C", &at("tree"), "-cf", &at("tar"), "."])?;
    fs::hard_link(at("tree/big"), at("raw"))?;
    let mut kernel = vec![0; 1024];
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    fs::write(at("kernel"), kernel)?;

    let (stored, files) = (scene.stored()?, below(&scene.host.home));
    for file in ["raw", "qcow2", "tar", "tree"] {
        let (path, kernel) = (at(file), at("kernel"));
        let import = ["image", "import", &path, "--name", "n", "--kernel", &kernel, "--cmdline", "q", "--size", "100M"];
        scene.fails(&import, &["o space left"]);
        assert_eq!(scene.host.command(&["image", "ls", "--json"])?.trim(), "[]", "images after {file}");
        assert_eq!(scene.stored()?, stored, "bytes stored after {file}");
        let left: Vec<PathBuf> = below(&scene.host.home).into_iter().filter(|p| !files.contains(p)).collect();
        // The directory of imports stays, empty.
        assert!(left.is_empty() || left == [scene.host.home.join("work/imports")], "{file} leaves {left:?}");
    }
    scene.fails(&["image", "build"], &["o space left", "free some"]);
    assert_eq!(scene.stored()?, stored, "bytes stored after a build");
    scene.verified()?;
    scene.room(400 * MIB)?;
    for file in ["raw", "qcow2", "tar", "tree"] {
        let (path, kernel) = (at(file), at("kernel"));
        scene.host.command(&[
            "image",
            "import",
            &path,
            "--name",
            file,
            "--kernel",
            &kernel,
            "--cmdline",
            "q",
            "--size",
            "100M",
        ])?;
    }
    scene.verified()
}

#[test]
fn guests_outlast_a_full_host_and_go_on_by_themselves() -> Outcome {
    let _turn = TURN.lock();
    let scene = Scene::new("fg", 3 << 30)?;
    let web = scene.host.booted("web", 256 * MIB)?;
    console_ready(&scene.host, &web)?;
    web.set("nonce", NONCE)?;
    scene.shell(&web, "head -c 40000000 /dev/urandom > /dev/shm/x")?;
    running(&scene, &web)?;
    committing(&scene, &web)?;
    nothing_at_all(&scene, &web)
}

/// Full while a guest writes to its disk: it stands still and says why, and goes on when there is room.
fn running(scene: &Scene, web: &Guest) -> Outcome {
    scene.room(8 * MIB)?;
    scene.shell(web, "(cp /dev/shm/x /root/x; sync; touch /dev/shm/done) >/dev/null 2>&1 & true")?;
    scene.await_state("web", VmState::Paused)?;
    let (_, why) = scene.state("web")?;
    assert!(why.contains("no space left") && why.contains("goes on by itself"), "{why}");
    // It stays so for as long as there is no room, and whoever asks is told.
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(scene.state("web")?.0, VmState::Paused);
    let refused = scene.host.command(&["fork", "web"]).map_err(|e| e.to_string());
    println!("a fork of the paused guest: {refused:?}");
    if refused.is_ok() {
        scene.host.remove("web-1")?;
    }
    // A daemon that takes over finds out by itself.
    kill(scene.host.daemon_pid()?);
    scene.await_state("web", VmState::Paused)?;
    scene.room(512 * MIB)?;
    scene.await_state("web", VmState::Running)?;
    web.await_response(Some(NONCE), MINUTES)?;
    eventually("the guest's copy is done", || Ok(scene.shell(web, "ls /dev/shm")?.contains("done")))?;
    let said = scene.shell(
        web,
        "echo 3 > /proc/sys/vm/drop_caches; cmp /dev/shm/x /root/x && echo same; dmesg | grep -ci ' error'",
    )?;
    assert_eq!(said.lines().next(), Some("same"), "{said}");
    assert_eq!(said.lines().last(), Some("0"), "the guest never learned of it: {said}");
    scene.shell(web, "rm /root/x /dev/shm/done").map(drop)
}

/// Full while a snapshot is stored: the command says why, the guest goes on, and it is stored when there is room.
fn committing(scene: &Scene, web: &Guest) -> Outcome {
    scene.host.command(&["snapshot", "web", "--tag", "before"])?;
    scene.shell(web, "head -c 40000000 /dev/urandom > /dev/shm/x; md5sum < /dev/shm/x > /dev/shm/sum")?;
    scene.room(6 * MIB)?;
    scene.fails(&["snapshot", "web", "--tag", "full"], &["o space left", "tried again by itself"]);
    web.await_response(Some(NONCE), MINUTES)?;
    assert!(!scene.host.command(&["snapshot", "ls"])?.contains("web@full"), "a snapshot is visible when it is durable");
    let pending = scene.pending("web")?;
    assert!(pending.len() == 1 && pending[0].contains("o space left"), "{pending:?}");
    scene.fails(&["snapshot", "web", "--tag", "full"], &["web@full is there already"]);
    // Offshoots do not wait for the store.
    let request = ForkRequest { count: 1, name_prefix: None, publish_base: Some(free_ports(2)?) };
    let reply: api::ForkReply = scene.host.client.post_long("/v1/vms/web/fork", &request, |_| {})?;
    assert!(reply.failed.is_empty(), "{:?}", reply.failed);
    let child = Guest::of(&reply.offshoots[0].name, &reply.offshoots[0].publish)?;
    child.await_response(Some(NONCE), MINUTES)?;
    let sum = scene.shell(web, "cat /dev/shm/sum")?;
    assert_eq!(scene.shell(&child, "md5sum < /dev/shm/x")?, sum, "an offshoot that stands on what is not stored");
    assert_eq!(scene.state("web")?.0, VmState::Running);
    // Neither does what is frozen get lost with the daemon.
    kill(scene.host.daemon_pid()?);
    scene.host.command(&["ps"])?;
    assert_eq!(scene.pending("web")?.len(), 2);
    scene.room(512 * MIB)?;
    scene.host.settle("web", MINUTES)?;
    assert!(scene.host.command(&["snapshot", "ls"])?.contains("web@full"));
    scene.verified()?;
    scene.host.remove(&child.name)?;
    scene.host.command(&["snapshot", "web", "--tag", "after"])?;
    for tag in ["full", "after"] {
        let back = scene.host.restore("back", &format!("web@{tag}"))?;
        back.await_response(Some(NONCE), MINUTES)?;
        assert_eq!(scene.shell(&back, "md5sum < /dev/shm/x")?, sum, "web@{tag}");
        scene.host.remove("back")?;
    }
    Ok(())
}

/// Not a byte is left: commands that need some fail and leave nothing, the others work, the guest goes on.
fn nothing_at_all(scene: &Scene, web: &Guest) -> Outcome {
    scene.room(0)?;
    for command in
        [&["fork", "web", "-n", "2"][..], &["snapshot", "web"], &["run", "debian", "--name", "more", "--memory", "64M"]]
    {
        let said = scene.host.command(command).map_err(|e| e.to_string());
        println!("{command:?} without any room: {said:?}");
    }
    web.await_response(Some(NONCE), MINUTES)?;
    kill(scene.host.daemon_pid()?);
    scene.host.command(&["ps"])?;
    web.await_response(Some(NONCE), MINUTES)?;
    scene.room(512 * MIB)?;
    scene.await_state("web", VmState::Running)?;
    for vm in serde_json::from_str::<Vec<Vm>>(&scene.host.command(&["ps", "--json"])?)? {
        assert_eq!(vm.state, VmState::Running, "{}: {:?}", vm.name, vm.detail);
        if vm.name != "web" {
            scene.host.remove(&vm.name)?;
        }
    }
    scene.host.settle("web", MINUTES)?;
    scene.verified()?;
    scene.host.command(&["fork", "web", "-n", "2"])?;
    scene.host.command(&["rm", "--force", "web-1", "web-2"]).map(drop)
}
