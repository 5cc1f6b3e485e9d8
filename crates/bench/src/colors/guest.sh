#!/bin/sh
# guest.sh DIR SUITE KERNEL PREPARE CUSTOMIZE: the default guest with another kernel, or of another release, from the
# mirror that the host uses. What is complete is kept. Kernels other than the cloud's have ext4 in a module.
set -eu
dir=$1 suite=$2 kernel=$3 prepare=$4 customize=$5
[ -e "$dir/complete" ] && exit 0
rm -rf "$dir"
mkdir -p "$dir"
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | grep -m 1 '/debian/*$' || true)
mirror=${mirror:-http://deb.debian.org/debian}
apt-config dump | grep -E '^Acquire::(http|https|Check-|Retries)' | grep -v ' "";$' >"$dir/apt.conf" || true
release=${suite%-backports}
set -- "deb $mirror $release main"
if [ "$suite" != "$release" ]; then
    set -- "$@" "deb $mirror $suite main"
    kernel=$kernel/$suite
fi
unshare --pid --fork --kill-child=KILL --mount-proc mmdebstrap --quiet --mode=root --format=directory \
    --variant=minbase --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --aptopt='APT::Install-Recommends "false"' --aptopt="$dir/apt.conf" \
    --include="dbus,initramfs-tools,iproute2,kmod,$kernel,netbase,nginx-light,procps,redis-server,systemd-sysv,udev,zstd" \
    --essential-hook="sh $prepare \"\$1\"" \
    --essential-hook='printf "%s\n" crc32c_generic ext4 >>"$1/etc/initramfs-tools/modules"' \
    --customize-hook="sh $customize \"\$1\"" "$release" "$dir/root" "$@"
cp "$dir"/root/boot/vmlinuz-* "$dir/kernel"
cp "$dir"/root/boot/initrd.img-* "$dir/initrd"
mke2fs -q -t ext4 -d "$dir/root" "$dir/disk.raw" 2G
rm -rf "$dir/root"
: >"$dir/complete"
