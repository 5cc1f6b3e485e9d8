use super::*;
use std::fs;
use std::process::Command;

/// A directory with inputs, and the work directory that must be empty again after a refusal.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        fs::write(self.at(name), bytes).unwrap();
        self.at(name)
    }

    /// A root file system with two kernels.
    fn tree(&self) -> PathBuf {
        let root = self.at("tree");
        fs::create_dir_all(root.join("boot")).unwrap();
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\n").unwrap();
        for version in ["6.1.0-9", "6.1.0-10"] {
            fs::write(root.join(format!("boot/vmlinuz-{version}")), kernel(version)).unwrap();
            fs::write(root.join(format!("boot/initrd.img-{version}")), format!("initrd of {version}")).unwrap();
        }
        std::os::unix::fs::symlink("/proc/self/mounts", root.join("etc/mtab")).unwrap();
        root
    }

    fn import(&self, path: &Path, options: &ImportOptions) -> Result<Parts, Error> {
        import(path, options, &self.at("work"), &mut |_| ())
    }

    fn refuses(&self, path: &Path, options: &ImportOptions, words: &[&str]) {
        let said = self.import(path, options).expect_err("must be refused").to_string();
        let name = path.file_name().unwrap().to_str().unwrap();
        for word in words.iter().chain(&[name]) {
            assert!(said.contains(word), "`{said}` does not say `{word}`");
        }
        assert_eq!(fs::read_dir(self.at("work")).unwrap().count(), 0, "something was left behind");
    }

    /// Options that need no kernel inside.
    fn with_kernel(&self) -> ImportOptions {
        let kernel = Some(self.file("k", &kernel("5")));
        ImportOptions { kernel, cmdline: Some("quiet".to_owned()), ..Default::default() }
    }
}

/// What starts like a bzImage that says it is `version`.
fn kernel(version: &str) -> Vec<u8> {
    let mut bytes = vec![0; 0x400];
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
    bytes[0x300..0x300 + version.len()].copy_from_slice(version.as_bytes());
    bytes
}

