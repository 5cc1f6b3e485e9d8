#!/bin/sh
# Runs on the bare tree at $1, before the kernel's package makes its initial RAM disk: that one holds what
# reaches a root file system on a virtio disk and no more, so that less is read, unpacked and kept.
set -eu
mkdir -p "$1/etc/initramfs-tools/conf.d"
printf '%s\n' virtio_pci virtio_blk virtio_net > "$1/etc/initramfs-tools/modules"
printf '%s\n' MODULES=list COMPRESS=zstd RESUME=none > "$1/etc/initramfs-tools/conf.d/offshoot"
