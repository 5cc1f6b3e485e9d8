//! Which accelerator a host can use.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Who executes guest instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The processor, through `/dev/kvm`.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// What a host offers, as far as the choice depends on it.
#[derive(Clone, Debug)]
pub struct Host {
    /// The text of `/proc/cpuinfo`.
    pub cpuinfo: String,
    /// Whether `/dev/kvm` opens for reading and writing.
    pub kvm_opens: bool,
}

impl Host {
    /// Looks at this host.
    #[must_use]
    pub fn probe() -> Self {
        Self {
            cpuinfo: std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default(),
            kvm_opens: std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok(),
        }
    }

    /// Chooses, and says why. KVM only where the processor shows `vmx` or `svm`: some paravirtual `/dev/kvm`
    /// opens but runs no stock kernel.
    #[must_use]
    pub fn choose(&self) -> (Accelerator, &'static str) {
        let flagged = self
            .cpuinfo
            .lines()
            .find(|l| l.starts_with("flags"))
            .is_some_and(|l| l.split_ascii_whitespace().any(|w| w == "vmx" || w == "svm"));
        match (self.kvm_opens, flagged) {
            (true, true) => (Accelerator::Kvm, "/dev/kvm opens and the processor has vmx or svm"),
            (true, false) => (
                Accelerator::Tcg,
                "/dev/kvm opens but the processor shows neither vmx nor svm: no stock kernel runs there",
            ),
            (false, _) => (Accelerator::Tcg, "/dev/kvm does not open"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_needs_both_the_device_and_the_flag() {
        let host =
            |kvm_opens, flags: &str| Host { cpuinfo: format!("processor: 0\nflags\t\t: fpu {flags} sse\n"), kvm_opens };
        assert_eq!(host(true, "vmx").choose().0, Accelerator::Kvm);
        assert_eq!(host(true, "svm").choose().0, Accelerator::Kvm);
        assert_eq!(host(true, "vmxnet").choose().0, Accelerator::Tcg);
        assert_eq!(host(false, "vmx").choose().0, Accelerator::Tcg);
    }
}
