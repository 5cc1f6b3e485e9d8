//! `offshoot`: forks running VMs into warm copies.
//!
//! One file that is the command line, the node daemon (`offshoot serve`) and the mirror (`offshoot mirror`, started
//! by the daemon). The command line is a client of the daemon's HTTP API like any other.

mod cli;
mod daemon;
mod export;

use std::process::ExitCode;

fn main() -> ExitCode {
    restore_sigpipe();
    cli::main()
}

/// `offshoot ps | head` must end quietly, as other tools do.
fn restore_sigpipe() {
    // The standard library ignores SIGPIPE; a write to a closed pipe then is an error, which `println!` turns into a
    // panic. Only that panic is wanted as a silent end.
    std::panic::set_hook(Box::new(|info| {
        let text = info.to_string();
        if text.contains("Broken pipe") {
            std::process::exit(141);
        }
        eprintln!("{text}");
    }));
}
