#!/bin/sh
# Gives a GPT disk image an MBR too, which names the first partition as FAT32: the boot ROM of the
# Raspberry Pi 3 and its like reads no GPT. All others find the 0xEE entry behind it and read the GPT.
#
#   hybrid-mbr.sh IMAGE
set -eu

fail() {
    printf 'hybrid-mbr.sh: %s\n' "$*" >&2
    exit 1
}

[ $# = 1 ] || fail "called wrongly: hybrid-mbr.sh IMAGE"
image=$1
[ -f "$image" ] || fail "$image is no file"

# sgdisk makes one of nothing at all, too.
esp=C12A7328-F81F-11D2-BA4B-00A0C93EC93B
sgdisk --info=1 "$image" | grep -q "$esp" ||
    fail "$image: its first partition is no EFI system partition of a GPT, which the boot ROM could read"
sgdisk --hybrid 1:EE "$image" > /dev/null || fail "$image: sgdisk made no hybrid MBR of its GPT"
# sgdisk derives the type 0xEF from the GPT's; the boot ROM wants 0x0C. The table begins at byte 446,
# and the type is the fifth byte of an entry.
printf '\014' | dd of="$image" bs=1 seek=450 conv=notrunc status=none
