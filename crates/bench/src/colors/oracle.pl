# Runs within a guest as root, by the perl that every Debian has. Fills the memory to PERCENT with all that a server
# has there, writes down what the kernel says each page is (/proc/kpageflags), lets the host stop the machine and look
# for itself, and writes down once more: a page that both times is the same was so in between.
use strict;
use warnings;
no warnings "portable";
$| = 1;
my ($percent) = @ARGV;
my $page = 4096;
open my $disk, '+<', '/dev/vdb' or fail("open /dev/vdb: $!");
open my $content, '<', '/dev/vda' or fail("open /dev/vda: $!");

sub fail { print "ORACLE-FAILED @_\n"; exit 1 }

sub meminfo {
    open my $f, '<', '/proc/meminfo' or fail("meminfo: $!");
    my %m;
    while (<$f>) { $m{$1} = $2 * 1024 if /^(\w+):\s+(\d+) kB/ }
    return \%m;
}

sub put { my ($path, $text) = @_; open my $f, '>', $path or return 0; return print({$f} $text) && close $f }

# Memory of a process, filled with what the disk holds; 0 where the kernel gives none.
my $at = 0;
sub map_memory {
    my ($bytes, $protection, $flags) = @_;
    my $address = syscall(9, 0, $bytes, $protection, $flags, -1, 0);
    return $address == -1 ? 0 : $address;
}
sub fill {
    my ($address, $bytes) = @_;
    for (my $done = 0; $done < $bytes; $done += 1 << 20) {
        my $chunk = $bytes - $done < 1 << 20 ? $bytes - $done : 1 << 20;
        sysseek $content, $at, 0;
        my $got = syscall(0, fileno $content, $address + $done, $chunk);
        fail("fill: $!") if $got != $chunk;
        $at = ($at + $chunk) % (1 << 30);
    }
}

# Servers, as far as they are there.
for my $command (
    'mount -t proc proc /proc', 'mount -t sysfs sys /sys', 'mkdir -p /dev/shm', 'mount -t tmpfs shm /dev/shm', 'ip link set lo up',
    'mkdir -p /run/redis && redis-server /etc/redis/redis.conf --daemonize yes', 'mkdir -p /var/log/nginx && nginx',
) {
    system("($command) >/dev/null 2>&1");
}
my $total = meminfo()->{MemTotal};
my $share = sub { my $bytes = int($total * $_[0] / 100); return $bytes - $bytes % (2 << 20) + (2 << 20) };
my ($private, $shared) = (0x22, 0x21);

system('redis-cli debug populate 4000 key 4096 >/dev/null 2>&1');
# Drivers and their executable memory.
system('for m in dm_mod loop xfs btrfs nf_tables bridge tun veth; do modprobe $m; done >/dev/null 2>&1');
# Objects of the kernel: directories, inodes, names.
mkdir '/dev/shm/many';
for my $i (1 .. 4000) { put("/dev/shm/many/file-of-some-length-$i", 'x') }
system('find / -xdev >/dev/null 2>&1');
# Huge pages, half of them in use.
my $huge = int($share->(4) / (2 << 20));
put('/proc/sys/vm/nr_hugepages', $huge);
if (my $address = map_memory(($huge >> 1 || 1) * (2 << 20), 3, $private | 0x40000)) { fill($address, ($huge >> 1 || 1) * (2 << 20)) }
# Anonymous memory; transparent huge pages; locked; shared; executed; equal pages, merged.
my $anonymous = map_memory($share->(24), 3, $private);
fill($anonymous, $share->(24));
if (my $address = map_memory($share->(8) + (2 << 20), 3, $private)) {
    $address += -$address % (2 << 20);
    syscall(28, $address, $share->(8), 14);
    fill($address, $share->(8));
}
if (my $address = map_memory($share->(3), 3, $private)) { fill($address, $share->(3)); syscall(149, $address, $share->(3)) }
if (my $address = map_memory($share->(6), 3, $shared)) { fill($address, $share->(6)) }
if (my $address = map_memory($share->(1), 7, $private)) { fill($address, $share->(1)) }
if (my $address = map_memory($share->(1), 3, $private)) {
    for (my $done = 0; $done < $share->(1); $done += 1 << 20) { $at = 0; fill($address + $done, 1 << 20) }
    syscall(28, $address, $share->(1), 12);
    put('/sys/kernel/mm/ksm/pages_to_scan', 20000);
    put('/sys/kernel/mm/ksm/sleep_millisecs', 20);
    put('/sys/kernel/mm/ksm/run', 1);
}
# Processes, with pages of their own and shared ones.
my @children;
for (1 .. 5) {
    my $child = fork;
    fail("fork: $!") unless defined $child;
    if (!$child) {
        # What is given back below is to be nobody's.
        syscall(11, $anonymous, $share->(12));
        my $own = map_memory($share->(1), 3, $private);
        fill($own, $share->(1));
        sleep 1000;
        exit 0;
    }
    push @children, $child;
}
# Files: in memory alone, clean, and written a moment ago.
system("head -c " . $share->(5) . " /dev/vda >/dev/shm/file");
system("head -c " . $share->(2) . " /dev/vda >/var/tmp/written");
system('find /usr -xdev -type f -exec cat {} + >/dev/null 2>&1');
my $used = sub { my $m = meminfo(); return 100 * (1 - $m->{MemFree} / $total) };
my $from = 1 << 30;
while ($used->() < $percent && $from < 2 << 30) {
    sysseek $content, $from, 0;
    sysread $content, my $chunk, 4 << 20 or last;
    $from += 4 << 20;
}
# Then more of what processes have, where the disk was too small for the memory.
while ($used->() < $percent) {
    my $address = map_memory(16 << 20, 3, $private) or last;
    fill($address, 16 << 20);
}
sleep 2;
put('/sys/kernel/mm/ksm/run', 0);
# Reading files filled it to the brim. Give back in pieces, so that free memory is not one block: of every 64 pages
# one, then of every 64 of a half that only one process has almost all.
for (my $i = 0; $i < $share->(24); $i += 64 * $page) { syscall(11, $anonymous + $i, $page) }
for (my $i = 0; $i < $share->(12) && $used->() > $percent; $i += 64 * $page) {
    syscall(11, $anonymous + $i + 8 * $page, 48 * $page);
}

