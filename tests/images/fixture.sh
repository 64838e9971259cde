#!/bin/sh
# needs: jq:jq
# That tests/images/fixture is what the modules render now. With --write: makes it so.
. "$(dirname -- "$0")/expect.sh"

if ! command -v nix-instantiate > /dev/null || [ -z "${NIXPKGS:-}" ]; then
    echo "  nix-instantiate, and NIXPKGS, which names a copy of nixpkgs as in flake.lock"
    exit 77
fi

begin "the partition definitions and what the boot loader is told are those of the modules"
nix-instantiate --eval --strict --json --option allow-import-from-derivation false \
    --arg nixpkgs "$NIXPKGS" "$here/fixture.nix" > rendered.json 2> nix.log || failed "$(cat nix.log)"
jq -r 'keys[]' rendered.json > names
while read -r name; do
    mkdir -p "rendered/$(dirname -- "$name")"
    jq -j --arg name "$name" '.[$name]' rendered.json > "rendered/$name"
done < names

if [ "${1:-}" = --write ]; then
    rm -rf "$here"/fixture/*.repart.d
    cp -r rendered/. "$here/fixture/"
    exit
fi
for rendered in rendered/*; do
    diff -r "$here/fixture/${rendered##*/}" "$rendered" >&2 ||
        failed "tests/images/fixture is out of date: run tests/images/fixture.sh --write"
done
