#!/usr/bin/env bash
# Runs Eclipse's MQTT conformance tests (https://github.com/eclipse-paho/paho.mqtt.testing), each by itself,
# against a gateway that it starts. The suite is not part of this repository.
#
#   tests/conformance/paho.sh SUITE_DIR [TEST]...
#
# SUITE_DIR: the suite's root, or its folder interoperability. TEST: names such as test_will_delay; else all.
# HEADGATE=PATH names the gateway; else the one of this tree is built. SECONDS_A_TEST=90.
#
# Ends with 0 if every test passed, 1 if one failed, 2 if they could not be run.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
patience=${SECONDS_A_TEST:-90}

# The suite's scripts know no other.
address=127.0.0.1
port=1883

fail() {
    echo "paho.sh: $*" >&2
    exit 2
}

is_taken() {
    (: >"/dev/tcp/$address/$port") 2>/dev/null
}

# ---- What is needed ----

[ $# -gt 0 ] || fail "name the folder of the suite: tests/conformance/paho.sh SUITE_DIR (git clone https://github.com/eclipse-paho/paho.mqtt.testing)"
suite=$1
shift
[ -d "$suite" ] || fail "$suite is not a folder"
[ -f "$suite/client_test5.py" ] || suite=$suite/interoperability
for script in client_test.py client_test5.py; do
    [ -f "$suite/$script" ] || fail "there is no $script in ${suite%/interoperability} nor in its folder interoperability: name the root of paho.mqtt.testing"
done
suite=$(cd "$suite" && pwd)
case $patience in
'' | 0 | *[!0-9]*) fail "SECONDS_A_TEST=$patience: a number of seconds is needed" ;;
esac
# One that is only a shim fails here, too.
python3 -c '' 2>/dev/null || fail "python3 is needed and does not run (Debian, as root: apt-get install python3)"
command -v timeout >/dev/null || fail "timeout is needed (Debian, as root: apt-get install coreutils)"

gateway=${HEADGATE:-}
if [ -z "$gateway" ]; then
    command -v cargo >/dev/null || fail "there is no cargo to build the gateway with: name one that is built, HEADGATE=PATH"
    cargo build --release --manifest-path "$root/Cargo.toml" || fail "the gateway could not be built; what cargo said is above"
    gateway=${CARGO_TARGET_DIR:-$root/target}/release/headgate
fi
if [ ! -f "$gateway" ] || [ ! -x "$gateway" ]; then
    fail "there is no program at $gateway: HEADGATE=PATH names the gateway"
fi
! is_taken || fail "something listens on $address:$port already, and the suite knows no other port: stop it first"

# ---- The gateway ----

home=$(mktemp -d)
gateway_pid=

end() {
    if [ -n "$gateway_pid" ]; then
        kill "$gateway_pid" 2>/dev/null || true
        wait "$gateway_pid" 2>/dev/null || true
    fi
    rm -rf "$home"
}
trap end EXIT
trap 'exit 2' INT TERM

# test_server_keep_alive expects a server that shortens the keep-alive to 60 s.
cat >"$home/headgate.toml" <<END
[store]
path = "store"

[mqtt]
listen = "$address:$port"
max_keep_alive_s = 60

[mqtt.auth]
acl_file = "acl.toml"

[metrics]
listen = "off"
END
# test_subscribe_failure expects one topic that nobody may subscribe to.
cat >"$home/acl.toml" <<'END'
[[rule]]
allow = ["publish", "subscribe"]
topics = ["#"]

[[rule]]
deny = ["subscribe"]
topics = ["test/nosubscribe"]
END

# Nothing of the caller's own settings: HEADGATE_… variables would win over the file.
env -i PATH="$PATH" HOME="$home" "$gateway" run --config "$home/headgate.toml" >"$home/log" 2>&1 &
gateway_pid=$!
waits=0
until is_taken; do
    if ! kill -0 "$gateway_pid" 2>/dev/null; then
        cat "$home/log" >&2
        fail "the gateway did not start; what it said is above"
    fi
    waits=$((waits + 1))
    [ "$waits" -lt 600 ] || fail "the gateway does not listen on $address:$port after a minute"
    sleep 0.1
done

# ---- The tests ----

# As Python reads them: what is commented out is none.
tests_of() {
    python3 - "$suite/$1" <<'END'
import ast, sys
for node in ast.parse(open(sys.argv[1], encoding="utf-8").read()).body:
    if isinstance(node, ast.ClassDef):
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name.startswith("test"):
                print(f"{node.name}.{item.name}")
END
}

is_wanted() {
    [ $# -gt 1 ] || return 0
    local test=$1 name
    shift
    for name in "$@"; do
        if [ "$name" = "${test#*.}" ]; then return 0; fi
    done
    return 1
}

passed=0
failed=()
for script in client_test.py client_test5.py; do
    tests=$(tests_of "$script") || fail "$suite/$script could not be read as Python"
    for test in $tests; do
        is_wanted "$test" "$@" || continue
        kill -0 "$gateway_pid" 2>/dev/null || {
            tail -n 30 "$home/log" >&2
            fail "the gateway has ended; the last it said is above"
        }
        started=$SECONDS
        status=0
        # In a folder of its own: some versions of the suite write logs.
        (cd "$home" && PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$suite" timeout -k 5 "$patience" \
            python3 "$suite/$script" "$test") >"$home/output" 2>&1 || status=$?
        took="$((SECONDS - started)) s"
        if [ "$status" = 0 ]; then
            echo "ok      $script ${test#*.} ($took)"
            passed=$((passed + 1))
            continue
        fi
        failed+=("$script ${test#*.}")
        case $status in
        124 | 137) echo "FAILED  $script ${test#*.}: not done after $took" ;;
        *) echo "FAILED  $script ${test#*.} ($took)" ;;
        esac
        tail -n 15 "$home/output" | sed 's/^/        /'
    done
done

[ $((passed + ${#failed[@]})) -gt 0 ] || fail "the suite has no test of that name: $*"
echo "Conformance: $passed passed, ${#failed[@]} failed."
if [ ${#failed[@]} -gt 0 ]; then
    printf '  %s\n' "${failed[@]}"
    exit 1
fi
