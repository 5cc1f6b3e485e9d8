//! Drives real guests from outside, as users and their clients do: the demo, the benchmarks and the tests of whole
//! machines stand on it.
//!
//! Nothing here reaches into the product: VMs are made through the HTTP API or the command line, and looked at
//! through their published ports and their consoles.

pub mod colors;
pub mod demo;
pub mod fork;
pub mod frames;
pub mod guest;
pub mod host;
pub mod limit;
pub mod plot;
pub mod prefetch;
pub mod probe;
pub mod report;
pub mod stores;

/// The directory in which cargo builds: the program lies in `<target>/<profile>/`.
#[must_use]
pub fn build_directory() -> std::path::PathBuf {
    let exe = std::env::current_exe().unwrap_or_default();
    exe.ancestors().nth(2).map_or_else(|| "target".into(), std::path::Path::to_path_buf)
}

/// What a run of the harness fails with.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;
/// Result of the harness.
pub type Outcome<T = ()> = Result<T, Failure>;
