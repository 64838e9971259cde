#!/bin/sh
# Puts together what the Raspberry Pi's boot ROM and firmware read from the first partition: the
# firmware itself, a device tree for each board, U-Boot, and config.txt which ties them together.
#
#   firmware.sh OUTPUT FIRMWARE UBOOT ARMSTUB
#
# FIRMWARE  folder `boot` of https://github.com/raspberrypi/firmware
# UBOOT     folder with u-boot-rpi3.bin and u-boot-rpi4.bin
# ARMSTUB   folder with armstub8-gic.bin, built from https://github.com/raspberrypi/tools
set -eu

# The boards that do not start without the file, where it comes from, the file.
files() {
    cat <<'END'
Raspberry Pi 3: firmware bootcode.bin
Raspberry Pi 3: firmware start.elf
Raspberry Pi 3: firmware fixup.dat
Raspberry Pi 3: firmware overlays/upstream.dtbo
Raspberry Pi 3: uboot u-boot-rpi3.bin
Raspberry Pi 3 B: firmware bcm2710-rpi-3-b.dtb
Raspberry Pi 3 B+: firmware bcm2710-rpi-3-b-plus.dtb
Compute Module 3: firmware bcm2710-rpi-cm3.dtb
Raspberry Pi Zero 2 W: firmware bcm2710-rpi-zero-2.dtb
Raspberry Pi Zero 2 W: firmware bcm2710-rpi-zero-2-w.dtb
Raspberry Pi 4: firmware start4.elf
Raspberry Pi 4: firmware fixup4.dat
Raspberry Pi 4: firmware overlays/upstream-pi4.dtbo
Raspberry Pi 4: uboot u-boot-rpi4.bin
Raspberry Pi 4: armstub armstub8-gic.bin
Raspberry Pi 4 B: firmware bcm2711-rpi-4-b.dtb
Raspberry Pi 400: firmware bcm2711-rpi-400.dtb
Compute Module 4: firmware bcm2711-rpi-cm4.dtb
Compute Module 4S: firmware bcm2711-rpi-cm4s.dtb
END
}

# The firmware's device trees describe the boards as the Raspberry Pi's own kernel has them; the
# overlays named upstream make them what the kernel of NixOS expects. Without them a Pi 3 has no USB,
# and so no Ethernet.
config() {
    cat <<'END'
[pi3]
kernel=u-boot-rpi3.bin
dtoverlay=upstream
# The serial port's clock comes from the core's.
core_freq=250

[pi02]
kernel=u-boot-rpi3.bin
dtoverlay=upstream
core_freq=250

[pi4]
kernel=u-boot-rpi4.bin
dtoverlay=upstream-pi4
enable_gic=1
armstub=armstub8-gic.bin
arm_boost=1

[cm4]
# The USB ports of its carrier boards hang on the other controller.
otg_mode=1

[all]
arm_64bit=1
# U-Boot does not start without it.
enable_uart=1
# The firmware must not paint over the kernel's screen.
avoid_warnings=1
disable_overscan=1
END
}

fail() {
    printf 'firmware.sh: %s\n' "$*" >&2
    exit 1
}

[ $# = 4 ] || fail "called wrongly: firmware.sh OUTPUT FIRMWARE UBOOT ARMSTUB"
output=$1
firmware=$2
uboot=$3
armstub=$4

for folder in "$firmware" "$uboot" "$armstub"; do
    [ -d "$folder" ] || fail "$folder is no folder"
done

mkdir -p "$output/overlays"
# Read from a file, not from a pipe, so that `fail` ends the script and not a subshell.
list=$output/.files
files > "$list"
while read -r line; do
    board=${line%%:*}
    file=${line##* }
    from=${line#"$board: "}
    from=${from%" $file"}
    case $from in
    firmware) folder=$firmware remedy="take a newer or complete release of the firmware (in Nix: pkgs.raspberrypifw)" ;;
    uboot) folder=$uboot remedy="build U-Boot for this board (in Nix: pkgs.ubootRaspberryPi3_64bit, pkgs.ubootRaspberryPi4_64bit)" ;;
    armstub) folder=$armstub remedy="build the stub (in Nix: pkgs.raspberrypi-armstubs)" ;;
    esac
    # An empty file is what a download that broke off leaves.
    [ -s "$folder/$file" ] ||
        fail "$board: $file is missing or empty in $folder; without it this board does not start: $remedy"
    cp -L "$folder/$file" "$output/$file"
done < "$list"
rm "$list"
config > "$output/config.txt"
chmod -R u+w "$output"
