use super::*;
use crate::stores::deploy::trace::await_socket;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// A disk of 1 MiB served by `qemu-nbd`, and what it holds.
struct Served(Child, PathBuf);

impl Served {
    fn new(name: &str) -> (Self, File) {
        let dir = std::env::temp_dir().join(format!("offshoot-replay-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (disk, reference) = (dir.join("disk"), dir.join("reference"));
        let content: Vec<u8> = (0..1u32 << 18).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        std::fs::write(&disk, &content).unwrap();
        std::fs::write(&reference, &content).unwrap();
        let child = Command::new("qemu-nbd")
            .args(["--persistent", "--format=raw", "--export-name=disk", "--socket"])
            .arg(dir.join("sock"))
            .arg(&disk)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        await_socket(&dir.join("sock")).unwrap();
        (Self(child, dir), File::open(reference).unwrap())
    }

    fn replay(&self, steps: Vec<Step>, reference: &File) -> Outcome {
        replay(&self.1.join("sock"), "disk", &Trace { steps }, Some(reference))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = std::fs::remove_dir_all(&self.1);
    }
}

fn at(offset: u64, bytes: u64) -> ByteRange {
    ByteRange::at(offset, bytes)
}

#[test]
fn a_real_server_is_asked_and_its_bytes_are_compared() {
    let (served, reference) = Served::new("right");
    let steps = vec![
        Step::Ask(Ask::Read(at(0, 65536))),
        Step::Ask(Ask::Write(at(8192, 4096))),
        Step::Ask(Ask::Read(at(1 << 19, 512))),
        Step::Await(1),
        Step::Ask(Ask::Flush),
        Step::Await(0),
        Step::Await(3),
        Step::Ask(Ask::Zero(at(65536, 4096))),
        Step::Await(4),
        Step::Ask(Ask::Read(at(4096, 131_072))),
    ];
    served.replay(steps, &reference).unwrap();
    let mut disk = [0; 16];
    File::open(served.1.join("disk")).unwrap().read_exact_at(&mut disk, 8192).unwrap();
    assert_eq!(number(&disk[..8]), 1024, "what is written arrives");
}

#[test]
fn other_bytes_are_found() {
    let (served, reference) = Served::new("wrong");
    let disk = File::options().write(true).open(served.1.join("disk")).unwrap();
    disk.write_all_at(b"x", 70_000).unwrap();
    let error = served.replay(vec![Step::Ask(Ask::Read(at(65536, 8192)))], &reference).unwrap_err().to_string();
    assert!(error.contains("sector 136 "), "{error}");
}

#[test]
fn a_server_that_refuses_or_ends_is_an_error() {
    let (mut served, reference) = Served::new("gone");
    let beyond = served.replay(vec![Step::Ask(Ask::Read(at(1 << 20, 512)))], &reference).unwrap_err().to_string();
    assert!(beyond.contains("answers error"), "{beyond}");
    let socket = served.1.join("sock");
    assert!(replay(&socket, "other", &Trace::default(), None).unwrap_err().to_string().contains("refused"));
    served.0.kill().unwrap();
    served.0.wait().unwrap();
    assert!(served.replay(vec![Step::Ask(Ask::Flush)], &reference).is_err());
}
