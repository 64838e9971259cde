#!/bin/sh
# needs: systemd-repart:systemd-repart sfdisk:fdisk sgdisk:gdisk mkfs.ext4:e2fsprogs debugfs:e2fsprogs mkfs.vfat:dosfstools mcopy:mtools jq:jq
# The partition definitions of the image and of the gateway's first boot, applied to disk images by
# the real systemd-repart.
. "$(dirname -- "$0")/expect.sh"

version=$(systemd-repart --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
if [ "$version" -lt 254 ]; then
    echo "  systemd-repart 254 or newer, which can do without loop devices; this is $version"
    exit 77
fi

data_type=$(sed -n 's/^Type=//p' "$here/fixture/gateway.repart.d/30-data.conf" | tr a-f A-F)
mib=2048 # sectors

repart() { systemd-repart --offline=yes --dry-run=no "$@" > repart.log 2>&1; }

# As in the initrd, but for the disk, which is a file.
boot() { repart --empty=refuse --discard=no --definitions="$here/fixture/gateway.repart.d" "$1"; }

# A table that is not yet as large as the disk makes sfdisk complain.
table() { sfdisk --json "$1" 2> /dev/null; }
# of DISK LABEL FIELD: what the partition table says about a partition.
of() { table "$1" | jq -r --arg label "$2" ".partitiontable.partitions[] | select(.name == \$label).$3"; }
partitions() { table "$1" | jq -c '.partitiontable.partitions | map({name, start, size, type, uuid})'; }

# within DISK LABEL: the partition, as debugfs names a file system inside a file.
within() { printf '%s?offset=%s' "$1" "$(($(of "$1" "$2" start) * 512))"; }
write_file() { debugfs -w -R "write $3 kept" "$(within "$1" "$2")" > /dev/null 2>&1; }
read_file() { debugfs -R "cat kept" "$(within "$1" "$2")" 2> /dev/null; }
is_sound() { e2fsck -fn "$(within "$1" "$2")" > e2fsck.log 2>&1 || failed "file system $2: $(cat e2fsck.log)"; }

echo "measured for months" > measurements

# --- the image -----------------------------------------------------------------------------------

begin "the image's definitions make an EFI system partition and a root of fixed sizes"
mkdir -p esp/EFI/BOOT esp/loader/entries root/nix/store
echo "a boot loader" > esp/EFI/BOOT/BOOTAA64.EFI
cp "$here/fixture/loader.conf" esp/loader/
# The name has a counter, which only a long name has room for.
echo "title A system" > esp/loader/entries/headgate-1+3.conf
echo "a system" > root/nix/store/system
# What nixpkgs adds to the definitions when it builds the image.
cp -r "$here/fixture/image.repart.d" image.repart.d
echo "CopyFiles=$scratch/esp:/" >> image.repart.d/10-esp.conf
echo "CopyFiles=$scratch/root:/" >> image.repart.d/20-root.conf
repart --architecture=arm64 --empty=create --size=auto --sector-size=512 \
    --seed=0867da16-f251-457d-a9e8-c31f9a3c220b --definitions=image.repart.d image.raw ||
    failed "$(cat repart.log)"
equal 512 "$(sfdisk --json image.raw | jq .partitiontable.sectorsize)" "sector size"
equal "headgate-esp headgate-root" "$(partitions image.raw | jq -r 'map(.name) | join(" ")')" "partitions"
equal "$((512 * mib))" "$(of image.raw headgate-esp size)" "sectors of the EFI system partition"
equal "$((3072 * mib))" "$(of image.raw headgate-root size)" "sectors of the root"
equal C12A7328-F81F-11D2-BA4B-00A0C93EC93B "$(of image.raw headgate-esp type)" "type of the EFI system partition"
equal B921B045-1DF0-41C3-AF44-4C6F280D3FAE "$(of image.raw headgate-root type)" "type of the root, which is that of arm64"

begin "the boot files are on the EFI system partition, which is FAT32 as the Raspberry Pi wants it"
offset=$(($(of image.raw headgate-esp start) * 512))
MTOOLS_SKIP_CHECK=1 mcopy -i "image.raw@@$offset" ::/loader/entries/headgate-1+3.conf copied
cmp -s copied esp/loader/entries/headgate-1+3.conf || failed "the entry is another"
equal FAT32 "$(dd if=image.raw bs=1 skip=$((offset + 82)) count=5 status=none)" "kind of FAT"

begin "the system is on the root"
equal "a system" "$(debugfs -R 'cat /nix/store/system' "$(within image.raw headgate-root)" 2> /dev/null)" "its file"

# --- the gateway's boots -------------------------------------------------------------------------

# flash FILE SIZE: the image on a disk of this size.
flash() { cp --sparse=always image.raw "$1" && truncate -s "$2" "$1"; }

begin "the first boot makes the data partition of all that the image leaves"
flash disk.img 5G
partitions disk.img > before
boot disk.img || failed "$(cat repart.log)"
equal "$data_type" "$(of disk.img headgate-data type)" "type"
[ "$(of disk.img headgate-data size)" -gt $((1500 * mib)) ] || failed "too small: $(partitions disk.img)"
equal "$(cat before)" "$(partitions disk.img | jq -c '.[:2]')" "the other partitions"
is_sound disk.img headgate-data

begin "the second boot leaves it as it is"
write_file disk.img headgate-data measurements
partitions disk.img > before
boot disk.img || failed "$(cat repart.log)"
equal "$(cat before)" "$(partitions disk.img)" "partitions"
equal "measured for months" "$(read_file disk.img headgate-data)" "what is in it"

begin "on a larger disk it grows, and keeps what is in it"
start=$(of disk.img headgate-data start)
truncate -s 7G disk.img
boot disk.img || failed "$(cat repart.log)"
equal "$start" "$(of disk.img headgate-data start)" "where it begins"
[ "$(of disk.img headgate-data size)" -gt $((3500 * mib)) ] || failed "it did not grow: $(partitions disk.img)"
equal "measured for months" "$(read_file disk.img headgate-data)" "what is in it"
is_sound disk.img headgate-data

begin "a data partition that was made by hand is taken, with what is in it"
flash disk.img 5G
sgdisk --move-second-header --new 3:0:+600M --typecode "3:$data_type" --change-name 3:headgate-data disk.img > sgdisk.log
mkfs.ext4 -q -E "offset=$(($(of disk.img headgate-data start) * 512))" disk.img 600M 2> /dev/null
write_file disk.img headgate-data measurements
boot disk.img || failed "$(cat repart.log)"
equal 3 "$(partitions disk.img | jq length)" "partitions"
[ "$(of disk.img headgate-data size)" -gt $((1400 * mib)) ] || failed "it did not grow: $(partitions disk.img)"
equal "measured for months" "$(read_file disk.img headgate-data)" "what is in it"

begin "a partition that somebody made for other things stays theirs"
flash disk.img 5G
sgdisk --move-second-header --new 3:0:+600M --typecode 3:8300 --change-name 3:theirs disk.img > sgdisk.log
mkfs.ext4 -q -E "offset=$(($(of disk.img theirs start) * 512))" disk.img 600M 2> /dev/null
write_file disk.img theirs measurements
partitions disk.img > before
boot disk.img || failed "$(cat repart.log)"
equal "$(cat before)" "$(partitions disk.img | jq -c '.[:3]')" "the other partitions"
equal "measured for months" "$(read_file disk.img theirs)" "what is in it"
equal "$data_type" "$(of disk.img headgate-data type)" "type of the data partition beside it"

begin "a disk without room for it is refused, and left as it is"
flash disk.img 3600M
sha256sum disk.img > before
refuses boot disk.img
sha256sum --check --status before || failed "the disk is another"
said=$(cat repart.log)
says "fit"

begin "the Raspberry Pi's hybrid MBR is still there after the first boot"
flash disk.img 5G
sh "$images/hybrid-mbr.sh" disk.img
dd if=disk.img of=before bs=512 count=1 status=none
boot disk.img || failed "$(cat repart.log)"
dd if=disk.img of=after bs=512 count=1 status=none
cmp -s before after || failed "the MBR is another"
equal "$data_type" "$(of disk.img headgate-data type)" "type of the data partition"
sgdisk --verify disk.img > sgdisk.log
grep -q "No problems found" sgdisk.log || failed "$(cat sgdisk.log)"
