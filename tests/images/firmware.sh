#!/bin/sh
# needs:
# images/firmware.sh, with files that only look like firmware.
. "$(dirname -- "$0")/expect.sh"

table=$scratch/table
sed -n '/^files() {/,/^}/p' "$images/firmware.sh" | grep ': ' > "$table"

# lay_out: every file that the table names, in three folders.
lay_out() ( # With variables of its own.
    rm -rf firmware uboot armstub
    while read -r line; do
        file=${line##* }
        from=${line%" $file"}
        from=${from##* }
        mkdir -p "$from/$(dirname -- "$file")"
        printf 'contents of %s\n' "$file" > "$from/$file"
    done < "$table"
)

assemble() {
    rm -rf out
    sh "$images/firmware.sh" out firmware uboot armstub
}

begin "with every file there, all that config.txt names is on the partition"
[ "$(wc -l < "$table")" -gt 15 ] || failed "the table was not read: $(cat "$table")"
lay_out
assemble
for file in $(sed -n 's/^\(kernel\|armstub\)=//p' out/config.txt); do
    [ -s "out/$file" ] || failed "config.txt names $file, which is not there"
done
for overlay in $(sed -n 's/^dtoverlay=//p' out/config.txt); do
    [ -s "out/overlays/$overlay.dtbo" ] || failed "config.txt names overlay $overlay, which is not there"
done
equal "$(($(wc -l < "$table") + 1))" "$(find out -type f | wc -l)" "files, with config.txt"

begin "links become files, as FAT has no links"
lay_out
mv uboot/u-boot-rpi3.bin elsewhere
ln -s "$scratch/elsewhere" uboot/u-boot-rpi3.bin
assemble
[ "$(find out -type l)" = "" ] || failed "there are links: $(find out -type l)"

begin "a board without one of its files is refused: with board, file, folder and remedy"
while read -r line; do
    file=${line##* }
    board=${line%%:*}
    from=${line#"$board: "}
    from=${from%" $file"}
    lay_out
    rm "$from/$file"
    refuses assemble
    says "$board: $file is missing or empty in $from" "in Nix: pkgs."
    equal 1 "$(printf '%s\n' "$said" | wc -l)" "lines of the error about $file"
done < "$table"

begin "an empty file, as a download that broke off leaves it, is refused too"
lay_out
: > firmware/start4.elf
refuses assemble
says "Raspberry Pi 4: start4.elf is missing or empty in firmware"

begin "a folder that is none is refused by its name"
lay_out
rm -r armstub
refuses assemble
says "armstub is no folder"

begin "a call with too little says how it goes"
refuses sh "$images/firmware.sh" out
says "firmware.sh OUTPUT FIRMWARE UBOOT ARMSTUB"
