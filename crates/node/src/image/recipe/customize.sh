#!/bin/sh
# Turns the tree of Debian packages at $1 into the default guest: serves HTTP and redis a few seconds after
# power-on, and is quiet when idle, so that what a fork fetches and copies is the work's own and not a timer's.
set -eu
root=$1

echo offshoot > "$root/etc/hostname"
printf '127.0.0.1 localhost offshoot\n::1 localhost ip6-localhost\n' > "$root/etc/hosts"
# Empty, not absent: every boot makes its own, and systemd does not take the boot for a first one.
: > "$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id" "$root/var/lib/systemd/random-seed"
# mmdebstrap leaves the host's apt options and resolver here.
rm -f "$root/etc/apt/apt.conf.d/99mmdebstrap" "$root/etc/resolv.conf"

# One DHCP lease on whatever virtio-net card there is.
cat > "$root/etc/systemd/network/20-wired.network" <<'END'
[Match]
Type=ether

[Network]
DHCP=ipv4
IPv6AcceptRA=no
LinkLocalAddressing=no

[DHCPv4]
UseHostname=no
END
systemctl --quiet --root="$root" enable systemd-networkd.service

# Nothing here waits for an address: servers listen on all of them. getty on a screen there is none of,
# housekeeping timers and mounts nobody reads only cost boot time and dirty pages.
systemctl --quiet --root="$root" disable systemd-networkd-wait-online.service e2scrub_reap.service \
    systemd-pstore.service getty@tty1.service
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
    man-db.timer logrotate.timer systemd-tmpfiles-clean.timer getty-static.service \
    sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount dev-hugepages.mount \
    sys-fs-fuse-connections.mount proc-sys-fs-binfmt_misc.automount modprobe@configfs.service \
    modprobe@dm_mod.service modprobe@drm.service modprobe@efi_pstore.service modprobe@fuse.service \
    modprobe@loop.service systemd-network-generator.service systemd-repart.service \
    systemd-binfmt.service systemd-update-utmp.service systemd-update-utmp-runlevel.service; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done

mkdir -p "$root/etc/systemd/journald.conf.d" "$root/etc/systemd/system/serial-getty@ttyS0.service.d"
printf '[Journal]\nStorage=volatile\nRuntimeMaxUse=4M\nAudit=no\n' > "$root/etc/systemd/journald.conf.d/offshoot.conf"

# The console belongs to whoever owns the VM.
cat > "$root/etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf" <<'END'
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200,38400,9600 - $TERM
END

# Reachable from outside, in memory only; SAVE and CONFIG SET let a test write a file through it.
cat >> "$root/etc/redis/redis.conf" <<'END'
bind * -::*
protected-mode no
save ""
appendonly no
enable-protected-configs yes
enable-debug-command yes
END
