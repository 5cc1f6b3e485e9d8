//! The command line, as people and scripts meet it: what it says, what it refuses and by what name, who wins a race,
//! and that nothing refused leaves anything behind.
//!
//! The machines here are real but boot no system: their kernel is a few bytes that halt the processor.

use crate::common;

use bench::Outcome;
use bench::host::free_ports;
use common::tiny::{DISK, disk_bytes};
use common::{TestHost, eventually, halting_kernel, host, kill, processes, program};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A home, a directory for what is brought in, and the image `tiny` in it.
struct Scene {
    host: TestHost,
    dir: tempfile::TempDir,
}

impl Scene {
    fn new(name: &str) -> Outcome<Self> {
        let scene = Self { host: host(name), dir: tempfile::tempdir()? };
        fs::write(scene.at("halt"), halting_kernel())?;
        fs::write(scene.at("disk"), disk_bytes())?;
        scene.import("disk", "tiny")?;
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

    fn import(&self, file: &str, name: &str) -> Outcome<String> {
        let (path, kernel) = (self.text(file), self.text("halt"));
        self.host.command(&["image", "import", &path, "--name", name, "--kernel", &kernel, "--cmdline", "quiet"])
    }

    /// Starts a machine that halts.
    fn run(&self, name: &str) -> Outcome {
        self.host.command(&["run", "tiny", "--name", name, "--memory", "64M"]).map(drop)
    }

    fn json(&self, words: &[&str]) -> Value {
        let output = self.offshoot(words);
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{words:?} prints no JSON: {e}"))
    }

    /// What is wrong with how the command fails: it must say all the words, on stderr alone.
    fn fault(&self, command: &[&str], words: &[&str]) -> Option<String> {
        let output = self.offshoot(command);
        let said = String::from_utf8_lossy(&output.stderr);
        let missing: Vec<_> = words.iter().filter(|word| !said.contains(**word)).collect();
        let right = !output.status.success() && missing.is_empty() && output.stdout.is_empty();
        (!right).then(|| format!("{command:?} ends with {}, says `{}`, lacks {missing:?}", output.status, said.trim()))
    }

    fn refuses(&self, command: &[&str], words: &[&str]) {
        let fault = self.fault(command, words);
        assert!(fault.is_none(), "{}", fault.unwrap_or_default());
    }

    fn names(&self, list: &[&str]) -> BTreeSet<String> {
        let list = self.json(list);
        list.as_array().expect("a list").iter().map(|e| e["name"].as_str().expect("a name").to_owned()).collect()
    }

    /// Everything that a refused command could leave behind.
    fn remains(&self) -> (BTreeSet<PathBuf>, BTreeSet<u32>, BTreeSet<String>, u64) {
        let mut files = BTreeSet::new();
        for below in [
            "store/packs",
            "store/heads",
            "store/tmp",
            "vms",
            "pending",
            "work",
            "kernels",
            "mirror/layers",
            "mirror/objects",
            "exports",
            "run/nbd",
        ] {
            walk(&self.host.home.join(below), &mut files);
        }
        let own: BTreeSet<u32> = processes(&self.host.home).into_iter().map(|p| p.pid).collect();
        let stored = self.json(&["stats", "--node", "--json"])["store_stored_bytes"].as_u64().expect("a number");
        (files, own, self.names(&["image", "ls", "--json"]), stored)
    }

    fn assert_remains(&self, before: &(BTreeSet<PathBuf>, BTreeSet<u32>, BTreeSet<String>, u64), after_what: &str) {
        let now = self.remains();
        let more: Vec<_> = now.0.difference(&before.0).collect();
        assert!(more.is_empty(), "{after_what} leaves {more:?}");
        assert_eq!(
            (&now.1, &now.2, now.3),
            (&before.1, &before.2, before.3),
            "processes, images and bytes after {after_what}"
        );
    }
}

fn walk(dir: &Path, into: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            walk(&path, into);
        }
        into.insert(path);
    }
}