fn tool(name: &str, args: &[&str]) -> String {
    let out = Command::new(name).args(args).output().expect("the tool is installed");
    assert!(out.status.success(), "{name} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn small() -> ImportOptions {
    ImportOptions { size: Some(64 << 20), ..Default::default() }
}

#[test]
fn a_directory_becomes_a_sound_disk_with_its_newest_kernel() {
    let bench = Bench::new();
    let parts = bench.import(&bench.tree(), &small()).unwrap();
    tool("e2fsck", &["-fn", text(&parts.disk)]);
    assert_eq!((parts.size, parts.disk.metadata().unwrap().len()), (64 << 20, 64 << 20));
    assert_eq!(fs::read(&parts.kernel).unwrap(), kernel("6.1.0-10"));
    assert_eq!(inspect::kernel_version(&parts.kernel).as_deref(), Some("6.1.0-10"));
    assert_eq!(fs::read(parts.initrd.as_ref().unwrap()).unwrap(), b"initrd of 6.1.0-10");
    assert_eq!(parts.cmdline, "console=ttyS0 root=/dev/vda rw quiet");
    let link = tool("debugfs", &["-R", "stat /etc/mtab", text(&parts.disk)]);
    assert!(link.contains("/proc/self/mounts"), "the link is kept as a link: {link}");
    drop(parts);
    assert_eq!(fs::read_dir(bench.at("work")).unwrap().count(), 0, "the parts' files go with them");
}

#[test]
fn an_archive_becomes_the_same_disk() {
    let bench = Bench::new();
    let tree = bench.tree();
    for (flag, name) in [("-c", "a.tar"), ("-cz", "a.tar.gz"), ("-cJ", "a.tar.xz"), ("-c", "a.tar.zst")] {
        let archive = bench.at(name);
        let zstd = if name.ends_with("zst") { "--use-compress-program=zstd" } else { "--no-same-owner" };
        tool("tar", &[zstd, flag, "-f", text(&archive), "-C", text(&tree), "."]);
        let parts = bench.import(&archive, &small()).unwrap();
        tool("e2fsck", &["-fn", text(&parts.disk)]);
        assert_eq!(fs::read(&parts.kernel).unwrap(), kernel("6.1.0-10"), "{name}");
    }
}

#[test]
fn disks_are_taken_whole_partitioned_raw_and_qcow2() {
    let bench = Bench::new();
    let parts = bench.import(&bench.tree(), &small()).unwrap();
    let whole = fs::read(&parts.disk).unwrap();
    let mut partitioned = vec![0; 1 << 20];
    partitioned.extend_from_slice(&whole);
    partitioned[446 + 16 + 4] = 0x83;
    partitioned[446 + 16 + 8..][..4].copy_from_slice(&2048u32.to_le_bytes());
    partitioned[446 + 16 + 12..][..4].copy_from_slice(&(whole.len() as u32 / 512).to_le_bytes());
    partitioned[510..512].copy_from_slice(&[0x55, 0xaa]);
    for (disk, root) in [(whole, "/dev/vda"), (partitioned, "/dev/vda2")] {
        let raw = bench.file("disk, with a comma.raw", &disk);
        let qcow2 = bench.at("disk, with a comma.qcow2");
        tool("qemu-img", &["convert", "-O", "qcow2", "-c", text(&raw), text(&qcow2)]);
        for path in [raw, qcow2] {
            let parts = bench.import(&path, &ImportOptions::default()).unwrap();
            assert_eq!(parts.cmdline, format!("console=ttyS0 root={root} rw quiet"));
            assert_eq!(fs::read(&parts.kernel).unwrap(), kernel("6.1.0-10"));
            assert!(fs::read(&parts.disk).unwrap() == disk, "{} has other contents", path.display());
        }
    }
}

#[test]
fn what_is_given_is_not_looked_for() {
    let bench = Bench::new();
    let disk = bench.file("tiny.raw", &[7; 512]);
    let mut options = bench.with_kernel();
    let parts = bench.import(&disk, &options).unwrap();
    assert_eq!((parts.disk.as_path(), parts.size, parts.initrd.as_ref()), (disk.as_path(), 4096, None));
    assert_eq!(parts.cmdline, "quiet");
    drop(parts);
    options.size = Some(1 << 20);
    assert_eq!(bench.import(&disk, &options).unwrap().size, 1 << 20);
    options.cmdline = None;
    bench.refuses(&disk, &options, &["--cmdline"]);
    bench.refuses(&disk, &ImportOptions::default(), &["--kernel"]);
    options.kernel = Some(bench.file("not-a-kernel", b"#!/bin/sh"));
    options.cmdline = Some(String::new());
    let said = bench.import(&disk, &options).unwrap_err().to_string();
    assert!(said.contains("not-a-kernel") && said.contains("not a Linux kernel"), "{said}");
}

#[test]
fn qcow2_disks_that_name_other_files_are_refused() {
    let bench = Bench::new();
    let base = bench.file("base.raw", &[1; 4096]);
    let options = bench.with_kernel();
    let backed = bench.at("backed.qcow2");
    tool("qemu-img", &["create", "-f", "qcow2", "-F", "raw", "-b", text(&base), text(&backed)]);
    bench.refuses(&backed, &options, &["backing file", "base.raw"]);
    let external = bench.at("external.qcow2");
    let data = format!("data_file={}", text(&bench.at("secret.data")));
    tool("qemu-img", &["create", "-f", "qcow2", "-o", &data, text(&external), "1M"]);
    bench.refuses(&external, &options, &["external file", "secret.data"]);
}

#[test]
fn truncated_and_corrupt_disks_are_refused() {
    let bench = Bench::new();
    let options = bench.with_kernel();
    let raw = bench.file("full.raw", &(0..4u32 << 20).flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>());
    let whole = bench.at("whole.qcow2");
    tool("qemu-img", &["convert", "-O", "qcow2", text(&raw), text(&whole)]);
    let bytes = fs::read(&whole).unwrap();
    bench.import(&whole, &options).unwrap();
    let empty = bench.at("empty.qcow2");
    tool("qemu-img", &["create", "-f", "qcow2", text(&empty), "1M"]);
    assert_eq!(bench.import(&empty, &options).unwrap().size, 1 << 20);
    for len in [3, 60, 110, 70_000, bytes.len() / 2, bytes.len() - 70_000, bytes.len() - 4096] {
        let cut = bench.file("cut.qcow2", &bytes[..len]);
        let options = ImportOptions { kind: Kind::Qcow2, ..options.clone() };
        let said = bench.import(&cut, &options).expect_err("a truncated disk").to_string();
        assert!(said.contains("cut.qcow2"), "cut to {len}: {said}");
    }
    let mut corrupt = bytes.clone();
    corrupt[0x30000..0x30100].fill(0xee);
    bench.refuses(&bench.file("corrupt.qcow2", &corrupt), &options, &["corrupt.qcow2"]);

    bench.refuses(&bench.file("odd.raw", &[0; 1000]), &options, &["sectors"]);
    bench.refuses(&bench.file("empty.raw", b""), &options, &["sectors"]);
    let parts = bench.import(&bench.tree(), &small()).unwrap();
    let half = bench.file("half.raw", &fs::read(&parts.disk).unwrap()[..32 << 20]);
    drop(parts);
    bench.refuses(&half, &options, &["truncated"]);
}

#[test]
fn foreign_formats_and_oversized_disks_are_refused() {
    let bench = Bench::new();
    let options = bench.with_kernel();
    for format in ["vmdk", "vhdx", "vpc", "vdi"] {
        let path = bench.at(&format!("disk.{format}"));
        tool("qemu-img", &["create", "-f", format, text(&path), "8M"]);
        bench.refuses(&path, &options, &["convert it first"]);
    }
    let bomb = bench.at("bomb.qcow2");
    tool("qemu-img", &["create", "-f", "qcow2", text(&bomb), "8T"]);
    bench.refuses(&bomb, &options, &["8.0 TiB", "limit"]);
    let sparse = bench.at("sparse.raw");
    fs::File::create(&sparse).unwrap().set_len(2 << 40).unwrap();
    bench.refuses(&sparse, &options, &["2.0 TiB", "limit"]);
    let shrunk = ImportOptions { size: Some(4096), ..options };
    bench.refuses(&bench.file("four.raw", &[1; 8192]), &shrunk, &["cannot shrink"]);
}

#[test]
fn hostile_archives_and_trees_leave_nothing_behind() {
    let bench = Bench::new();
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..9].copy_from_slice(b"../escape");
    header.set_size(0);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    let mut hostile = tar::Builder::new(Vec::new());
    hostile.append(&header, &b""[..]).unwrap();
    let hostile = bench.file("hostile.tar", &hostile.into_inner().unwrap());
    bench.refuses(&hostile, &bench.with_kernel(), &["../escape"]);
    assert!(!bench.at("work/escape").exists() && !bench.at("escape").exists());

    let tree = bench.tree();
    fs::write(tree.join("large"), vec![1; 2 << 20]).unwrap();
    bench.refuses(&tree, &ImportOptions { size: Some(1 << 20), ..Default::default() }, &["more than the 1.0 MiB"]);
    let said = bench.import(&bench.at("absent"), &ImportOptions::default()).unwrap_err().to_string();
    assert!(said.contains("absent"), "{said}");
}

