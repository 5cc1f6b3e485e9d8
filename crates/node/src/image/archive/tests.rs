use super::entry::clean;
use super::*;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use tar::{Builder, EntryType, Header};

const LIMITS: Limits = Limits { bytes: 1 << 20, entries: 1000 };

/// An archive under construction whose headers may say anything.
struct Tar(Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn entry(mut self, kind: EntryType, name: &str, link: &str, contents: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_size(contents.len() as u64);
        header.set_mode(0o750);
        header.set_uid(1000);
        header.set_gid(1001);
        header.set_mtime(1_000_000);
        header.set_cksum();
        self.0.append(&header, contents).unwrap();
        self
    }

    fn file(self, name: &str, contents: &str) -> Self {
        self.entry(EntryType::Regular, name, "", contents.as_bytes())
    }

    fn dir(self, name: &str) -> Self {
        self.entry(EntryType::Directory, name, "", b"")
    }

    fn link(self, kind: EntryType, name: &str, to: &str) -> Self {
        self.entry(kind, name, to, b"")
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// A place with an archive, the directory to unpack into, and a neighbour that nothing may touch.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/precious"), "kept").unwrap();
        Self { dir }
    }

    fn unpack(&self, bytes: &[u8]) -> Result<Unpacked, Error> {
        self.unpack_within(bytes, LIMITS)
    }

    fn unpack_within(&self, bytes: &[u8], limits: Limits) -> Result<Unpacked, Error> {
        let archive = self.dir.path().join("a.tar");
        fs::write(&archive, bytes).unwrap();
        unpack(&archive, &self.root(), limits, &mut |_| ())
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// Asserts that `bytes` are refused with a message that holds `words`, and that nothing outside changed.
    fn refuses(bytes: &[u8], words: &[&str]) {
        let bench = Self::new();
        let said = bench.unpack(bytes).expect_err("must be refused").to_string();
        for word in words {
            assert!(said.contains(word), "`{said}` does not say `{word}`");
        }
        let names = |dir: &str| {
            let mut names: Vec<_> =
                fs::read_dir(bench.dir.path().join(dir)).unwrap().map(|e| e.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names("."), ["a.tar", "outside", "root"]);
        assert_eq!(names("outside"), ["precious"]);
        assert_eq!(fs::read_to_string(bench.dir.path().join("outside/precious")).unwrap(), "kept");
    }
}

#[test]
fn a_root_file_system_comes_out_as_it_went_in() {
    let bench = Bench::new();
    let bytes = Tar::new()
        .dir("./")
        .dir("./etc/")
        .file("./etc/hosts", "127.0.0.1 localhost")
        .link(EntryType::Symlink, "etc/mtab", "/proc/self/mounts")
        .link(EntryType::Symlink, "etc/up", "../../../..")
        .link(EntryType::Link, "etc/hosts.hard", "./etc/hosts")
        .file("usr/bin/no/parent/entry", "made")
        .link(EntryType::Symlink, "bin", "usr/bin")
        .file("bin/tool", "through a link that stays inside")
        .entry(EntryType::Fifo, "run.fifo", "", b"")
        .file("etc/hosts.twice", "first")
        .file("etc/hosts.twice", "second")
        .bytes();
    let seen = bench.unpack(&bytes).unwrap();
    assert_eq!(seen.entries, 12);
    let at = |path: &str| bench.root().join(path);
    assert_eq!(fs::read_to_string(at("etc/hosts")).unwrap(), "127.0.0.1 localhost");
    assert_eq!(fs::read_link(at("etc/mtab")).unwrap(), PathBuf::from("/proc/self/mounts"));
    assert_eq!(fs::read_link(at("etc/up")).unwrap(), PathBuf::from("../../../.."));
    assert_eq!(fs::metadata(at("etc/hosts")).unwrap().ino(), fs::metadata(at("etc/hosts.hard")).unwrap().ino());
    assert_eq!(fs::read_to_string(at("usr/bin/tool")).unwrap(), "through a link that stays inside");
    assert_eq!(fs::read_to_string(at("etc/hosts.twice")).unwrap(), "second");
    assert!(fs::symlink_metadata(at("run.fifo")).unwrap().file_type().is_fifo());
    let (file, dir) = (fs::metadata(at("etc/hosts")).unwrap(), fs::metadata(at("etc")).unwrap());
    assert_eq!(
        (file.uid(), file.gid(), file.permissions().mode() & 0o7777, file.mtime()),
        (1000, 1001, 0o750, 1_000_000)
    );
    assert_eq!((dir.uid(), dir.mtime()), (1000, 1_000_000), "a directory's time survives what is put into it");
}

#[test]
fn devices_and_attributes_are_kept() {
    let bench = Bench::new();
    let mut header = Header::new_ustar();
    header.set_path("dev/null").unwrap();
    header.set_entry_type(EntryType::Char);
    header.set_device_major(1).unwrap();
    header.set_device_minor(3).unwrap();
    header.set_mode(0o666);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    header.set_cksum();
    let mut tar = Builder::new(Vec::new());
    tar.append(&header, &b""[..]).unwrap();
    tar.append_pax_extensions([("SCHILY.xattr.user.colour", &b"blue"[..]), ("uid", b"70000")]).unwrap();
    bench.unpack(&Tar(tar).file("ping", "x").bytes()).unwrap();
    let device = fs::symlink_metadata(bench.root().join("dev/null")).unwrap();
    assert_eq!((device.rdev(), device.permissions().mode() & 0o7777), (rustix::fs::makedev(1, 3), 0o666));
    let mut value = [0; 16];
    let len = rustix::fs::getxattr(bench.root().join("ping"), "user.colour", &mut value).unwrap();
    assert_eq!((&value[..len], fs::metadata(bench.root().join("ping")).unwrap().uid()), (&b"blue"[..], 70000));
}

#[test]
fn names_that_lead_outside_are_refused() {
    Bench::refuses(&Tar::new().file("../outside/new", "x").bytes(), &["`../outside/new`", "`..`"]);
    Bench::refuses(&Tar::new().file("a/../../outside/new", "x").bytes(), &["a/../../outside/new"]);
    Bench::refuses(&Tar::new().file("/etc/passwd", "x").bytes(), &["`/etc/passwd`", "absolute"]);
    Bench::refuses(&Tar::new().dir("..").bytes(), &["`..`"]);
    Bench::refuses(&Tar::new().link(EntryType::Symlink, "/tmp/l", "x").bytes(), &["`/tmp/l`"]);
    Bench::refuses(&Tar::new().file(".", "x").bytes(), &["root directory"]);
}

#[test]
fn links_are_never_followed_outside() {
    for target in ["../outside", "/", "/proc/self/root", "up/../../outside"] {
        let bytes = Tar::new().dir("up").link(EntryType::Symlink, "door", target).file("door/new", "x").bytes();
        Bench::refuses(&bytes, &["`door/new`", "leads outside through a link"]);
        let bytes = Tar::new().dir("up").link(EntryType::Symlink, "door", target).dir("door/new/deep").bytes();
        Bench::refuses(&bytes, &["`door/new/deep`", "leads outside through a link"]);
    }
    // What stands in an entry's place is replaced, not written through.
    let bench = Bench::new();
    let link = Tar::new().link(EntryType::Symlink, "note", "../outside/precious");
    bench.unpack(&link.file("note", "changed").bytes()).unwrap();
    assert_eq!(fs::read_to_string(bench.dir.path().join("outside/precious")).unwrap(), "kept");
    assert_eq!(fs::read_to_string(bench.root().join("note")).unwrap(), "changed");
    // A directory over a link does not take the owner and mode of what the link points to.
    let bytes = Tar::new().link(EntryType::Symlink, "d", "../outside").dir("d").bytes();
    Bench::refuses(&bytes, &["`d`", "no directory"]);
}

#[test]
fn hard_links_reach_earlier_entries_only() {
    for target in ["/etc/passwd", "../outside/precious"] {
        Bench::refuses(&Tar::new().link(EntryType::Link, "l", target).bytes(), &["`l`", "hard link", target]);
    }
    Bench::refuses(&Tar::new().link(EntryType::Link, "l", "later").bytes(), &["`l`", "`later`"]);
    let through = Tar::new().link(EntryType::Symlink, "door", "../outside").link(EntryType::Link, "l", "door/precious");
    Bench::refuses(&through.bytes(), &["`l`", "leads outside through a link"]);
}

#[test]
fn what_is_declared_is_bounded() {
    let bench = Bench::new();
    let limits = Limits { bytes: 10, entries: 2 };
    let big = bench.unpack_within(&Tar::new().file("big", "eleven char").bytes(), limits).unwrap_err().to_string();
    assert!(big.contains("`big`") && big.contains("limit"), "{big}");
    let many = bench.unpack_within(&Tar::new().dir("a").dir("b").dir("c").bytes(), limits).unwrap_err().to_string();
    assert!(many.contains("`c`") && many.contains("more than 2 entries"), "{many}");
    let mut bomb = Tar::new().file("sparse", "").bytes();
    let header = Header::from_byte_slice(&bomb[..512]);
    let mut header = header.clone();
    header.set_size(1 << 40);
    header.set_cksum();
    bomb[..512].copy_from_slice(header.as_bytes());
    Bench::refuses(&bomb, &["`sparse`", "1.0 TiB"]);
    Bench::refuses(&Tar::new().entry(EntryType::GNUSparse, "s", "", b"").bytes(), &["`s`", "sparse"]);
    let long = vec![b'a'; 2 << 20];
    Bench::refuses(
        &Tar::new().entry(EntryType::GNULongName, "@", "", &long).file("f", "").bytes(),
        &["extended header"],
    );
}

#[test]
fn truncated_and_corrupt_archives_are_refused_at_every_length() {
    let whole = Tar::new().file("a", "first").file("b", &"0".repeat(1500)).bytes();
    let end = whole.len() - 1024;
    for len in (1..=end).step_by(53).chain([512, 1024, end]) {
        let bench = Bench::new();
        assert!(bench.unpack(&whole[..len]).is_err(), "{len} of {} bytes were taken for a whole archive", whole.len());
    }
    let mut flipped = whole.clone();
    flipped[1024 + 3] ^= 0x40;
    Bench::refuses(&flipped, &["not a whole tar archive"]);
    Bench::refuses(&[0; 10240], &["empty"]);
    Bench::refuses(&whole[..1024 + 512 + 100], &["`b`", "truncated"]);
}

#[test]
fn compressed_archives_are_decompressed_and_checked() {
    let tar = Tar::new().file("a", &"text ".repeat(2000)).bytes();
    for tool in ["gzip", "xz", "zstd"] {
        let packed = compress(tool, &tar);
        let bench = Bench::new();
        assert_eq!(bench.unpack(&packed).unwrap().entries, 1, "{tool}");
        for cut in [packed.len() / 2, packed.len() - 1] {
            let said = Bench::new().unpack(&packed[..cut]).expect_err(tool).to_string();
            assert!(said.contains(tool) || said.contains("truncated"), "{tool} cut to {cut} bytes: {said}");
        }
        let mut flipped = packed.clone();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 0xff;
        assert!(Bench::new().unpack(&flipped).is_err(), "{tool} with a flipped byte");
        Bench::refuses(&compress(tool, &vec![7; 1 << 20]), &["not a whole tar archive"]);
    }
}

#[test]
fn paths_are_cleaned() {
    for (given, cleaned) in [("./a/./b", "a/b"), ("a//b/", "a/b"), (".", ""), ("...", "..."), ("a/..b", "a/..b")] {
        assert_eq!(clean(given.as_bytes()), Ok(PathBuf::from(cleaned)), "{given}");
    }
    for given in ["", "/", "/a", "..", "a/..", "a/../b", "a\0b"] {
        assert!(clean(given.as_bytes()).is_err(), "{given}");
    }
}

fn compress(tool: &str, bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new(tool)
        .arg("-c")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the tool is installed");
    let mut stdin = child.stdin.take().unwrap();
    let bytes = bytes.to_vec();
    let feeder = std::thread::spawn(move || stdin.write_all(&bytes).unwrap());
    let out = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    assert!(out.status.success());
    out.stdout
}
