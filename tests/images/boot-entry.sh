#!/bin/sh
# needs: bootctl:systemd-boot unshare:util-linux jq:jq
# What `headgate boot install` writes for the image and for later systems, read by systemd's own parser, and in
# the order in which that takes entries.
. "$(dirname -- "$0")/expect.sh"

headgate=${HEADGATE:-${CARGO_TARGET_DIR:-$here/../../target}/release/headgate}
if [ ! -x "$headgate" ]; then
    echo "  headgate itself: cargo build --release"
    exit 77
fi
# bootctl insists on a mounted partition; a folder mounted on itself will do.
mkdir esp root
if ! unshare --map-root-user --mount mount --bind esp esp 2> /dev/null; then
    echo "  the right to mount in a namespace of one's own"
    exit 77
fi
list() {
    # shellcheck disable=SC2016 # Expanded in there.
    SYSTEMD_RELAX_ESP_CHECKS=1 unshare --map-root-user --mount sh -c \
        'mount --bind esp esp && bootctl --esp-path="$PWD/esp" --json=short list' > listed 2> bootctl.log ||
        failed "$(cat bootctl.log)"
    # Older ones write objects, newer ones an array of them. What has no file is made up by bootctl.
    jq --slurp 'flatten | map(select(.path))' listed > list.json
}
has() { jq --exit-status "$1" list.json > /dev/null || failed "not so: $1 in $(cat list.json)"; }

# system NAME: in the store below root, with the boot.json of the fixture; its path is in $toplevel then.
system() {
    toplevel=/nix/store/00000000000000000000000000000000-$1
    mkdir -p "root$toplevel"
    sed "s,[0-9a-z/]*/0*-nixos-system,$toplevel,g" "$here/fixture/boot.json" > "root$toplevel/boot.json"
    for file in $(jq -r '.["org.nixos.bootspec.v1"] | .kernel, .initrd' "root$toplevel/boot.json"); do
        mkdir -p "root$(dirname -- "$file")"
        echo "contents of $file" > "root$file"
    done
}
boot() { "$headgate" boot "$@" --offline --esp esp --root root > boot.log 2>&1 || failed "$(cat boot.log)"; }

echo "a boot loader" > systemd-boot.efi
system first
boot install --generation 1 --tries 3 --version 0.1.0 --efi-arch aa64 \
    --systemd-boot systemd-boot.efi --loader-conf "$here/fixture/loader.conf" "$toplevel"
list

begin "there is one entry, and its kernel and initrd are found"
has 'length == 1'
has '.[0] | .id == "headgate-1.conf" and .title == "Headgate 0.1.0" and .sortKey == "headgate" and .version == "1"'
for file in $(jq -r '.[0] | .linux, .initrd[]' list.json); do
    [ -s "esp$file" ] || failed "there is no $file"
done

begin "it starts the system with the kernel parameters of the modules"
has ".[0].options | startswith(\"init=$toplevel/init \") and contains(\" panic=10 \")"

begin "it has three tries, so that the first boot shows whether they are counted"
has '.[0] | .triesLeft == 3 and (.triesDone // 0) == 0'
[ -f esp/loader/entries/headgate-1+3.conf ] || failed "$(ls esp/loader/entries)"

begin "the boot loader is where the firmware looks for it on any disk"
cmp -s systemd-boot.efi esp/EFI/BOOT/BOOTAA64.EFI || failed "$(find esp -type f)"

begin "the boot loader takes entries by a pattern, so that a later one can win"
pattern=$(sed -n 's/^default //p' esp/loader/loader.conf)
# shellcheck disable=SC2254 # It is a pattern.
case headgate-1.conf in
$pattern) ;;
*) failed "loader.conf has another default: $(cat esp/loader/loader.conf)" ;;
esac

# same_order: systemd takes entries as Headgate thinks that it does.
same_order() {
    list
    "$headgate" --json boot list --offline --esp esp --root root > own.json
    equal "$(jq -c '[.entries[] | "headgate-\(.generation).conf"]' own.json)" "$(jq -c 'map(.id)' list.json)" "order"
    equal "$1" "$(jq -r '.[0].id' list.json)" "what is booted next"
}

begin "of good entries the newest is booted, by number and not by letter"
boot bless --generation 1
for generation in 9 10; do
    system "$generation"
    boot install --generation "$generation" "$toplevel"
    boot bless --generation "$generation"
done
same_order headgate-10.conf

begin "a new entry is booted as long as it has tries, and then the one before"
system 11
boot install --generation 11 "$toplevel"
same_order headgate-11.conf
mv esp/loader/entries/headgate-11+3.conf esp/loader/entries/headgate-11+1-2.conf
same_order headgate-11.conf
mv esp/loader/entries/headgate-11+1-2.conf esp/loader/entries/headgate-11+0-3.conf
same_order headgate-10.conf

begin "of several bad ones none is booted"
mv esp/loader/entries/headgate-10.conf esp/loader/entries/headgate-10+0-3.conf
same_order headgate-9.conf