/// The subcommands that a help text lists.
fn listed(help: &str) -> Vec<String> {
    let rest = help.split_once("Commands:\n").map_or("", |(_, rest)| rest);
    let lines = rest.lines().take_while(|line| line.starts_with("  "));
    lines.filter_map(|line| line.split_whitespace().next()).filter(|&word| word != "help").map(str::to_owned).collect()
}

#[test]
fn every_command_explains_itself() {
    let ask = |words: &[String]| {
        let output = Command::new(program()).args(words).arg("--help").output().expect("the program starts");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains("Usage: offshoot"), "{words:?}: {text}");
        text
    };
    let mut open = vec![Vec::new()];
    let mut seen = BTreeSet::new();
    while let Some(words) = open.pop() {
        let text = ask(&words);
        let about = text.lines().next().unwrap_or_default();
        assert!(about.len() >= 8 && !about.starts_with("Usage"), "{words:?} does not say what it does: {text}");
        for name in listed(&text) {
            open.push([words.clone(), vec![name]].concat());
        }
        seen.insert(words.join(" "));
    }
    for known in [
        "run",
        "fork",
        "snapshot",
        "snapshot rm",
        "image import",
        "nbd serve",
        "nbd ls",
        "nbd stop",
        "export",
        "ps",
        "stats",
        "logs",
        "console",
        "wait",
        "verify",
        "shutdown",
    ] {
        assert!(seen.contains(known), "`{known}` is missing from {seen:?}");
    }
    let unknown = Command::new(program()).arg("dance").output().expect("the program starts");
    assert_eq!(unknown.status.code(), Some(2), "an unknown command");
}

