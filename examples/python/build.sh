#!/bin/sh
# Makes a component of app.py: mean.wasm beside manifest.toml, or the file that is named.
set -eu
out=$(realpath -m "${1:-$(dirname "$0")/mean.wasm}")
cd "$(dirname "$0")"
wit=${WIT:-../../wit}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# `--stub-wasi` takes away all imports that begin with `wasi:`: the interpreter's, which the gateway does
# not have, and those that it does have. These are called otherwise until that is done.
cp -R "$wit" "$work/wit"
find "$work/wit" -name '*.wit' -exec perl -pi -e 's/wasi:/wasx:/g' {} +
PYTHONDONTWRITEBYTECODE=1 "${COMPONENTIZE_PY:-componentize-py}" -d "$work/wit" -w app \
    --import-interface-name wasx:config/store@0.2.0-draft=config \
    --import-interface-name wasx:keyvalue/store@0.2.0-draft=keyvalue \
    componentize --stub-wasi app -o "$work/app.wasm"
perl -pi -e 's/wasx:/wasi:/g' "$work/app.wasm"
mv "$work/app.wasm" "$out"
