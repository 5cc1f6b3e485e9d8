//! What this host can do, and why not where it cannot.

use api::Check;
use std::path::Path;
use std::process::Command;
use vmm::accelerator::Host;

/// Looks at everything Offshoot stands on.
#[must_use]
pub fn examine(home: &Path) -> Vec<Check> {
    let mut checks = vec![accelerator(), kernel(), qemu()];
    for (program, package, needed, use_) in [
        ("passt", "passt", true, "gives guests their network"),
        ("qemu-img", "qemu-utils", false, "reads qcow2 images"),
        ("mmdebstrap", "mmdebstrap", false, "builds the default guest"),
        ("mke2fs", "e2fsprogs", false, "makes file systems of directories and archives"),
    ] {
        checks.push(program_check(program, package, needed, use_));
    }
    checks.push(device("/dev/fuse", "lazy memory and disks need it: `modprobe fuse`"));
    checks.push(mappings());
    checks.push(tracking());
    checks.push(privilege());
    checks.push(space(home));
    checks
}

fn check(name: &str, needed: bool, ok: bool, detail: impl Into<String>) -> Check {
    Check { name: name.into(), ok, needed, detail: detail.into() }
}

fn accelerator() -> Check {
    let (chosen, why) = Host::probe().choose();
    check("accelerator", false, chosen == vmm::Accelerator::Kvm, format!("{chosen}: {why}"))
}

fn kernel() -> Check {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let detail = match version {
        v if v >= (6, 9) => {
            format!("Linux {release}: written pages are tracked, a killed mirror is replaced under running guests")
        }
        v if v >= (6, 7) => {
            format!("Linux {release}: a killed mirror needs Linux 6.9 to be replaced under running guests")
        }
        _ => format!(
            "Linux {release}: without 6.7 every fork copies all private pages; without 6.9 a killed mirror is not replaced"
        ),
    };
    check("kernel", false, version >= (6, 9), detail)
}

fn first_line(program: &str, argument: &str) -> Option<String> {
    let output = Command::new(program).arg(argument).output().ok()?;
    let text = if output.stdout.is_empty() { output.stderr } else { output.stdout };
    Some(String::from_utf8_lossy(&text).lines().next().unwrap_or_default().trim().to_owned())
}

fn qemu() -> Check {
    let program = vmm::qemu::PROGRAM;
    let Some(line) = first_line(program, "--version") else {
        return check("qemu", true, false, format!("{program} is not installed: `apt-get install qemu-system-x86`"));
    };
    let version = line.split_ascii_whitespace().skip_while(|w| *w != "version").nth(1).unwrap_or_default().to_owned();
    let mut numbers = version.split('.').filter_map(|n| n.parse::<u32>().ok());
    let recent = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (7, 2);
    let detail = if recent { line } else { format!("{line}: 7.2 or later is needed") };
    check("qemu", true, recent, detail)
}

fn program_check(program: &str, package: &str, needed: bool, purpose: &str) -> Check {
    let found = std::env::var_os("PATH")
        .is_some_and(|paths| std::env::split_paths(&paths).any(|dir| dir.join(program).is_file()))
        || ["/usr/sbin", "/sbin"].iter().any(|dir| Path::new(dir).join(program).is_file());
    let detail = match found {
        true => format!("{program} {purpose}"),
        false => format!("{program} {purpose} and is not installed: `apt-get install {package}`"),
    };
    check(program, needed, found, detail)
}

fn device(path: &str, why: &str) -> Check {
    match std::fs::File::options().read(true).write(true).open(path) {
        Ok(_) => check(path, true, true, "opens"),
        Err(error) => check(path, true, false, format!("{error}; {why}")),
    }
}

fn mappings() -> Check {
    let text = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
    let count: usize = text.trim().parse().unwrap_or(0);
    let ok = count >= 2 * base::resident::MAPPINGS_MAX;
    check(
        "vm.max_map_count",
        true,
        ok,
        format!("{count} mappings for a process; {} are needed", 2 * base::resident::MAPPINGS_MAX),
    )
}

fn tracking() -> Check {
    // UFFD_USER_MODE_ONLY (1) needs no privilege: Documentation/admin-guide/mm/userfaultfd.rst.
    let found = crate::sys::userfaultfd_opens();
    let detail = match &found {
        Ok(()) => "opens: pages written between forks are tracked".to_owned(),
        Err(error) => format!("{error}: every fork then copies all private pages"),
    };
    check("userfaultfd", false, found.is_ok(), detail)
}

fn privilege() -> Check {
    let root = rustix::process::geteuid().is_root();
    check(
        "privilege",
        true,
        root,
        if root { "root" } else { "not root: mounting the mirror and reading holders need it; use sudo" },
    )
}

fn space(home: &Path) -> Check {
    let Some(existing) = home.ancestors().find(|p| p.exists()) else {
        return check("space", true, false, format!("{} does not exist", home.display()));
    };
    match rustix::fs::statvfs(existing) {
        Ok(fs) => {
            let free = fs.f_bavail * fs.f_frsize;
            let detail = format!("{} free at {}", base::units::human(free), home.display());
            check("space", true, free >= 4 << 30, detail)
        }
        Err(error) => check("space", true, false, format!("{}: {error}", home.display())),
    }
}
