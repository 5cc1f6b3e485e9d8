//! The tree of blobs, as other people's programs use it: versions as files, local changes, COMMIT and CLONE, through
//! deaths of everything. Needs root, /dev/fuse, `python3` (for its ioctls), `fio` and the tools of ext4.

use crate::common;

use bench::Outcome;
use common::fsx::Fsx;
use common::{TestHost, eventually, halting_kernel, host, kill_some, program, tiny};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// What `docs/blob-tree.md` shows.
const IOCTLS: &str = r#"
import fcntl, os, struct, sys
COMMIT, CLONE = 0x80084f10, 0x41004f11
fd = os.open(sys.argv[1], os.O_RDWR)
for word in sys.argv[2:]:
    if word == "commit":
        number = bytearray(8)
        fcntl.ioctl(fd, COMMIT, number)
        print(struct.unpack("Q", number)[0])
    elif word.startswith("clone="):
        fcntl.ioctl(fd, CLONE, word[6:].encode().ljust(256, b"\0"))
    elif word.startswith("write="):
        at, fill, length = map(int, word[6:].split(","))
        assert os.pwrite(fd, bytes([fill]) * length, at) == length
    elif word.startswith("byte="):
        print(os.pread(fd, 1, int(word[5:]))[0])
"#;

fn run(words: &[&str]) -> String {
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap_or_else(|e| panic!("{}: {e}", words[0]));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{words:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Opens a file and does what the words say, all on one handle.
fn on_file(path: &Path, words: &[&str]) -> Output {
    Command::new("python3").args(["-c", IOCTLS]).arg(path).args(words).output().expect("python3 is there")
}

fn done_on(path: &Path, words: &[&str]) -> Vec<u64> {
    let output = on_file(path, words);
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().map(|l| l.parse().expect("a number")).collect()
}

fn refused(path: &Path, words: &[&str], errno: &str) {
    let output = on_file(path, words);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains(errno), "{words:?} says: {said}");
}

fn offshoot(host: &TestHost, words: &[&str]) -> Output {
    Command::new(program()).arg("--home").arg(&host.home).args(words).output().expect("the program starts")
}

/// A version as it is in the store.
fn stored(host: &TestHost, version: &str) -> Vec<u8> {
    let output = offshoot(host, &["blob", "read", version]);
    assert!(output.status.success(), "{version}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn version(host: &TestHost, blob: &str, number: u64) -> PathBuf {
    mirror::version_path(&host.home, blob, number)
}

/// Writes a file into a blob as its next version.
fn fill(host: &TestHost, blob: &str, file: &Path) -> Outcome {
    host.command(&["blob", "write", blob, &file.display().to_string()]).map(|_| ())
}

/// A machine that holds the mirror's session when all else dies.
fn keeper(host: &TestHost, dir: &Path) -> Outcome {
    fs::write(dir.join("halt"), halting_kernel())?;
    fs::write(dir.join("tiny"), tiny::disk_bytes())?;
    let text = |name: &str| dir.join(name).display().to_string();
    let (disk, kernel) = (text("tiny"), text("halt"));
    host.command(&["image", "import", &disk, "--name", "tiny", "--kernel", &kernel, "--cmdline", "quiet"])?;
    host.command(&["run", "tiny", "--name", "keeper", "--memory", "64M"]).map(|_| ())
}

/// Waits for a child for two minutes at most.
fn wait(mut child: Child) -> Outcome<std::process::ExitStatus> {
    let end = Instant::now() + Duration::from_secs(120);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() > end {
            child.kill()?;
            return Err("it hangs".into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn versions_are_files_and_what_is_written_to_one_becomes_the_next_or_a_blob_of_its_own() -> Outcome {
    let host = host("tr");
    host.command(&["blob", "create", "team/disk", "4M"])?;
    let dir = tempfile::tempdir()?;
    let first: Vec<u8> = (0..4 << 20).map(|n: u32| (n.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
    fs::write(dir.path().join("first"), &first)?;
    fill(&host, "team/disk", &dir.path().join("first"))?;
    let (zero, one) = (version(&host, "team/disk", 0), version(&host, "team/disk", 1));
    assert_eq!(host.command(&["blob", "open", "team/disk"])?.trim(), one.display().to_string());
    // Listed, with sizes and times; links follow.
    let tree = host.home.join("mnt/blob");
    let names = |dir: &Path| -> Outcome<Vec<String>> {
        let mut names: Vec<String> =
            fs::read_dir(dir)?.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect::<Outcome<_>>()?;
        names.sort();
        Ok(names)
    };
    host.command(&["blob", "tag", "team/disk", "gold", "0"])?;
    assert_eq!(names(&tree)?, ["team%2Fdisk"]);
    assert_eq!(names(&tree.join("team%2Fdisk"))?, ["0", "1", "gold", "latest"]);
    assert_eq!(fs::metadata(&one)?.len(), 4 << 20);
    assert!(fs::metadata(&one)?.modified()?.elapsed()? < Duration::from_secs(600));
    assert!(fs::read(tree.join("team%2Fdisk/latest"))? == first);
    assert!(fs::read(tree.join("team%2Fdisk/gold"))?.iter().all(|&b| b == 0));
    for absent in ["2", "01", "x", "team"] {
        assert!(!tree.join("team%2Fdisk").join(absent).exists(), "{absent}");
    }
    // Writes stay local, to all who open the path, and the version stays what it is.
    let mut model = first.clone();
    model[5000..105_000].fill(9);
    done_on(&one, &["write=5000,9,100000"]);
    assert!(fs::read(&one)? == model && host.command(&["blob", "log", "team/disk"])?.lines().count() == 3);
    let files: Vec<api::BlobFile> = host.client.get("/v1/blob-files")?;
    assert_eq!((files.len(), files[0].number, files[0].opened), (1, 1, 0));
    assert!((100_000..120_000).contains(&files[0].changed_bytes), "{files:?}");
    // COMMIT: all of it is one version, and the handle is one of the new version from then on.
    model[0] = 77;
    assert_eq!(done_on(&one, &["write=0,77,1", "commit", "commit", "byte=0"]), [2, 2, 77]);
    assert!(fs::read(&one)? == first, "the version is what it was");
    assert!(fs::read(version(&host, "team/disk", 2))? == model && stored(&host, "team/disk@2") == model);
    let log: Vec<api::BlobVersion> = host.client.get("/v1/blobs/team%2Fdisk/log")?;
    assert_eq!(log.iter().map(|v| v.number).collect::<Vec<_>>(), [0, 1, 2]);
    // What others published is never mixed in.
    refused(&zero, &["write=1,1,1", "commit"], "Stale file handle");
    assert_eq!(done_on(&zero, &["byte=1"]), [1], "nothing is lost");
    refused(&zero, &["clone=team/disk"], "File exists");
    refused(&zero, &["clone=no good"], "Invalid argument");
    assert_eq!(done_on(&zero, &["clone=mine", "write=2,2,1", "commit"]), [1]);
    assert_eq!(host.client.get::<api::Blob>("/v1/blobs/mine")?.origin.as_deref(), Some("team/disk@0"));
    let mine = fs::read(version(&host, "mine", 1))?;
    assert!(mine[..4] == [0, 1, 2, 0] && mine.iter().skip(4).all(|&b| b == 0));
    assert!(fs::read(&zero)?.iter().all(|&b| b == 0));
    // The same by command.
    let two = version(&host, "team/disk", 2);
    done_on(&two, &["write=9,9,9"]);
    assert!(!offshoot(&host, &["blob", "rm", "team/disk"]).status.success(), "there are local changes");
    assert_eq!(host.command(&["blob", "clone", &two.display().to_string(), "yours"])?.trim(), "yours");
    assert_eq!(host.command(&["blob", "commit", "yours"])?.trim(), "yours@1");
    done_on(&two, &["write=9,8,9"]);
    host.command(&["blob", "discard", "team/disk"])?;
    assert!(fs::read(&two)? == model);
    // What is open stays readable whatever becomes of its name, and goes when it is closed.
    let open = fs::File::open(&one)?;
    for name in ["team/disk@1", "team/disk", "yours", "mine"] {
        if name == "team/disk" {
            host.command(&["blob", "tag", "team/disk", "gold", "--remove"])?;
        }
        host.command(&["blob", "rm", name])?;
    }
    host.command(&["gc"])?;
    let mut read = vec![0; 4 << 20];
    std::os::unix::fs::FileExt::read_exact_at(&open, &mut read, 0)?;
    assert!(read == first);
    drop(open);
    eventually("nothing is left", || {
        host.command(&["gc"])?;
        let stats: api::NodeStats = host.client.get("/v1/stats")?;
        Ok(stats.store_stored_bytes < 100_000)
    })
}

#[test]
fn a_file_system_in_a_version_is_mounted_unpacked_committed_and_diverges() -> Outcome {
    let host = host("te");
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name).display().to_string();
    fs::create_dir(dir.path().join("mnt"))?;
    fs::File::create(at("disk"))?.set_len(64 << 20)?;
    run(&["mke2fs", "-q", "-t", "ext4", &at("disk")]);
    host.command(&["blob", "create", "image", "64M"])?;
    fill(&host, "image", &dir.path().join("disk"))?;
    // What is unpacked: files of all sizes, and names.
    fs::create_dir(dir.path().join("tree"))?;
    for n in 0..200_u32 {
        fs::write(dir.path().join(format!("tree/f{n}")), vec![n as u8; (n * n) as usize])?;
    }
    run(&["tar", "-C", &at(""), "-cf", &at("tree.tar"), "tree"]);
    let unpack = |path: &Path, name: &str| {
        let image = path.display().to_string();
        let mounted = Command::new("mount").args(["-o", "loop", &image, &at("mnt")]).output().expect("mount is there");
        if mounted.status.success() {
            let into = format!("{}/{name}", at("mnt"));
            let unpacked = fs::create_dir(&into).and_then(|()| {
                Command::new("tar").args(["-C", &into, "-xf", &at("tree.tar")]).status().map(|s| assert!(s.success()))
            });
            run(&["umount", &at("mnt")]);
            unpacked.unwrap();
        } else {
            // No loop devices here: the file system's own tool writes it.
            eprintln!("without a loop device: {}", String::from_utf8_lossy(&mounted.stderr));
            let files = (0..200).map(|n| format!("write {} {name}/tree/f{n}\n", at(&format!("tree/f{n}"))));
            let script = format!("mkdir {name}\nmkdir {name}/tree\n{}", files.collect::<String>());
            fs::write(at("script"), script).unwrap();
            run(&["debugfs", "-w", "-f", &at("script"), &image]);
        }
    };
    let holds = |path: &Path, name: &str| {
        let image = path.display().to_string();
        run(&["e2fsck", "-fn", &image]);
        for n in [0_u32, 1, 77, 199] {
            let file = format!("{name}/tree/f{n}");
            run(&["debugfs", "-R", &format!("dump {file} {}", at("back")), &image]);
            assert!(fs::read(at("back")).unwrap() == vec![n as u8; (n * n) as usize], "{file}");
        }
    };
    let one = version(&host, "image", 1);
    unpack(&one, "a");
    assert_eq!(done_on(&one, &["commit"]), [2]);
    let two = version(&host, "image", 2);
    holds(&two, "a");
    // Clones that diverge, and the version they came from.
    unpack(&two, "b");
    assert_eq!(done_on(&two, &["clone=other", "commit"]), [1]);
    unpack(&two, "c");
    assert_eq!(done_on(&two, &["commit"]), [3]);
    let (other, three) = (version(&host, "other", 1), version(&host, "image", 3));
    for (path, here, not) in [(&other, "b", "c"), (&three, "c", "b"), (&two, "a", "b")] {
        holds(path, here);
        holds(path, "a");
        let listed = run(&["debugfs", "-R", "ls -p /", &path.display().to_string()]);
        assert!(!listed.contains(&format!("/{not}/")), "{listed}");
    }
    host.command(&["verify"]).map(|_| ())
}

#[test]
fn a_file_that_was_withdrawn_is_made_anew_by_the_mirror_that_takes_over() -> Outcome {
    let (host, dir) = (host("tw"), tempfile::tempdir()?);
    keeper(&host, dir.path())?;
    host.command(&["blob", "create", "b", "1M"])?;
    let path = version(&host, "b", 0);
    for round in 1..=3 {
        // Opened for writing and left as it was, so that tidying up withdraws it.
        assert!(done_on(&path, &[]).is_empty());
        eventually("nothing is left of the file", || {
            host.command(&["blob", "create", "other", "1M"])?;
            host.command(&["blob", "rm", "other"])?;
            Ok(host.client.get::<Vec<api::BlobFile>>("/v1/blob-files")?.is_empty())
        })?;
        kill_some(&host, round % 3)?;
        assert_eq!(done_on(&path, &["write=0,5,4096", "byte=0"]), [5], "round {round}");
        host.command(&["blob", "discard", "b@0"])?;
    }
    Ok(())
}

#[test]
fn commits_are_made_once_whatever_dies_and_whenever() -> Outcome {
    let (host, dir) = (host("tk"), tempfile::tempdir()?);
    keeper(&host, dir.path())?;
    host.command(&["blob", "create", "b", "8M"])?;
    let mut expected = 0;
    for round in 0..12_u64 {
        let path = version(&host, "b", expected);
        let fill = (round + 1) as u8;
        let words = [format!("write={},{fill},300000", round * 500_000 + 7), "commit".to_owned()];
        let mut child = Command::new("python3")
            .args(["-c", IOCTLS])
            .arg(&path)
            .args(&words)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        std::thread::sleep(Duration::from_millis(20 + round * 13 % 90));
        kill_some(&host, round % 3)?;
        let (mut said, mut failed) = (String::new(), String::new());
        let (out, err) = (child.stdout.take().ok_or("piped")?, child.stderr.take().ok_or("piped")?);
        let status = wait(child)?;
        std::io::Read::read_to_string(&mut { out }, &mut said)?;
        std::io::Read::read_to_string(&mut { err }, &mut failed)?;
        assert!(status.success(), "round {round}: {failed}");
        expected += 1;
        assert_eq!(said.trim(), expected.to_string(), "round {round}");
        let log: Vec<api::BlobVersion> = host.client.get("/v1/blobs/b/log")?;
        assert_eq!(log.len() as u64, expected + 1, "one version for each commit: {log:?}");
        let now = stored(&host, &format!("b@{expected}"));
        for past in 0..=round {
            let part = &now[(past * 500_000 + 7) as usize..][..300_000];
            assert!(part.iter().all(|&b| b == (past + 1) as u8), "round {round} has not what {past} wrote");
        }
    }
    // Nothing that was local is left, and the store is whole.
    let files: Vec<api::BlobFile> = host.client.get("/v1/blob-files")?;
    assert!(files.iter().all(|f| f.changed_bytes == 0), "{files:?}");
    host.command(&["verify"]).map(|_| ())
}

/// `fsx` for some seconds, and for as long as it takes until something was killed: with kills in between, and what
/// `between` does now and then.
fn fsx(host: &TestHost, fsx: &mut Fsx, mut between: impl FnMut(&mut Fsx) -> Outcome) -> Outcome {
    let (seconds, every) = if std::env::var_os("OFFSHOOT_TEST_FULL").is_some() { (600, 3000) } else { (8, 400) };
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut steps = 0_u64;
    while Instant::now() < end || steps <= every {
        fsx.step();
        steps += 1;
        if steps.is_multiple_of(every) {
            kill_some(host, fsx.chance(3))?;
            fsx.check();
        }
        if steps.is_multiple_of(150) {
            between(fsx)?;
        }
    }
    fsx.check();
    eprintln!("{steps} operations");
    Ok(())
}

fn seed() -> u64 {
    let given = std::env::var("OFFSHOOT_SEED").ok().and_then(|s| s.parse().ok());
    given.unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().map_or(1, |d| d.as_nanos() as u64))
}

#[test]
fn fsx_on_a_mirrored_file_with_commits_in_between() -> Outcome {
    let (host, dir) = (host("tf"), tempfile::tempdir()?);
    keeper(&host, dir.path())?;
    host.command(&["blob", "create", "b", "3000001"])?;
    let mut number = 0;
    let mut model = Fsx::of(&version(&host, "b", 0), seed());
    fsx(&host, &mut model, |fsx| {
        // By another program, while this one has it open.
        number = host
            .client
            .post::<api::BlobFile>(
                "/v1/blob-files/commit",
                &api::BlobFileChange { blob: "b".into(), number, name: None },
            )?
            .number;
        let path = version(&host, "b", number);
        assert!(stored(&host, &format!("b@{number}")) == fsx.model(), "version {number}");
        assert!(fs::read(&path)? == fsx.model(), "the file of version {number}");
        if fsx.chance(2) == 0 {
            fsx.reopen(&path);
        }
        Ok(())
    })?;
    assert!(number > 0);
    model.file().sync_all()?;
    host.command(&["verify"]).map(|_| ())
}

#[test]
fn fsx_on_a_disk_and_what_nbd_shows_of_it() -> Outcome {
    let (host, dir) = (host("td"), tempfile::tempdir()?);
    keeper(&host, dir.path())?;
    host.command(&["nbd", "serve", "tiny", "--writable", "--name", "w"])?;
    let served: Vec<api::NbdExport> = host.client.get("/v1/nbd")?;
    let uri = served[0].uri.clone().ok_or("not served")?;
    let listed = mirror::client::Client::new(host.home.join("run/mirror.sock")).list()?.overlays;
    let disk = listed.iter().find(|o| o.vm == "nbd:w").ok_or("no disk")?.id;
    let mut model = Fsx::of(&mirror::disk_path(&host.home, disk), seed());
    let back = dir.path().join("back").display().to_string();
    fsx(&host, &mut model, |fsx| {
        // NBD clients write as well: what they do is seen in the file, and the other way round.
        let (at, fill) = (fsx.chance(2000) * 4096, 1 + fsx.chance(250));
        eventually("an NBD client gets through", || {
            let write = format!("write -P {fill} {at} 8192");
            let zero = format!("write -z {} 4096", at + 4096);
            let discard = format!("discard {} 4096", at + 4096);
            let more = ["-c", &write, "-c", &zero, "-c", &discard, "-c", "flush"];
            Ok(Command::new("qemu-io").args(["-f", "raw"]).args(more).arg(&uri).output()?.status.success())
        })?;
        fsx.written(at, &[vec![fill as u8; 4096], vec![0; 4096]].concat());
        run(&["nbdcopy", &uri, &back]);
        assert!(fs::read(&back)? == fsx.model());
        Ok(())
    })
}

#[test]
fn fio_verifies_through_kills_of_mirror_and_daemon() -> Outcome {
    let (host, dir) = (host("tv"), tempfile::tempdir()?);
    keeper(&host, dir.path())?;
    host.command(&["blob", "create", "b", "64M"])?;
    let path = version(&host, "b", 0);
    let fio = |more: &[&str]| {
        let file = format!("--filename={}", path.display());
        let mut words = vec!["--name=v", "--rw=randwrite", "--bs=4k-64k", "--size=64M", "--iodepth=8"];
        words.extend(["--ioengine=psync", "--thread", "--numjobs=1", "--randseed=7", "--fsync=64"]);
        words.extend(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--allow_file_create=0"]);
        words.extend(more);
        let dir = dir.path();
        Command::new("fio")
            .current_dir(dir)
            .args(words)
            .arg(file)
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
    };
    for round in 0..2 {
        let mut writing = fio(&["--do_verify=0"])?;
        let mut kills = 0;
        while writing.try_wait()?.is_none() && kills < 6 {
            std::thread::sleep(Duration::from_millis(60));
            kill_some(&host, kills % 3)?;
            kills += 1;
        }
        assert!(wait(writing)?.success(), "round {round}");
        assert!(kills > 1, "fio was too fast: {kills} kills");
        kill_some(&host, 2)?;
        assert!(wait(fio(&["--verify_only"])?)?.success(), "round {round}");
    }
    // What verifies is what becomes a version.
    assert_eq!(done_on(&path, &["commit"]), [1]);
    let before = fs::read(version(&host, "b", 1))?;
    kill_some(&host, 2)?;
    assert!(stored(&host, "b@1") == before);
    host.command(&["verify"]).map(|_| ())
}
