#!/bin/sh
# Makes a component of app.js: changed.wasm beside manifest.toml, or the file that is named.
set -eu
out=$(realpath -m "${1:-$(dirname "$0")/changed.wasm}")
cd "$(dirname "$0")"
wit=${WIT:-../../wit}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# `--backend-qjs-stub-wasi` takes away all imports that begin with `wasi:`: the interpreter's, which the
# gateway does not have, and those that it does have. These are called otherwise until that is done.
cp -R "$wit" app.js "$work"
find "$work" -name '*.wit' -exec perl -pi -e 's/wasi:/wasx:/g' {} +
perl -pi -e 's/wasi:/wasx:/g' "$work/app.js"
"${JCO:-node_modules/.bin/jco}" componentize "$work/app.js" --wit "$work/wit" --world-name app \
    --backend qjs --backend-qjs-disable-async --backend-qjs-stub-wasi -o "$work/app.wasm"
perl -pi -e 's/wasx:/wasi:/g' "$work/app.wasm"
mv "$work/app.wasm" "$out"
