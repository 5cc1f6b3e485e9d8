//! Every kernel that the product claims to color, each in a guest of its own.

use super::{Judged, Matrix, Options, Parts, judge};
use crate::Outcome;
use crate::report::Figure;
use guest::Color;
use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// One guest of the matrix.
struct Variant {
    name: &'static str,
    /// Suite and package of its kernel.
    suite: &'static str,
    kernel: &'static str,
    memory_bytes: u64,
    cpu: &'static str,
    arguments: &'static str,
    /// Whether its free pages may be dropped.
    droppable: bool,
}

const MIB: u64 = 1 << 20;
const PLAIN: Variant = Variant {
    name: "cloud 6.1",
    suite: "bookworm",
    kernel: "linux-image-cloud-amd64",
    memory_bytes: 512 * MIB,
    cpu: "Westmere-v1,+rdrand",
    arguments: "",
    droppable: true,
};
const VARIANTS: [Variant; 8] = [
    PLAIN,
    // The processor with all that the emulator has: five levels of page tables.
    Variant { name: "cloud 6.1, five levels", cpu: "max", ..PLAIN },
    Variant { name: "cloud 6.1, 3 GiB", memory_bytes: 3072 * MIB, ..PLAIN },
    Variant {
        name: "generic 6.1, page_poison=1",
        kernel: "linux-image-amd64",
        arguments: "page_poison=1",
        memory_bytes: 384 * MIB,
        droppable: false,
        ..PLAIN
    },
    Variant {
        name: "generic 6.1, pti=on no5lvl nokaslr",
        kernel: "linux-image-amd64",
        arguments: "pti=on no5lvl nokaslr",
        memory_bytes: 640 * MIB,
        ..PLAIN
    },
    Variant { name: "rt 6.1", kernel: "linux-image-rt-amd64", ..PLAIN },
    // QEMU 7.2's emulation of `cmpxchg16b` makes 6.12 crash as it boots.
    Variant { name: "cloud 6.12", suite: "bookworm-backports", cpu: "Westmere-v1,+rdrand,-cx16", ..PLAIN },
    Variant { name: "cloud 5.10", suite: "bullseye", ..PLAIN },
];
/// What memory is filled to, percent. Under pressure the kernel keeps more free than is asked.
const FILL: u32 = 88;
/// Colors of fewer pages are shown, but no figure rests on them.
const PAGES_LEAST: u64 = 128;
const COMMAND: &str = "make bench-prefetch";
const CMDLINE: &str = "console=ttyS0 root=/dev/vda rw quiet net.ifnames=0 rootflags=noatime";
const PREPARE: &str = include_str!("../../../node/src/image/recipe/prepare.sh");
const CUSTOMIZE: &str = include_str!("../../../node/src/image/recipe/customize.sh");
const GUEST: &str = include_str!("guest.sh");