#[test]
fn lists_are_json_and_errors_name_what_is_wrong_and_change_nothing() -> Outcome {
    let scene = Scene::new("ce")?;
    let base = free_ports(8)?;
    let publish = format!("{base}:80");
    scene.host.command(&["run", "tiny", "--name", "t", "--memory", "64M", "--publish", &publish])?;
    scene.run("s")?;
    scene.host.command(&["stop", "s", "--time", "0"])?;
    scene.host.command(&["snapshot", "t", "--tag", "one"])?;
    json_lists(&scene);
    let taken = TcpListener::bind(("127.0.0.1", base + 1))?;
    let (in_use, twice) = (format!("{}:80", base + 1), [format!("{}:80", base + 2), format!("{}:81", base + 2)]);
    let before = scene.remains();
    let cases: &[(&[&str], &[&str])] = &[
        (&["inspect", "nobody"], &["no VM is named nobody", "offshoot ps"]),
        (&["fork", "nobody"], &["no VM is named nobody"]),
        (&["snapshot", "nobody"], &["no VM is named nobody"]),
        (&["stop", "nobody"], &["no VM is named nobody"]),
        (&["rm", "nobody"], &["no VM is named nobody"]),
        (&["wait", "nobody"], &["no VM is named nobody"]),
        (&["stats", "nobody"], &["no VM is named nobody"]),
        (&["logs", "nobody"], &["no VM is named nobody"]),
        (&["console", "nobody"], &["no VM is named nobody"]),
        (&["balloon", "nobody", "64M"], &["no VM is named nobody"]),
        (&["run", "nothing"], &["no image `nothing`", "offshoot image ls"]),
        (&["image", "inspect", "nothing"], &["no image `nothing`"]),
        (&["image", "rm", "nothing"], &["no image `nothing`"]),
        (&["image", "import", "/no/such/file", "--name", "n"], &["/no/such/file"]),
        (&["run", "--from", "t@none"], &["no snapshot is named t@none", "offshoot snapshot ls"]),
        (&["run", "--from", "t"], &["`t` names no snapshot", "web@1"]),
        (&["run", "--from", "t@one", "--memory", "128M"], &["fixed", "--memory"]),
        (&["snapshot", "rm", "t@none"], &["no snapshot is named t@none"]),
        (&["snapshot", "t", "--tag", "one"], &["t@one is there already"]),
        (&["snapshot", "t", "--tag", "a b"], &["`a b`", "tag"]),
        (&["snapshot", "t", "--tag", "../x"], &["`../x`", "tag"]),
        (&["nbd", "serve", "nothing"], &["no image `nothing`", "offshoot image ls"]),
        (&["nbd", "serve", "t@none"], &["no snapshot is named t@none"]),
        (&["nbd", "serve", "scratch:none"], &["no scratch disk is named none", "offshoot nbd ls"]),
        (&["nbd", "serve", "tiny", "--name", "../x"], &["`../x` is no name for a disk to serve"]),
        (&["nbd", "serve", "tiny", "--writable", "--socket", "/no/such/dir/s"], &["/no/such/dir/s"]),
        (&["nbd", "stop", "nobody"], &["no export is named nobody", "offshoot nbd ls"]),
        (&["export", "nothing", "/tmp/never"], &["no image `nothing`"]),
        (&["export", "tiny", "/no/such/dir/file"], &["/no/such/dir/file"]),
        (&["export", "tiny", "-", "--format", "qcow2"], &["standard output", "qcow2"]),
        (&["run", "tiny", "--name", "Bad"], &["`Bad` is no name for a VM"]),
        (&["run", "tiny", "--name", "../x"], &["`../x` is no name for a VM"]),
        (&["run", "tiny", "--name", ""], &["`` is no name for a VM"]),
        (&["run", "tiny", "--memory", "1x"], &["`1x` is not a size"]),
        (&["run", "tiny", "--memory", "1M"], &["--memory 1.0 MiB", "from 64M"]),
        (&["run", "tiny", "--memory", "0"], &["from 64M"]),
        (&["run", "tiny", "--memory", "4000T"], &["--memory 4000.0 TiB", "to 1T"]),
        (&["run", "tiny", "--cpus", "0"], &["--cpus 0", "1 to 64"]),
        (&["run", "tiny", "--cpus", "65"], &["--cpus 65", "1 to 64"]),
        (&["run", "tiny", "--accelerator", "warp"], &["--accelerator warp", "auto, kvm or tcg"]),
        (&["run", "tiny", "--publish", "80"], &["`80` is no published port", "8080:80"]),
        (&["run", "tiny", "--publish", "70000:80"], &["`70000:80` is no published port"]),
        (&["run", "tiny", "--publish", "0:80"], &["`0:80` is no published port"]),
        (&["run", "tiny", "--publish", &in_use], &[&format!("port {} of 127.0.0.1", base + 1), "already"]),
        (&["run", "tiny", "--publish", &twice[0], "--publish", &twice[1]], &[&format!("port {}", base + 2), "twice"]),
        (&["run", "tiny", "--publish", "203.0.113.7:8080:80"], &["203.0.113.7"]),
        (&["run", "tiny", "--name", "t"], &["a VM named t is there already"]),
        (&["run", "tiny", "--from", "t@one"], &["cannot be used with"]),
        (&["fork", "t", "-n", "0"], &["-n 0", "1 to 256"]),
        (&["fork", "t", "-n", "257"], &["-n 257", "1 to 256"]),
        (&["fork", "t", "--name-prefix", "B D"], &["`B D` is no name"]),
        (&["fork", "t", "-n", "2", "--publish-base", "65535"], &["--publish-base 65535", "beyond 65535"]),
        (&["fork", "t", "--publish-base", &(base + 1).to_string()], &[&format!("port {}", base + 1), "already"]),
        (&["fork", "s"], &["s is not running"]),
        (&["snapshot", "s"], &["s is not running"]),
        (&["balloon", "s", "64M"], &["s is not running"]),
        (&["rm", "t"], &["t is running", "offshoot stop t", "rm -f t"]),
    ];
    let faults: Vec<String> = cases.iter().filter_map(|(command, words)| scene.fault(command, words)).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert_eq!(scene.names(&["ps", "--json"]), ["s", "t"].map(str::to_owned).into());
    drop(taken);
    scene.assert_remains(&before, "what was refused");
    // Names and ports of what was refused are free, and what ran runs.
    scene.host.command(&["run", "tiny", "--name", "n", "--memory", "64M", "--publish", &in_use])?;
    scene.host.command(&["fork", "t", "-n", "2"])?;
    assert_eq!(scene.json(&["inspect", "t-2"])["parent"], "t");
    Ok(())
}

