//! The command line of QEMU, from the machine shape and the backends alone.

use crate::accelerator::Accelerator;
use crate::shape::MachineShape;
use std::ffi::OsString;
use std::path::Path;

/// What stands behind the devices on this host, this time.
pub struct Backends<'a> {
    /// Name of the VM, for the process list.
    pub name: &'a str,
    /// The file whose shared mapping the resident library makes private.
    pub ram_path: &'a Path,
    /// One file for each disk of the shape.
    pub disks: &'a [&'a Path],
    /// Descriptor of the socket to the network helper.
    pub net_fd: i32,
    /// Descriptor on which QMP listens.
    pub qmp_fd: i32,
    /// Descriptor on which the serial console listens.
    pub console_fd: i32,
    /// Where what the guest writes to the console is kept.
    pub console_log: &'a Path,
    /// This VM's generation id, a UUID: new in each copy (vmgenid specification; Linux 5.18 and later reseeds).
    pub generation_id: &'a str,
    /// How the machine comes to life.
    pub start: Start<'a>,
}

/// How the machine comes to life.
pub enum Start<'a> {
    /// From its kernel.
    Boot {
        /// Kernel image.
        kernel: &'a Path,
        /// Initial RAM disk.
        initrd: Option<&'a Path>,
        /// Kernel command line.
        cmdline: &'a str,
    },
    /// From device state that is sent later.
    Incoming,
}

/// The arguments, without the program.
#[must_use]
pub fn arguments(shape: &MachineShape, backends: &Backends<'_>) -> Vec<OsString> {
    let mut line = Line(Vec::new());
    line.flag("-nodefaults").flag("-no-user-config");
    line.pair("-name", format!("guest={},debug-threads=on", backends.name));
    line.pair("-display", "none");
    // `stop` on a reset would lose the machine: the daemon boots it again, from its kernel, in a new process.
    line.pair("-action", "reboot=shutdown,shutdown=poweroff");
    line.pair("-machine", format!("{},memory-backend={},hpet=off,vmport=off,smm=off", shape.machine, shape.ram[0].id));
    line.pair(
        "-accel",
        match shape.accelerator {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg,thread=multi",
        },
    );
    line.pair("-cpu", shape.cpu_model.clone());
    line.pair("-smp", format!("cpus={}", shape.cpus));
    line.pair("-m", format!("{}B", shape.memory_bytes()));
    for ram in &shape.ram {
        let file = escape(backends.ram_path);
        line.pair("-object", format!("memory-backend-file,id={},size={}B,mem-path={file},share=on", ram.id, ram.bytes));
    }
    match backends.start {
        Start::Boot { kernel, initrd, cmdline } => {
            line.path("-kernel", kernel).pair("-append", cmdline);
            if let Some(initrd) = initrd {
                line.path("-initrd", initrd);
            }
        }
        Start::Incoming => {
            line.pair("-incoming", "defer");
        }
    }
    disks(&mut line, shape, backends);
    network(&mut line, shape, backends);
    line.pair("-device", "virtio-rng-pci,id=rng0,bus=pcie.0,addr=0x4");
    line.pair("-device", "virtio-balloon-pci,id=balloon0,bus=pcie.0,addr=0x5,free-page-reporting=on");
    line.pair("-device", format!("vmgenid,guid={},id=genid0", backends.generation_id));
    let log = escape(backends.console_log);
    line.pair(
        "-chardev",
        format!("socket,id=console0,fd={},server=on,wait=off,logfile={log},logappend=on", backends.console_fd),
    );
    line.pair("-serial", "chardev:console0");
    line.pair("-chardev", format!("socket,id=qmp0,fd={},server=on,wait=off", backends.qmp_fd));
    line.pair("-mon", "chardev=qmp0,mode=control");
    line.0
}

