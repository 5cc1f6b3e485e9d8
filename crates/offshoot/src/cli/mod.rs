//! The command line: words, and what is done for each.

mod blobs;
mod colors;
mod connect;
mod disks;
mod images;
mod machine;
mod output;
mod stores;
mod vms;

use clap::{Args, CommandFactory, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Turns a running virtual machine into as many warm copies as you need.
#[derive(Parser)]
#[command(name = "offshoot", version, propagate_version = true, arg_required_else_help = true)]
#[command(
    after_help = "Start with:\n  offshoot image build\n  offshoot run debian --name web --publish 8080:80\n  offshoot fork web -n 8 --publish-base 9000\n  offshoot ps"
)]
struct Cli {
    /// Directory that holds everything: images, snapshots, VMs
    #[arg(long, global = true, env = "OFFSHOOT_HOME", default_value = "/var/lib/offshoot")]
    home: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a VM from an image, or from a snapshot with --from
    Run(RunArgs),
    /// Copy a running VM, warm: RAM, disks and devices of one instant; it goes on
    Fork(ForkArgs),
    /// Take a snapshot of a running VM, or list, inspect and remove snapshots
    #[command(args_conflicts_with_subcommands = true)]
    Snapshot(SnapshotArgs),
    /// List VMs
    Ps(ListArgs),
    /// Show everything about a VM
    Inspect {
        /// Name of the VM
        name: String,
    },
    /// Show memory, fetches and CPU time of VMs; of a single one also by color
    Stats {
        /// Names of VMs; all that run where absent
        names: Vec<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Show the node, its store and its mirror instead
        #[arg(long, conflicts_with = "names")]
        node: bool,
    },
    /// Show what a VM's or a snapshot's memory is for, and where it is; as a map, or live
    Colors(colors::ColorsArgs),
    /// Compare what snapshots hold
    #[command(subcommand)]
    Dedup(DedupCommand),
    /// Print what a VM's console showed
    Logs {
        /// Name of the VM
        name: String,
        /// Go on printing as more comes
        #[arg(short, long)]
        follow: bool,
        /// Print what its hypervisor said instead
        #[arg(long)]
        hypervisor: bool,
    },
    /// Use a VM's serial console; Ctrl-] leaves it
    Console {
        /// Name of the VM
        name: String,
    },
    /// Power VMs down
    Stop {
        /// Names of VMs
        #[arg(required = true)]
        names: Vec<String>,
        /// Seconds a guest gets to power down before it is ended
        #[arg(short, long, default_value_t = 30)]
        time: u64,
    },
    /// Remove VMs
    Rm {
        /// Names of VMs
        #[arg(required_unless_present = "all")]
        names: Vec<String>,
        /// End those that run
        #[arg(short, long)]
        force: bool,
        /// All VMs
        #[arg(long, conflicts_with = "names")]
        all: bool,
    },
    /// Wait until VMs have ended, and say how
    Wait {
        /// Names of VMs
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Set how much memory a VM's guest may keep; the rest goes back to the host
    Balloon {
        /// Name of the VM
        name: String,
        /// Memory to keep, as in 256M
        #[arg(value_parser = base::units::parse_size)]
        memory: u64,
    },
    /// Build, import, list and remove images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Send images, snapshots and blobs to another store: a directory, or S3; only what it lacks is sent
    Push(TransferArgs),
    /// Fetch images, snapshots and blobs from another store
    Pull(TransferArgs),
    /// List what another store has
    Remote {
        /// Path of a directory, or s3://BUCKET/PREFIX?endpoint=URL
        #[arg(env = "OFFSHOOT_REMOTE")]
        store: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Drop old snapshots by rule, and give back the space that nothing reaches
    Gc(GcArgs),
    /// Fetch images, snapshots and blobs into this node's cache of a shared store, before they are needed
    Warm(WarmArgs),
    /// Keep versioned arrays of bytes: write, read any version, clone, compare, tag
    #[command(subcommand)]
    Blob(BlobCommand),
    /// Serve disks of images and snapshots to other programs, over NBD
    #[command(subcommand)]
    Nbd(NbdCommand),
    /// Write the disk of an image or a snapshot to a file, raw or qcow2
    Export(ExportArgs),
    /// Say what this host can do, and why
    Doctor(ListArgs),
    /// Read and check everything in the store, and name what is wrong
    #[command(visible_alias = "fsck")]
    Verify(ListArgs),
    /// Run the node daemon; other commands start it by themselves
    Serve {
        /// Run from a store that other nodes share: s3://BUCKET/PREFIX?endpoint=URL. Said once, the home remembers it
        #[arg(long, env = "OFFSHOOT_STORE", value_name = "URL")]
        store: Option<String>,
        /// How much of the node's disk the cache of that store may take, as in 50G [default: a tenth of the disk]
        #[arg(long, env = "OFFSHOOT_CACHE_SIZE", value_name = "SIZE", value_parser = base::units::parse_size)]
        cache_size: Option<u64>,
    },
    /// End the daemon; VMs run on unless --stop is given
    Shutdown {
        /// End every VM and unmount as well
        #[arg(long)]
        stop: bool,
    },
    /// Print a completion script for your shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// The mirror process; the daemon starts it
    #[command(hide = true)]
    Mirror {
        /// Take over the FUSE session whose descriptor is the standard input
        #[arg(long)]
        take_over: bool,
    },
}

#[derive(Args)]
struct ListArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct RunArgs {
    /// Image to boot
    #[arg(required_unless_present = "from", conflicts_with = "from")]
    image: Option<String>,
    /// Snapshot to start from, as in web@1
    #[arg(long)]
    from: Option<String>,
    /// Name of the VM; chosen where absent
    #[arg(long)]
    name: Option<String>,
    /// Memory, as in 512M [default: 512M]
    #[arg(short, long, value_parser = base::units::parse_size)]
    memory: Option<u64>,
    /// Virtual CPUs [default: 1]
    #[arg(long)]
    cpus: Option<u32>,
    /// Publish a guest's TCP port: HOST:GUEST or ADDRESS:HOST:GUEST; on 127.0.0.1 unless an address is given
    #[arg(short, long)]
    publish: Vec<String>,
    /// auto, kvm or tcg [default: auto]
    #[arg(long)]
    accelerator: Option<String>,
    /// Add to the kernel command line
    #[arg(long)]
    append: Option<String>,
    /// What to fetch ahead of the guest: auto, none, all, replay, intersect, readahead:N, twinkle:N,P or
    /// color:EXECUTABLE,DATA [default: auto from a shared store, none from one on this disk]
    #[arg(long)]
    prefetch: Option<String>,
    /// How much to fetch ahead, from 0 (as little as possible) to 1 (a full copy) [default: 0.5]
    #[arg(long)]
    eager: Option<f32>,
    /// Do not add what it touches to the access profiles of the snapshot or image
    #[arg(long)]
    no_learn: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ForkArgs {
    /// Name of the VM to copy
    name: String,
    /// How many copies
    #[arg(short = 'n', long, default_value_t = 1)]
    count: u32,
    /// Copies are named PREFIX-1, PREFIX-2, … [default: the VM's name]
    #[arg(long)]
    name_prefix: Option<String>,
    /// Publish the ports the VM publishes, from this host port on, copy by copy
    #[arg(long)]
    publish_base: Option<u16>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct SnapshotArgs {
    #[command(subcommand)]
    command: Option<SnapshotCommand>,
    /// Name of the VM
    #[arg(required = true)]
    name: Option<String>,
    /// Tag; the snapshot is named VM@TAG [default: the next number]
    #[arg(long)]
    tag: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum SnapshotCommand {
    /// List snapshots
    Ls(ListArgs),
    /// Lay what offshoots of a snapshot touch down in the store in the order in which they do, so that the next ones
    /// fetch it with a few large reads; nodes that record do so by themselves
    Arrange {
        /// Name, as in web@1
        name: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove snapshots; VMs started from them run on
    Rm {
        /// Names, as in web@1
        #[arg(required = true)]
        names: Vec<String>,
    },
}

#[derive(Subcommand)]
enum DedupCommand {
    /// Show what snapshots share, by color: whose pages stand more than once, in another or in their own
    Report {
        /// Names, as in web@1
        #[arg(required = true)]
        snapshots: Vec<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Subcommand)]
enum ImageCommand {
    /// Build the default guest: Debian 12 with systemd, nginx and redis
    Build {
        /// Name of the image
        #[arg(long, default_value = "debian")]
        name: String,
        /// Build it anew even where the cache has it
        #[arg(long)]
        force: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Import a raw or qcow2 disk, or a root file system as directory or tar
    Import {
        /// Disk, directory or archive
        path: PathBuf,
        /// Name of the image
        #[arg(long)]
        name: String,
        /// Kernel, where not found inside
        #[arg(long)]
        kernel: Option<PathBuf>,
        /// Initial RAM disk, where not found inside
        #[arg(long)]
        initrd: Option<PathBuf>,
        /// Kernel command line
        #[arg(long)]
        cmdline: Option<String>,
        /// Size of the disk made of a root file system, as in 4G
        #[arg(long, value_parser = base::units::parse_size)]
        size: Option<u64>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List images
    Ls(ListArgs),
    /// Show everything about an image
    Inspect {
        /// Name of the image
        name: String,
    },
    /// Lay what is read of an image as it boots down in that order in the store, as a node does by itself behind the
    /// first readers
    Arrange {
        /// Name of the image
        name: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove images; VMs booted from them run on
    Rm {
        /// Names of images
        #[arg(required = true)]
        names: Vec<String>,
    },
}

#[derive(Args)]
struct TransferArgs {
    /// VM@TAG (a snapshot), NAME (an image) or blob:NAME
    #[arg(required = true)]
    names: Vec<String>,
    /// The other store: path of a directory, or s3://BUCKET/PREFIX?endpoint=URL
    #[arg(long, env = "OFFSHOOT_REMOTE", visible_aliases = ["to", "from"])]
    store: String,
    /// Replace what is there; only what differs is sent
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct WarmArgs {
    /// VM@TAG (a snapshot), NAME (an image) or blob:NAME
    #[arg(required = true)]
    names: Vec<String>,
    /// Keep it there until --unpin
    #[arg(long, conflicts_with = "unpin")]
    pin: bool,
    /// Let it go again
    #[arg(long)]
    unpin: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct GcArgs {
    /// Say what would be done and why, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Keep so many of the newest snapshots of each VM, and drop the others
    #[arg(long)]
    keep_last: Option<usize>,
    /// Keep snapshots not older than this, as in 7days, and drop the others
    #[arg(long, value_parser = humantime::parse_duration)]
    keep_within: Option<std::time::Duration>,
    /// Drop what a node that is gone kept for itself in a shared store; --dry-run lists nodes by id
    #[arg(long, value_name = "ID")]
    drop_node: Option<String>,
    /// Clean up another store instead
    #[arg(long)]
    store: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum BlobCommand {
    /// Make a blob of zeros
    Create {
        /// Its name; parts may be divided by /
        name: String,
        /// Its size, as in 100G
        #[arg(value_parser = base::units::parse_size)]
        size: u64,
        /// Size of its blocks, a power of two from 512 to 1M [default: 4K]
        #[arg(long, value_parser = base::units::parse_size)]
        block: Option<u64>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List blobs
    Ls(ListArgs),
    /// Show everything about a blob
    Info {
        /// Name of the blob
        name: String,
    },
    /// Print the bytes of a version
    Read {
        /// NAME, NAME@NUMBER or NAME@TAG
        version: String,
        /// First byte
        #[arg(long, default_value_t = 0, value_parser = base::units::parse_size)]
        offset: u64,
        /// How many bytes [default: to the end]
        #[arg(long, value_parser = base::units::parse_size)]
        length: Option<u64>,
        /// File to write [default: the standard output]
        #[arg(short, long)]
        output: Option<PathBuf>,
    },
    /// Write bytes at an offset, as a new version
    Write {
        /// Name of the blob
        name: String,
        /// Where the first byte goes
        #[arg(long, default_value_t = 0, value_parser = base::units::parse_size)]
        offset: u64,
        /// File with the bytes [default: the standard input]
        file: Option<PathBuf>,
    },
    /// Add bytes at the end, as a new version
    Append {
        /// Name of the blob
        name: String,
        /// File with the bytes [default: the standard input]
        file: Option<PathBuf>,
    },
    /// Make bytes zero, as a new version; zeros take no space
    Zero {
        /// Name of the blob
        name: String,
        /// First byte
        #[arg(value_parser = base::units::parse_size)]
        offset: u64,
        /// How many bytes
        #[arg(value_parser = base::units::parse_size)]
        length: u64,
    },
    /// Cut it or let it grow with zeros, as a new version
    Resize {
        /// Name of the blob
        name: String,
        /// The new size
        #[arg(value_parser = base::units::parse_size)]
        size: u64,
    },
    /// List versions, newest first
    Log {
        /// Name of the blob
        name: String,
        /// How many
        #[arg(short = 'n', long, default_value_t = 20)]
        last: u64,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the ranges that differ between two versions: first byte and length
    Diff {
        /// Name of the blob
        name: String,
        /// Number or tag
        from: String,
        /// Number or tag
        to: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the path of a version in the tree of blobs, which any program may open; what it writes stays local until
    /// it is committed
    Open {
        /// NAME, NAME@NUMBER or NAME@TAG
        version: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List versions that have local changes, or are open for writing
    Files(ListArgs),
    /// Make the local changes of a file in the tree of blobs the next version of its blob
    Commit {
        /// Its path, or NAME@NUMBER
        file: String,
    },
    /// Drop the local changes of a file in the tree of blobs
    Discard {
        /// Its path, or NAME@NUMBER
        file: String,
    },
    /// Make blobs that begin as a version of another; costs the same whatever its size
    Clone {
        /// NAME, NAME@NUMBER or NAME@TAG; or the path of a file in the tree of blobs, whose local changes then belong
        /// to the clone
        version: String,
        /// Names of the clones
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Give a version a name of its own, and keep it from being removed
    Tag {
        /// Name of the blob
        name: String,
        /// The tag
        tag: String,
        /// Number of the version [default: the latest]
        #[arg(conflicts_with = "remove")]
        number: Option<u64>,
        /// Remove the tag instead
        #[arg(long)]
        remove: bool,
    },
    /// Remove blobs, or single versions named as NAME@NUMBER
    Rm {
        /// Names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Keep versions of several blobs as they are at one instant
    Snapshot {
        /// Name of the snapshot
        name: String,
        /// NAME, NAME@NUMBER or NAME@TAG
        #[arg(required = true)]
        blobs: Vec<String>,
    },
    /// List snapshots of blobs, or remove some
    Snapshots {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Remove these instead
        #[arg(long, num_args = 1..)]
        remove: Vec<String>,
    },
}

#[derive(Subcommand)]
enum NbdCommand {
    /// Serve a disk on a unix socket, and print the socket and a URI for NBD clients
    Serve {
        /// An image, a snapshot as in web@1, a blob as in blob:NAME@2, or a kept scratch disk as in scratch:NAME
        source: String,
        /// Serve a scratch disk over it, which may be written
        #[arg(short, long)]
        writable: bool,
        /// Name of the export [default: made of the source]
        #[arg(long)]
        name: Option<String>,
        /// Path of the socket [default: in the home]
        #[arg(long)]
        socket: Option<PathBuf>,
        /// What to fetch ahead of the disk's readers: auto, which is what earlier ones of the image or snapshot read, or
        /// none [default: auto from a shared store, none from one on this disk]
        #[arg(long)]
        prefetch: Option<String>,
        /// Do not add what is read to the access profile of the image or snapshot
        #[arg(long)]
        no_learn: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List what is served, and the scratch disks that are kept
    Ls(ListArgs),
    /// Serve disks no longer; scratch disks are kept unless --discard is given
    Stop {
        /// Names of exports
        #[arg(required = true)]
        names: Vec<String>,
        /// Drop what was written to scratch disks
        #[arg(long)]
        discard: bool,
    },
}

#[derive(Args)]
struct ExportArgs {
    /// An image, a snapshot as in web@1, a blob as in blob:NAME@2, or a scratch disk as in scratch:NAME
    source: String,
    /// File to write; - is the standard output, raw
    file: PathBuf,
    /// How to write it
    #[arg(short, long, value_enum, default_value_t = disks::Format::Raw)]
    format: disks::Format,
    /// Replace a file that is there
    #[arg(long)]
    force: bool,
}

/// Parses the command line and does what it says.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("offshoot: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What a command ends with when it fails: a message for a person.
type Outcome = Result<(), Box<dyn std::error::Error>>;

fn run(cli: &Cli) -> Outcome {
    match &cli.command {
        Command::Serve { store, cache_size } => {
            return crate::daemon::serve(&cli.home, store.as_deref(), *cache_size);
        }
        Command::Mirror { take_over } => return crate::daemon::mirror(&cli.home, *take_over),
        Command::Completion { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "offshoot", &mut std::io::stdout());
            return Ok(());
        }
        Command::Doctor(args) => return machine::doctor(&cli.home, args.json),
        Command::Shutdown { stop } => return machine::shutdown(&cli.home, *stop),
        _ => {}
    }
    let client = connect::daemon(&cli.home)?;
    match &cli.command {
        Command::Run(args) => vms::run(&client, args),
        Command::Fork(args) => vms::fork(&client, args),
        Command::Snapshot(args) => match &args.command {
            None => vms::snapshot(&client, args.name.as_deref().unwrap_or_default(), args.tag.as_deref(), args.json),
            Some(SnapshotCommand::Ls(list)) => vms::snapshots(&client, list.json),
            Some(SnapshotCommand::Arrange { name, json }) => vms::arrange_snapshot(&client, name, *json),
            Some(SnapshotCommand::Rm { names }) => vms::remove_snapshots(&client, names),
        },
        Command::Ps(args) => vms::ps(&client, args.json),
        Command::Inspect { name } => vms::inspect(&client, name),
        Command::Stats { json, node: true, .. } => machine::stats(&client, *json),
        Command::Stats { names, json, .. } => vms::stats(&client, names, *json),
        Command::Colors(args) => colors::colors(&client, args),
        Command::Dedup(DedupCommand::Report { snapshots, json }) => colors::dedup(&client, snapshots, *json),
        Command::Logs { name, follow, hypervisor } => vms::logs(&client, name, *follow, *hypervisor),
        Command::Console { name } => vms::console(&client, name),
        Command::Stop { names, time } => vms::stop(&client, names, *time),
        Command::Rm { names, force, all } => vms::rm(&client, names, *force, *all),
        Command::Wait { names } => vms::wait(&client, names),
        Command::Balloon { name, memory } => vms::balloon(&client, name, *memory),
        Command::Image(command) => images::image(&client, command),
        Command::Push(args) => stores::transfer(&client, stores::Way::Push, args),
        Command::Pull(args) => stores::transfer(&client, stores::Way::Pull, args),
        Command::Remote { store, json } => stores::remote(&client, store, *json),
        Command::Gc(args) => stores::gc(&client, args),
        Command::Warm(args) => stores::warm(&client, args),
        Command::Blob(command) => blobs::blob(&client, command),
        Command::Nbd(command) => disks::nbd(&client, command),
        Command::Export(args) => disks::export(&client, args),
        Command::Verify(args) => machine::verify(&client, args.json),
        Command::Serve { .. }
        | Command::Mirror { .. }
        | Command::Completion { .. }
        | Command::Doctor(_)
        | Command::Shutdown { .. } => {
            unreachable!("done above, without a daemon")
        }
    }
}
