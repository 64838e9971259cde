#!/bin/sh
# needs: sgdisk:gdisk sfdisk:fdisk
# images/hybrid-mbr.sh, on small images.
. "$(dirname -- "$0")/expect.sh"

# bytes FILE OFFSET COUNT, in hexadecimal
bytes() { od -An -v -tx1 -j "$2" -N "$3" "$1" | tr -d ' \n'; }

make_image() {
    rm -f disk.img
    truncate -s 64M disk.img
    sgdisk --new 1:2048:+32M --typecode 1:EF00 --change-name 1:headgate-esp \
        --new 2:0:0 --typecode 2:8305 --change-name 2:headgate-root disk.img > /dev/null
}

begin "the first entry of the MBR is the first partition, as FAT32"
make_image
sh "$images/hybrid-mbr.sh" disk.img
equal 0c "$(bytes disk.img 450 1)" "type of the first entry"
# Little-endian: it begins at sector 2048 and has 32 MiB.
equal 00080000 "$(bytes disk.img 454 4)" "first sector of the first entry"
equal 00000100 "$(bytes disk.img 458 4)" "sectors of the first entry"
equal 55aa "$(bytes disk.img 510 2)" "signature"

begin "behind it stands the entry by which all others find the GPT"
equal ee "$(bytes disk.img 466 1)" "type of the second entry"
equal 00 "$(bytes disk.img 482 1)" "type of the third entry"

begin "the GPT is as it was"
sgdisk --verify disk.img > verified
grep -q "No problems found" verified || failed "$(cat verified)"
equal "headgate-esp headgate-root" \
    "$(sfdisk --json disk.img | sed -n 's/.*"name": *"\([^"]*\)".*/\1/p' | tr '\n' ' ' | sed 's/ $//')" "partitions"

begin "a second run changes nothing"
cp disk.img before.img
sh "$images/hybrid-mbr.sh" disk.img
cmp -s disk.img before.img || failed "the image is another"

begin "an image without partitions is refused, and left as it is"
truncate -s 1M empty.img
cp empty.img before.img
refuses sh "$images/hybrid-mbr.sh" empty.img
says "empty.img: its first partition is no EFI system partition"
cmp -s empty.img before.img || failed "the image is another"

begin "an image that is not there is refused by its name"
refuses sh "$images/hybrid-mbr.sh" nothing.img
says "nothing.img is no file"