fn disks(line: &mut Line, shape: &MachineShape, backends: &Backends<'_>) {
    assert_eq!(shape.disks.len(), backends.disks.len(), "one file for each disk of the shape");
    for (i, (disk, path)) in shape.disks.iter().zip(backends.disks).enumerate() {
        let (id, path) = (&disk.id, escape(path));
        // Unwritten guest data in the host's page cache would lengthen `stop`: cache.direct keeps it out.
        line.pair(
            "-blockdev",
            format!(
                "driver=file,node-name=file-{id},filename={path},cache.direct=on,aio=threads,locking=off,discard=unmap"
            ),
        );
        line.pair("-blockdev", format!("driver=raw,node-name={id},file=file-{id},cache.direct=on,discard=unmap"));
        // A full or failing host must pause the guest, not show it an error that its file system never forgives.
        line.pair(
            "-device",
            format!(
                "virtio-blk-pci,drive={id},id=blk-{id},bus=pcie.0,addr={:#x},werror=stop,rerror=stop,write-cache=on",
                8 + i
            ),
        );
    }
}

fn network(line: &mut Line, shape: &MachineShape, backends: &Backends<'_>) {
    line.pair("-netdev", format!("stream,id=net0,server=off,addr.type=fd,addr.str={}", backends.net_fd));
    // Offloads are pinned off so that the device state loads whatever backend a copy gets.
    let off: Vec<String> = ["csum", "guest_csum", "gso", "guest_tso4", "guest_tso6", "guest_ecn", "guest_ufo"]
        .into_iter()
        .chain(["host_tso4", "host_tso6", "host_ecn", "host_ufo", "guest_announce"])
        .map(|name| format!("{name}=off"))
        .collect();
    let mac = &shape.nic.mac;
    line.pair(
        "-device",
        format!("virtio-net-pci,netdev=net0,id=nic0,bus=pcie.0,addr=0x3,mac={mac},romfile=,{}", off.join(",")),
    );
}

/// A path in a comma-separated option: QEMU reads two commas as one.
fn escape(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

struct Line(Vec<OsString>);

impl Line {
    fn flag(&mut self, name: &str) -> &mut Self {
        self.0.push(name.into());
        self
    }

    fn pair(&mut self, name: &str, value: impl AsRef<str>) -> &mut Self {
        self.0.push(name.into());
        self.0.push(value.as_ref().into());
        self
    }

    fn path(&mut self, name: &str, value: &Path) -> &mut Self {
        self.0.push(name.into());
        self.0.push(value.into());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::DiskShape;

    fn line(start: Start<'_>) -> String {
        let disk = DiskShape { id: "disk0".into(), bytes: 1 << 30, block_bytes: 4096 };
        let shape = MachineShape::new(Accelerator::Tcg, 2, 512 << 20, vec![disk]);
        let backends = Backends {
            name: "web",
            ram_path: Path::new("/mnt/a,b/ram"),
            disks: &[Path::new("/mnt/disk")],
            net_fd: 7,
            qmp_fd: 8,
            console_fd: 9,
            console_log: Path::new("/vms/1/console.log"),
            generation_id: "00000000-0000-0000-0000-000000000001",
            start,
        };
        arguments(&shape, &backends).iter().map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_boot_and_a_restore_differ_in_how_they_start_and_in_nothing_else() {
        let boot = line(Start::Boot {
            kernel: Path::new("/k"),
            initrd: Some(Path::new("/i")),
            cmdline: "console=ttyS0 quiet",
        });
        let restore = line(Start::Incoming);
        assert_eq!(boot.replace("-kernel /k -append console=ttyS0 quiet -initrd /i", "-incoming defer"), restore);
    }

    #[test]
    fn the_traps_are_kept_out() {
        let line = line(Start::Incoming);
        for part in [
            "share=on",
            "mem-path=/mnt/a,,b/ram",
            "cache.direct=on",
            "werror=stop,rerror=stop",
            "gso=off",
            "pc-q35-7.2,",
        ] {
            assert!(line.contains(part), "{part} missing in {line}");
        }
        assert!(!line.contains("-netdev user"));
    }
}