fn json_lists(scene: &Scene) {
    for (command, name) in [
        (&["ps", "--json"][..], "t"),
        (&["stats", "--json"], "t"),
        (&["image", "ls", "--json"], "tiny"),
        (&["snapshot", "ls", "--json"], "t@one"),
    ] {
        assert!(scene.names(command).contains(name), "{command:?} lists {name}");
    }
    let doctor = scene.json(&["doctor", "--json"]);
    assert!(doctor.as_array().is_some_and(|checks| checks.len() > 5), "{doctor}");
    let verified = scene.json(&["verify", "--json"]);
    assert!(
        verified["faults"].as_array().is_some_and(Vec::is_empty) && verified["blocks"].as_u64() > Some(1000),
        "{verified}"
    );
    assert_eq!(scene.json(&["stats", "--node", "--json"])["running"], 1);
    assert_eq!(scene.json(&["image", "inspect", "tiny"])["disk_bytes"], DISK);
    let all = scene.json(&["ps", "--json"]);
    let stopped = all.as_array().expect("a list").iter().find(|vm| vm["name"] == "s").expect("listed").clone();
    assert_eq!((&stopped["state"], &stopped["detail"]), (&"stopped".into(), &"stopped".into()), "{stopped}");
}

#[test]
fn a_home_has_one_daemon_and_is_nobody_elses() -> Outcome {
    let host = host("c1");
    let second = Command::new(program()).arg("--home").arg(&host.home).arg("serve").output()?;
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success() && said.contains("another daemon runs for"), "{said}");
    assert!(said.contains(&*host.home.to_string_lossy()), "{said}");
    let mode = |path: &Path| Ok::<_, std::io::Error>(path.metadata()?.permissions().mode() & 0o777);
    for socket in ["daemon.sock", "mirror.sock"] {
        assert_eq!(mode(&host.home.join("run").join(socket))?, 0o600, "{socket}");
    }
    assert_eq!(mode(&host.home)?, 0o700);
    let dir = tempfile::tempdir()?;
    let deep = dir.path().join("d".repeat(80));
    let refused = Command::new(program()).arg("--home").arg(&deep).arg("ps").output()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("too long for a home"), "{said}");
    // One that cannot start is tried again, and says why once.
    let mut refused = Command::new(program());
    refused.arg("--home").arg(dir.path().join("s")).arg("ps").env("HOME", dir.path());
    refused.env_remove("AWS_ACCESS_KEY_ID").env("OFFSHOOT_STORE", "s3://bucket/x?endpoint=http://127.0.0.1:1");
    let refused = refused.output()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.matches("there are no credentials").count() == 1, "{said}");
    // Many commands at once on a fresh home: they share the one daemon that the first of them starts.
    let fresh = dir.path().join("h");
    let pids: Vec<u32> = std::thread::scope(|scope| {
        let ask = || {
            let output = Command::new(program()).arg("--home").arg(&fresh).args(["doctor", "--json"]).output()?;
            drop(output);
            let ps = Command::new(program()).arg("--home").arg(&fresh).arg("ps").output()?;
            assert!(ps.status.success(), "{}", String::from_utf8_lossy(&ps.stderr));
            Ok(api::Client::new(&fresh.join("run/daemon.sock"))?.get::<api::Version>("/v1/version")?.pid)
        };
        let threads: Vec<_> = (0..6).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|t| t.join().expect("commands succeed")).collect::<Outcome<_>>()
    })?;
    let ended = Command::new(program()).arg("--home").arg(&fresh).args(["shutdown", "--stop"]).status()?;
    assert!(ended.success());
    assert_eq!(pids.iter().collect::<BTreeSet<_>>().len(), 1, "{pids:?}");
    assert_eq!(processes(&fresh).len(), 0, "{:?}", processes(&fresh));
    Ok(())
}