sub whole {
    my ($path, $into, $bytes) = @_;
    open my $f, '<', $path or fail("$path: $!");
    my $got = 0;
    while ($got < $bytes) {
        my $n = sysread $f, $$into, ($bytes - $got < 1 << 19 ? $bytes - $got : 1 << 19), $got;
        last unless $n;
        $got += $n;
    }
    return $got;
}

# As many page frames as there are addresses of RAM.
my ($end, $iomem) = (0, '');
open my $map, '<', '/proc/iomem' or fail("iomem: $!");
while (<$map>) {
    $iomem .= $_;
    $end = hex $1 if /-([0-9a-f]+) : System RAM/ && hex $1 > $end;
}
my $bytes = int(($end + 1) / $page) * 8;
my %first = (flags => "\0" x $bytes, count => "\0" x $bytes);
my %second = (flags => "\0" x $bytes, count => "\0" x $bytes);

# What processes execute.
sub executed {
    my $frames = '';
    for my $process (glob '/proc/[0-9]*') {
        open my $maps, '<', "$process/maps" or next;
        open my $pagemap, '<', "$process/pagemap" or next;
        while (<$maps>) {
            my ($start, $stop) = /^([0-9a-f]+)-([0-9a-f]+) ..x/ or next;
            ($start, $stop) = (hex $start, hex $stop);
            next if $start >= 1 << 47;
            sysseek $pagemap, $start / $page * 8, 0;
            sysread $pagemap, my $entries, ($stop - $start) / $page * 8 or next;
            $frames .= join '', map { pack 'Q<', $_ & (1 << 55) - 1 } grep { $_ >> 63 } unpack 'Q<*', $entries;
        }
    }
    return $frames;
}
$first{executed} = executed();
whole("/proc/kpageflags", \$first{flags}, $bytes);
whole("/proc/kpagecount", \$first{count}, $bytes);
print "ORACLE-READY\n";
my $go = <STDIN>;
whole("/proc/kpageflags", \$second{flags}, $bytes);
whole("/proc/kpagecount", \$second{count}, $bytes);
$second{executed} = executed();

my ($offset, $index) = (2 << 20, '');
for my $part (
    [flags => \$first{flags}], [count => \$first{count}], [flags_after => \$second{flags}],
    [count_after => \$second{count}], [executed => \$first{executed}], [executed_after => \$second{executed}], [iomem => \$iomem],
) {
    my ($name, $data) = @$part;
    sysseek $disk, $offset, 0;
    my $written = 0;
    while ($written < length $$data) {
        $written += syswrite $disk, $$data, 1 << 20, $written or fail("write: $!");
    }
    $index .= "$name $offset $written\n";
    $offset += $written + (-$written % 4096);
}
sysseek $disk, 1 << 20, 0;
syswrite $disk, $index . "end\n" . ("\0" x 4096) or fail("write: $!");
syscall(74, fileno $disk);
kill 9, @children;
print "ORACLE-DONE\n";
