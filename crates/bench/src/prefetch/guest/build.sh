#!/bin/sh
# build.sh DIR PREPARE CUSTOMIZE HERE [more]: a Debian guest with redis, PostgreSQL, a Python web application and six
# programs, and where asked nginx and a service on the JVM, from the mirror that the host uses. What is complete is kept.
set -eu
dir=$1 prepare=$2 customize=$3 here=$4 more=${5:-}
servers=redis-server,postgresql-15,python3-flask,gunicorn
[ "$more" != more ] || servers=$servers,nginx-light,openjdk-17-jdk-headless
[ -e "$dir/complete" ] && exit 0
rm -rf "$dir"
mkdir -p "$dir"
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | grep -m 1 '/debian/*$' || true)
mirror=${mirror:-http://deb.debian.org/debian}
apt-config dump | grep -E '^Acquire::(http|https|Check-|Retries)' | grep -v ' "";$' >"$dir/apt.conf" || true
cc -O2 -static -o "$dir/chase" "$here/chase.c"
unshare --pid --fork --kill-child=KILL --mount-proc mmdebstrap --quiet --mode=root --format=directory \
    --variant=minbase --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --aptopt='APT::Install-Recommends "false"' --aptopt="$dir/apt.conf" \
    --include='dbus,initramfs-tools,iproute2,kmod,linux-image-cloud-amd64,netbase,procps,systemd-sysv,udev,zstd' \
    --include="$servers" \
    --essential-hook="sh $prepare \"\$1\"" \
    --customize-hook="sh $customize \"\$1\"" \
    --customize-hook="sh $here/servers.sh \"\$1\" $here $dir/chase $more" bookworm "$dir/root" "deb $mirror bookworm main"
cp "$dir"/root/boot/vmlinuz-* "$dir/kernel"
cp "$dir"/root/boot/initrd.img-* "$dir/initrd"
mke2fs -q -t ext4 -d "$dir/root" "$dir/disk.raw" 3G
rm -rf "$dir/root"
: >"$dir/complete"
