//! Builds the resident library, which the binary carries inside: a preloaded library cannot be linked in, and one
//! installed file is the promise.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let manifest = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let root = manifest.join("../..");
    for input in ["crates/resident/src", "crates/resident/Cargo.toml", "crates/base/src"] {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }
    // A target directory of its own: the outer cargo holds the lock of the usual one.
    let target = out.join("resident");
    let status = Command::new(std::env::var_os("CARGO").expect("cargo sets it"))
        .args(["build", "--release", "--lib", "--package", "resident", "--target-dir"])
        .arg(&target)
        .arg("--manifest-path")
        .arg(root.join("Cargo.toml"))
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status()
        .expect("cargo runs");
    assert!(status.success(), "building the resident library failed");
    println!("cargo::rustc-env=RESIDENT_LIBRARY={}", target.join("release/libresident.so").display());
}