/// Runs both at once, many times; exactly one of each pair wins, and the other says why.
fn race(
    rounds: u32,
    words: &str,
    mut pair: impl FnMut(u32) -> [Vec<String>; 2],
    scene: &Scene,
    mut after: impl FnMut(u32) -> Outcome,
) -> Outcome {
    for round in 0..rounds {
        let outputs = std::thread::scope(|scope| {
            let threads = pair(round).map(|command| {
                scope.spawn(move || scene.offshoot(&command.iter().map(String::as_str).collect::<Vec<_>>()))
            });
            threads.map(|t| t.join().expect("the program starts"))
        });
        let won = outputs.iter().filter(|o| o.status.success()).count();
        let said: String = outputs.iter().map(|o| String::from_utf8_lossy(&o.stderr)).collect();
        assert_eq!(won, 1, "winners of round {round}: {said}");
        assert!(said.contains(words), "`{said}` does not say `{words}`");
        after(round)?;
    }
    Ok(())
}

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|&w| w.to_owned()).collect()
}

#[test]
fn of_two_commands_on_one_name_exactly_one_wins() -> Outcome {
    let scene = Scene::new("cr")?;
    let run = owned(&["run", "tiny", "--name", "r", "--memory", "64M"]);
    race(
        6,
        "r is",
        |_| [run.clone(), run.clone()],
        &scene,
        |_| {
            assert_eq!(scene.names(&["ps", "--json"]).len(), 1);
            scene.host.command(&["rm", "--force", "r"]).map(drop)
        },
    )?;
    let (disk, kernel) = (scene.text("disk"), scene.text("halt"));
    let import = owned(&["image", "import", &disk, "--name", "twin", "--kernel", &kernel, "--cmdline", "quiet"]);
    race(
        4,
        "twin",
        |_| [import.clone(), import.clone()],
        &scene,
        |_| {
            assert!(scene.names(&["image", "ls", "--json"]).contains("twin"));
            scene.host.command(&["image", "rm", "twin"]).map(drop)
        },
    )?;
    scene.run("r")?;
    let snapshot = owned(&["snapshot", "r", "--tag", "x"]);
    race(
        3,
        "r@x",
        |_| [snapshot.clone(), snapshot.clone()],
        &scene,
        |_| scene.host.command(&["snapshot", "rm", "r@x"]).map(drop),
    )?;
    // Forks that choose their own names do not contend.
    let forks = std::thread::scope(|scope| {
        let threads = [(); 3].map(|()| scope.spawn(|| scene.offshoot(&["fork", "r", "-n", "2"])));
        threads.map(|t| t.join().expect("the program starts"))
    });
    for fork in forks {
        assert!(fork.status.success(), "{}", String::from_utf8_lossy(&fork.stderr));
    }
    assert_eq!(scene.names(&["ps", "--json"]).len(), 7, "three forks of two, and their parent");
    let gone = owned(&["rm", "--force", "r"]);
    race(1, "r", |_| [gone.clone(), gone.clone()], &scene, |_| Ok(()))
}

