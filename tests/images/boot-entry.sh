#!/bin/sh
# needs: bootctl:systemd-boot-tools unshare:util-linux jq:jq
# The boot files of the image, read by systemd's own parser.
. "$(dirname -- "$0")/expect.sh"

mkdir -p esp/EFI/BOOT esp/EFI/headgate/1
cp -r "$here/fixture/esp/loader" esp/
: > esp/EFI/headgate/1/kernel.efi
: > esp/EFI/headgate/1/initrd

# bootctl insists on a mounted partition; a folder mounted on itself will do.
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

list
begin "there is one entry, and its kernel and initrd are found"
has 'length == 1'
has '.[0] | .id == "headgate-1.conf" and .title == "Headgate 0.1.0" and .sortKey == "headgate" and .version == "1"'
has '.[0].linux == "/EFI/headgate/1/kernel.efi" and .[0].initrd == ["/EFI/headgate/1/initrd"]'

begin "it carries no counter, as nothing would ever end the counting"
has '.[0] | has("triesLeft") | not'

begin "the boot loader takes it by a pattern, so that a later entry can win"
entry=headgate-1.conf
pattern=$(sed -n 's/^default //p' esp/loader/loader.conf)
# shellcheck disable=SC2254 # It is a pattern.
case $entry in
$pattern) ;;
*) failed "loader.conf has another default: $(cat esp/loader/loader.conf)" ;;
esac
cp esp/loader/entries/headgate-1.conf esp/loader/entries/headgate-2.conf
sed -i 's/^version 1/version 2/' esp/loader/entries/headgate-2.conf
list
has '.[0].id == "headgate-2.conf"'