/// Judges every variant whose name holds one of `wanted` (all, where none is), and writes the confusion matrices as a
/// document. Guests are kept under `work` for the next time.
///
/// # Errors
/// Where a guest cannot be built or booted, or its free pages are taken for what they are not.
pub fn run(work: &Path, document: &Path, wanted: &[String]) -> Outcome<Vec<Figure>> {
    std::fs::create_dir_all(work)?;
    let (mut times, mut hinted, mut free, mut worst) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut all = Matrix::default();
    let mut text = String::new();
    for variant in &VARIANTS {
        if !wanted.is_empty() && !wanted.iter().any(|part| variant.name.contains(part.as_str())) {
            continue;
        }
        println!("colors: {}", variant.name);
        let parts = build(work, variant)?;
        let options = Options {
            memory_bytes: variant.memory_bytes,
            cpu: variant.cpu,
            arguments: variant.arguments.into(),
            ..Options::default()
        };
        let judged = judge(&work.join("run"), &parts, &options, FILL, &mut |_, _, _| Ok(()))?;
        let droppable = judged.coloring.account.free == guest::FreePages::Droppable;
        if droppable != variant.droppable {
            return Err(format!("{}: free pages are {:?}", variant.name, judged.coloring.account.free).into());
        }
        let per_gib =
            |time: std::time::Duration| time.as_secs_f64() * 1e3 * (1u64 << 30) as f64 / judged.memory_bytes as f64;
        times.push(per_gib(judged.took[0]));
        hinted.push(per_gib(judged.took[1]));
        free.push(judged.matrix.share(Color::Free, 1).unwrap_or(0.0));
        worst.push(judged.matrix.worst(PAGES_LEAST).map_or(0.0, |(_, share)| share));
        describe(&mut text, variant.name, &judged, *times.last().expect("just pushed"));
        all.add(&judged.matrix);
        println!("{}", judged.matrix.markdown());
    }
    let _ = write!(text, "### All of them\n\n{}\n", all.markdown());
    if let Some(dir) = document.parent() {
        std::fs::create_dir_all(dir)?;
    }
    std::fs::write(document, text)?;
    println!("matrices written to {}", document.display());
    let least = |values: &[f64]| values.iter().copied().fold(f64::INFINITY, f64::min);
    // Agreement is judged by the worst guest, not by the median one.
    let figure =
        |name: &str, values: Vec<f64>| Figure { value: least(&values), ..Figure::new(name, "share", values, COMMAND) };
    Ok(vec![
        Figure::new("color_ms_per_gib", "ms/GiB", times, COMMAND).asked("<=", 50.0),
        Figure::new("color_hinted_ms_per_gib", "ms/GiB", hinted, COMMAND),
        figure("free_agreement", free).asked(">=", 0.995),
        figure("color_agreement", worst).asked(">=", 0.98),
        Figure::new("used_called_free", "pages", vec![all.used_called_free() as f64], COMMAND).asked("<=", 0.0),
    ])
}

fn describe(text: &mut String, name: &str, judged: &Judged, ms_per_gib: f64) {
    let account = &judged.coloring.account;
    let _ = write!(
        text,
        "### {name}\n\nLinux {}, encoding {}, {} levels, {} roots; {:.1}% of {} in use; {ms_per_gib:.1} ms/GiB; free pages {}; \
         {} pages changed meanwhile and are not judged.\n\n{}\n",
        account.release.as_deref().unwrap_or("?"),
        account.encoding.unwrap_or("?"),
        account.levels,
        account.roots,
        judged.used_percent,
        base::units::human(judged.memory_bytes),
        match &account.free {
            guest::FreePages::Droppable => "may be dropped".into(),
            guest::FreePages::Kept { why } => format!("are kept: {why}"),
        },
        judged.matrix.unjudged,
        judged.matrix.markdown(),
    );
}

fn build(work: &Path, variant: &Variant) -> Outcome<Parts> {
    let dir = work.join(format!("{}.{}", variant.suite, variant.kernel));
    let scripts = [("prepare.sh", PREPARE), ("customize.sh", CUSTOMIZE), ("guest.sh", GUEST)];
    for (name, script) in scripts {
        std::fs::write(work.join(name), script)?;
    }
    let log = work.join("build.log");
    let status = Command::new("sh")
        .arg(work.join("guest.sh"))
        .args([&dir, Path::new(variant.suite), Path::new(variant.kernel)])
        .args([work.join("prepare.sh"), work.join("customize.sh")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(&log)?)
        .status()?;
    if !status.success() {
        let words = std::fs::read_to_string(&log).unwrap_or_default();
        return Err(format!("no guest of {} {}: {}", variant.suite, variant.kernel, words.trim()).into());
    }
    Ok(Parts {
        kernel: dir.join("kernel"),
        initrd: dir.join("initrd"),
        disk: dir.join("disk.raw"),
        cmdline: CMDLINE.into(),
    })
}