/// A tar archive of one entry, as written by hand: tools would not write these.
fn tar(name: &str, kind: u8, link: &str, body: &[u8]) -> Vec<u8> {
    let mut head = [0u8; 512];
    head[..name.len()].copy_from_slice(name.as_bytes());
    head[100..107].copy_from_slice(b"0000644");
    head[108..115].copy_from_slice(b"0000000");
    head[116..123].copy_from_slice(b"0000000");
    head[124..135].copy_from_slice(format!("{:011o}", body.len()).as_bytes());
    head[136..147].copy_from_slice(b"00000000000");
    head[148..156].fill(b' ');
    head[156] = kind;
    head[157..157 + link.len()].copy_from_slice(link.as_bytes());
    head[257..263].copy_from_slice(b"ustar\0");
    head[263..265].copy_from_slice(b"00");
    let sum: u32 = head.iter().map(|&b| u32::from(b)).sum();
    head[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    let mut out = head.to_vec();
    out.extend_from_slice(body);
    out.resize(out.len().next_multiple_of(512) + 1024, 0);
    out
}

fn tool(name: &str, arguments: &[&str]) -> Outcome {
    let output = Command::new(name).args(arguments).output()?;
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn hostile_images_are_refused_by_name_and_leave_nothing() -> Outcome {
    let scene = Scene::new("ch")?;
    let outside = scene.at("outside");
    let climbing = format!("../{}", "x".repeat(8));
    fs::write(scene.at("climbing.tar"), tar(&climbing, b'0', "", b"out"))?;
    fs::write(scene.at("absolute.tar"), tar(&outside.display().to_string(), b'0', "", b"out"))?;
    fs::write(scene.at("hardlink.tar"), tar("shadow", b'1', "/etc/shadow", b""))?;
    fs::write(scene.at("linkout.tar"), tar("shadow", b'1', "../../etc/shadow", b""))?;
    fs::write(scene.at("device.tar"), tar("sda", b'b', "", b""))?;
    let mut through = tar("d", b'2', "/tmp", b"");
    through.truncate(512);
    through.extend(tar("d/planted-by-offshoot-test", b'0', "", b"out"));
    fs::write(scene.at("through.tar"), through)?;
    let whole = tar("etc/passwd", b'0', "", &vec![b'a'; 100_000]);
    fs::write(scene.at("short.tar"), &whole[..50_000])?;
    let (disk, backed, short, external) =
        (scene.text("disk"), scene.text("backed.qcow2"), scene.text("short.qcow2"), scene.text("ext.qcow2"));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &disk, "-F", "raw", &backed])?;
    tool(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &format!("data_file={},data_file_raw=on", scene.text("data")),
            &external,
            "1M",
        ],
    )?;
    tool("qemu-img", &["convert", "-q", "-f", "raw", "-O", "qcow2", &disk, &short])?;
    let length = fs::metadata(&short)?.len();
    fs::File::options().write(true).open(&short)?.set_len(length / 2)?;
    tool("mke2fs", &["-q", "-t", "ext4", &scene.text("short.ext4"), "64M"])?;
    fs::File::options().write(true).open(scene.at("short.ext4"))?.set_len(20 << 20)?;
    fs::write(scene.at("odd.raw"), [7u8; 1000])?;
    fs::write(scene.at("empty.raw"), [])?;
    fs::write(scene.at("text"), "no kernel")?;

    let before = scene.remains();
    let kernel = scene.text("halt");
    for (file, word) in [
        ("climbing.tar", ".."),
        ("hardlink.tar", "shadow"),
        ("linkout.tar", ".."),
        ("through.tar", "d/planted-by-offshoot-test"),
        ("short.tar", "short.tar"),
        ("backed.qcow2", "backing file"),
        ("ext.qcow2", "external file"),
        ("short.qcow2", "truncated"),
        ("short.ext4", "truncated"),
        ("odd.raw", "1000 bytes"),
        ("empty.raw", "0 bytes"),
    ] {
        let path = scene.text(file);
        let command = ["image", "import", &path, "--name", "evil", "--kernel", &kernel, "--cmdline", "quiet"];
        let output = scene.offshoot(&command);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{file} must be refused");
        assert!(said.contains(file) && said.contains(word), "{file}: `{said}` does not say `{word}`");
        scene.assert_remains(&before, file);
    }
    for (file, given) in [("disk", "text"), ("disk", "nowhere")] {
        let (path, kernel) = (scene.text(file), scene.text(given));
        scene.refuses(&["image", "import", &path, "--name", "evil", "--kernel", &kernel, "--cmdline", "q"], &[given]);
        scene.assert_remains(&before, given);
    }
    scene.refuses(&["image", "import", &disk, "--name", "evil"], &["--kernel"]);
    scene.refuses(&["image", "import", &disk, "--name", "E/vil", "--kernel", &kernel], &["`E/vil`"]);
    scene.assert_remains(&before, "an image without a kernel");
    // An absolute name is taken for one below the root, or refused: outside nothing appears.
    let _ = scene.offshoot(&[
        "image",
        "import",
        &scene.text("absolute.tar"),
        "--name",
        "abs",
        "--kernel",
        &kernel,
        "--cmdline",
        "q",
        "--size",
        "64M",
    ]);
    assert!(!outside.exists() && !Path::new("/tmp/planted-by-offshoot-test").exists(), "an archive wrote outside");
    scene.import("disk", "evil").map(drop)
}

