# What the tests here share: a folder to work in, and words to say what came of it. Sourced by each.
# shellcheck shell=sh disable=SC2034
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
images=$here/../../images
scratch=$(mktemp -d "${TMPDIR:-/tmp}/headgate-images.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM
cd "$scratch"
case="before its first case"

PATH=$PATH:/usr/sbin:/sbin

failed() {
    printf '%s: %s: FAILED: %s\n' "$(basename -- "$0")" "$case" "$*" >&2
    exit 1
}

# begin SENTENCE: what the following lines are about.
begin() {
    case=$1
    printf '  %s\n' "$case"
}

# equal EXPECTED ACTUAL WHAT
equal() {
    [ "$1" = "$2" ] || failed "$3: expected '$1', got '$2'"
}

# refuses COMMAND...: it fails; what it said is in $said then.
refuses() {
    if said=$("$@" 2>&1); then
        failed "went through: $*"
    fi
}

# says PART...: what was said has every part in it.
says() {
    for part in "$@"; do
        case $said in
        *"$part"*) ;;
        *) failed "expected '$part' in: $said" ;;
        esac
    done
}