/// A small file system in memory, gone with this.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(at: PathBuf, size: &str) -> Self {
        fs::create_dir_all(&at).unwrap();
        tool("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "none", text(&at)]);
        Self(at)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["--lazy", text(&self.0)]).status();
    }
}

#[test]
fn a_full_disk_ends_an_import_and_leaves_nothing() {
    let bench = Bench::new();
    let tree = bench.tree();
    let noise: Vec<u8> = (0..3u32 << 20).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(tree.join("large"), &noise).unwrap();
    let archive = bench.at("large.tar");
    tool("tar", &["-cf", text(&archive), "-C", text(&tree), "."]);
    let raw = bench.file("large.raw", &noise);
    let qcow2 = bench.at("large.qcow2");
    tool("qemu-img", &["convert", "-O", "qcow2", text(&raw), text(&qcow2)]);
    let _tmpfs = Tmpfs::new(bench.at("work"), "6M");
    for (path, options) in [(&tree, small()), (&archive, small()), (&qcow2, bench.with_kernel())] {
        let said = bench.import(path, &options).expect_err("the disk is full").to_string();
        assert!(said.contains("space") || said.contains("allocate"), "{}: `{said}`", path.display());
        assert_eq!(fs::read_dir(bench.at("work")).unwrap().count(), 0, "{}", path.display());
    }
}