/// Packs of the store.
fn packs(home: &Path) -> Outcome<Vec<PathBuf>> {
    let all = fs::read_dir(home.join("store/packs"))?.flatten().map(|e| e.path());
    Ok(all.filter(|p| p.extension().is_some_and(|e| e == "pack")).collect())
}

fn flip(file: &Path, at: u64) -> Outcome {
    let file = fs::File::options().read(true).write(true).open(file)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 0x10], at)?;
    Ok(())
}

#[test]
fn a_flipped_bit_is_named_and_never_served() -> Outcome {
    let scene = Scene::new("cf")?;
    let wanted = disk_bytes();
    let largest =
        |paths: Vec<PathBuf>| paths.into_iter().max_by_key(|p| p.metadata().map_or(0, |m| m.len())).expect("packs");
    let pack = largest(packs(&scene.host.home)?);
    let length = pack.metadata()?.len();
    let mut refused = 0;
    for round in 0..8 {
        // A machine whose disk nobody has read yet, and a mirror that remembers nothing.
        scene.run("v")?;
        kill(scene.host.mirror_pid()?);
        eventually("the mirror answers", || Ok(scene.host.mirror_pid().is_ok()))?;
        let at = length * (2 * round + 1) / 16;
        flip(&pack, at)?;
        let output = scene.offshoot(&["verify"]);
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(!output.status.success() && said.contains("damaged"), "verify after a flip at {at}: {said}");
        let name = pack.file_stem().expect("named").to_string_lossy();
        assert!(said.contains(&*name), "verify must name {name}: {said}");
        let disks: Vec<PathBuf> = fs::read_dir(scene.host.home.join("mnt/disk"))?.flatten().map(|e| e.path()).collect();
        let disk = fs::File::open(&disks[0])?;
        let mut bytes = vec![0; 4096];
        let mut errors = 0;
        for block in 0..DISK / 4096 {
            match disk.read_exact_at(&mut bytes, block * 4096) {
                Ok(()) => {
                    assert_eq!(bytes, &wanted[(block * 4096) as usize..][..4096], "block {block} after a flip at {at}")
                }
                Err(_) => errors += 1,
            }
        }
        refused += errors;
        assert!(errors < DISK / 4096 / 2, "one bit costs {errors} blocks");
        // Whole again, all of it is there: nothing that failed was kept.
        flip(&pack, at)?;
        let mut all = vec![0; DISK as usize];
        disk.read_exact_at(&mut all, 0).map_err(|e| format!("after the flip at {at} of {length} was mended: {e}"))?;
        assert!(all == wanted, "the disk after the pack was mended");
        scene.host.command(&["rm", "--force", "v"])?;
    }
    assert!(refused > 0, "no flip met a block of the disk");
    let said = scene.host.command(&["verify"])?;
    assert!(said.contains(" 0 faults"), "{said}");
    Ok(())
}
