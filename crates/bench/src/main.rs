//! `offshoot-bench`: the demo and the benchmarks.

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match words.first().map(String::as_str) {
        Some("demo") => demo(),
        Some("fork") => fork(),
        Some("store") => store(&words[1..]),
        Some("prefetch") => prefetch(&words[1..], false),
        Some("prefetch-full") => prefetch(&words[1..], true),
        // What the benchmark starts for itself.
        Some("line") => bench::prefetch::line::serve(&words[1..]),
        _ => Err("usage: offshoot-bench demo|fork|store|prefetch|prefetch-full [PART…]".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("offshoot-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn demo() -> bench::Outcome {
    let target = bench::build_directory();
    let keep = std::env::var_os("KEEP").is_some_and(|k| !k.is_empty() && k != "0");
    bench::demo::run(&program()?, &home("demo-home"), &target.join("demo.json"), keep)
}

fn fork() -> bench::Outcome {
    let target = bench::build_directory();
    bench::fork::run(&program()?, &home("bench-home"), &target.join("bench/fork.json"))
}

fn store(parts: &[String]) -> bench::Outcome {
    let target = bench::build_directory();
    bench::stores::run(&program()?, &home("bench-store"), &target.join("bench/store.json"), parts)
}

fn prefetch(parts: &[String], full: bool) -> bench::Outcome {
    let target = bench::build_directory();
    bench::prefetch::run(&program()?, &home("bench-prefetch"), &target, parts, full)
}

/// Where a run keeps its home: beside what it builds, unless sockets below so long a path have no room for their
/// names.
fn home(name: &str) -> PathBuf {
    const ROOM: usize = 64;
    let beside = bench::build_directory().join(name);
    if beside.as_os_str().len() <= ROOM { beside } else { std::env::temp_dir().join(format!("offshoot-{name}")) }
}

fn program() -> bench::Outcome<PathBuf> {
    let beside = std::env::current_exe()?.with_file_name("offshoot");
    if beside.is_file() {
        Ok(beside)
    } else {
        Err(format!("{} is missing: `make build` first", beside.display()).into())
    }
}
