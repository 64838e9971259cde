;; A guest that does what the first byte of each event tells it to, and answers with the event's
;; payload replaced by what came of it: a value, the text of an error, or the number of its case.
(module
  (import "wasi:keyvalue/store@0.2.0-draft" "open"
    (func $open (param i32 i32 i32)))
  (import "wasi:keyvalue/store@0.2.0-draft" "[method]bucket.get"
    (func $get (param i32 i32 i32 i32)))
  (import "wasi:keyvalue/store@0.2.0-draft" "[method]bucket.set"
    (func $set (param i32 i32 i32 i32 i32 i32)))
  (import "wasi:keyvalue/store@0.2.0-draft" "[method]bucket.delete"
    (func $delete (param i32 i32 i32 i32)))
  (import "wasi:keyvalue/store@0.2.0-draft" "[method]bucket.exists"
    (func $exists (param i32 i32 i32 i32)))
  (import "wasi:keyvalue/store@0.2.0-draft" "[method]bucket.list-keys"
    (func $list (param i32 i32 i64 i32)))
  (import "wasi:keyvalue/store@0.2.0-draft" "[resource-drop]bucket"
    (func $drop_bucket (param i32)))
  (import "wasi:keyvalue/atomics@0.2.0-draft" "increment"
    (func $increment (param i32 i32 i32 i64 i32)))
  (import "wasi:keyvalue/batch@0.2.0-draft" "set-many"
    (func $set_many (param i32 i32 i32 i32)))
  (import "wasi:keyvalue/batch@0.2.0-draft" "get-many"
    (func $get_many (param i32 i32 i32 i32)))
  (import "wasi:keyvalue/batch@0.2.0-draft" "delete-many"
    (func $delete_many (param i32 i32 i32 i32)))
  (import "wasi:clocks/monotonic-clock@0.2.0" "now" (func $monotonic (result i64)))
  (import "wasi:clocks/wall-clock@0.2.0" "now" (func $wall (param i32)))
  (import "wasi:random/random@0.2.0" "get-random-bytes" (func $random (param i64 i32)))
  (import "wasi:random/random@0.2.0" "get-random-u64" (func $random_number (result i64)))
  (import "wasi:random/insecure-seed@0.2.0" "insecure-seed" (func $seed (param i32)))
  (import "headgate:app/timers@0.1.0" "set-interval"
    (func $interval (param i32 i32 i64 i32)))
  (import "headgate:app/timers@0.1.0" "set-once"
    (func $once (param i32 i32 i64 i32)))
  (import "headgate:app/timers@0.1.0" "set-wall"
    (func $at_wall (param i32 i32 i64 i32)))
  (import "headgate:app/timers@0.1.0" "cancel"
    (func $cancel (param i32 i32) (result i32)))
  (import "headgate:app/state@0.1.0" "version" (func $version (result i32)))
  (import "headgate:app/metrics@0.1.0" "counter-add"
    (func $count (param i32 i32 i64 i32)))
  (import "headgate:app/metrics@0.1.0" "gauge-set"
    (func $gauge (param i32 i32 f64 i32)))
  (import "headgate:app/metrics@0.1.0" "histogram-record"
    (func $observe (param i32 i32 f64 i32)))
  (import "headgate:app/gpio@0.1.0" "get" (func $line_get (param i32 i32 i32)))
  (import "headgate:app/gpio@0.1.0" "set" (func $line_set (param i32 i32 i32 i32)))

  (memory (export "memory") 16)
  (data (i32.const 1024) "failed")
  (data (i32.const 1100) "CONFIGURE")

  ;; Everything above here is free again after each call.
  (global $top (mut i32) (i32.const 4096))
  (global $bucket (mut i32) (i32.const 0))
  ;; The version of what was kept when this instance started.
  (global $found (mut i32) (i32.const 0))
  ;; The answer to the last action.
  (global $at (mut i32) (i32.const 0))
  (global $len (mut i32) (i32.const 0))

  (func $realloc (export "cabi_realloc")
    (param $old i32) (param $old_size i32) (param $align i32) (param $size i32) (result i32)
    (local $at i32)
    (local.set $at
      (i32.and
        (i32.add (global.get $top) (i32.sub (local.get $align) (i32.const 1)))
        (i32.sub (i32.const 0) (local.get $align))))
    (global.set $top (i32.add (local.get $at) (local.get $size)))
    (local.get $at))

  (func (export "cabi_post_handle") (param i32)
    (global.set $top (i32.const 4096)))

  (func $answer (param $at i32) (param $len i32)
    (global.set $at (local.get $at))
    (global.set $len (local.get $len)))

  ;; One digit.
  (func $digit (param $digit i32)
    (local $at i32)
    (local.set $at (call $realloc (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 1)))
    (i32.store8 (local.get $at) (i32.add (i32.const 0x30) (local.get $digit)))
    (call $answer (local.get $at) (i32.const 1)))

  (func $number (param $number i64)
    (local $at i32)
    (local.set $at (call $realloc (i32.const 0) (i32.const 0) (i32.const 8) (i32.const 8)))
    (i64.store (local.get $at) (local.get $number))
    (call $answer (local.get $at) (i32.const 8)))

  ;; What is at 64: a result whose error has a text, behind `$pad` bytes.
  (func $result (param $pad i32)
    (if (i32.load8_u (i32.const 64))
      (then
        (call $answer
          (i32.load (i32.add (i32.const 68) (local.get $pad)))
          (i32.load (i32.add (i32.const 72) (local.get $pad)))))
      (else (call $answer (i32.const 0) (i32.const 0)))))

  ;; What is at 64: a result whose error has cases.
  (func $case
    (if (i32.load8_u (i32.const 64))
      (then (call $digit (i32.load8_u (i32.const 68))))
      (else (call $answer (i32.const 0) (i32.const 0)))))

  ;; The topic and payload of an event, with = between them.
  (func $describe (param $event i32)
    (local $at i32)
    (local $topic i32)
    (local $payload i32)
    (local.set $topic (i32.load (i32.add (local.get $event) (i32.const 4))))
    (local.set $payload (i32.load (i32.add (local.get $event) (i32.const 12))))
    (local.set $at
      (call $realloc (i32.const 0) (i32.const 0) (i32.const 1)
        (i32.add (i32.const 1) (i32.add (local.get $topic) (local.get $payload)))))
    (memory.copy (local.get $at) (i32.load (local.get $event)) (local.get $topic))
    (i32.store8 (i32.add (local.get $at) (local.get $topic)) (i32.const 0x3d))
    (memory.copy
      (i32.add (i32.const 1) (i32.add (local.get $at) (local.get $topic)))
      (i32.load (i32.add (local.get $event) (i32.const 8)))
      (local.get $payload))
    (call $answer (local.get $at)
      (i32.add (i32.const 1) (i32.add (local.get $topic) (local.get $payload)))))

  (func $open_bucket (param $at i32) (param $len i32)
    (call $open (local.get $at) (local.get $len) (i32.const 64))
    (if (i32.eqz (i32.load8_u (i32.const 64)))
      (then (global.set $bucket (i32.load (i32.const 68)))))
    (call $result (i32.const 4)))

  ;; 1: the call is to fail.
  (func $act (param $at i32) (param $len i32) (result i32)
    (local $what i32)
    (local $key i32)
    (local $rest i32)
    (local $rest_len i32)
    (local $i i32)
    (local.set $what (i32.load8_u (local.get $at)))
    (local.set $key (i32.add (local.get $at) (i32.const 1)))
    (local.set $rest (i32.add (local.get $at) (i32.const 2)))
    (local.set $rest_len (i32.sub (local.get $len) (i32.const 2)))
    (call $answer (i32.const 0) (i32.const 0))
    (if (i32.eqz (global.get $bucket))
      (then (call $open_bucket (i32.const 0) (i32.const 0))))

    ;; s: set KEY VALUE
    (if (i32.eq (local.get $what) (i32.const 0x73))
      (then
        (call $set (global.get $bucket) (local.get $key) (i32.const 1)
          (local.get $rest) (local.get $rest_len) (i32.const 64))
        (call $result (i32.const 4))))
    ;; g: get KEY; the value has the place of the error's text
    (if (i32.eq (local.get $what) (i32.const 0x67))
      (then
        (call $get (global.get $bucket) (local.get $key) (i32.const 1) (i32.const 64))
        (if (i32.load8_u (i32.const 68))
          (then (call $answer (i32.load (i32.const 72)) (i32.load (i32.const 76)))))))
    ;; d: delete KEY
    (if (i32.eq (local.get $what) (i32.const 0x64))
      (then
        (call $delete (global.get $bucket) (local.get $key) (i32.const 1) (i32.const 64))
        (call $result (i32.const 4))))
    ;; e: does KEY exist
    (if (i32.eq (local.get $what) (i32.const 0x65))
      (then
        (call $exists (global.get $bucket) (local.get $key) (i32.const 1) (i32.const 64))
        (call $digit (i32.load8_u (i32.const 68)))))
    ;; i: increment KEY
    (if (i32.eq (local.get $what) (i32.const 0x69))
      (then
        (call $increment (global.get $bucket) (local.get $key) (i32.const 1) (i64.const 1)
          (i32.const 64))
        (call $result (i32.const 8))))
    ;; l: list; how many keys
    (if (i32.eq (local.get $what) (i32.const 0x6c))
      (then
        (call $list (global.get $bucket) (i32.const 0) (i64.const 0) (i32.const 64))
        (call $digit (i32.load (i32.const 76)))))
    ;; L: list from a cursor that is none
    (if (i32.eq (local.get $what) (i32.const 0x4c))
      (then
        (call $list (global.get $bucket) (i32.const 1) (i64.const 99) (i32.const 64))
        (call $result (i32.const 8))))
    ;; o: open the bucket of this name
    (if (i32.eq (local.get $what) (i32.const 0x6f))
      (then
        (call $open_bucket (local.get $key) (i32.sub (local.get $len) (i32.const 1)))))
    ;; H: open more and more; the answer is the last one's
    (if (i32.eq (local.get $what) (i32.const 0x48))
      (then
        (loop $again
          (call $open_bucket (i32.const 0) (i32.const 0))
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          (br_if $again (i32.lt_u (local.get $i) (i32.const 100))))))
    ;; h: open and drop
    (if (i32.eq (local.get $what) (i32.const 0x68))
      (then
        (loop $again
          (call $open (i32.const 0) (i32.const 0) (i32.const 64))
          (if (i32.load8_u (i32.const 64)) (then (unreachable)))
          (call $drop_bucket (i32.load (i32.const 68)))
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          (br_if $again (i32.lt_u (local.get $i) (i32.const 100))))))
    ;; K: a key of 300 bytes; k: one of none; V: a value of 65,537 bytes
    (if (i32.eq (local.get $what) (i32.const 0x4b))
      (then
        (call $set (global.get $bucket) (i32.const 500000) (i32.const 300)
          (i32.const 0) (i32.const 0) (i32.const 64))
        (call $result (i32.const 4))))
    (if (i32.eq (local.get $what) (i32.const 0x6b))
      (then
        (call $set (global.get $bucket) (i32.const 0) (i32.const 0)
          (i32.const 0) (i32.const 0) (i32.const 64))
        (call $result (i32.const 4))))
    (if (i32.eq (local.get $what) (i32.const 0x56))
      (then
        (call $set (global.get $bucket) (local.get $key) (i32.const 1)
          (i32.const 0) (i32.const 65537) (i32.const 64))
        (call $result (i32.const 4))))
    ;; B: 90 values of 60,000 bytes; the answer is the last one's
    (if (i32.eq (local.get $what) (i32.const 0x42))
      (then
        (loop $again
          (i32.store8 (i32.const 2000) (i32.add (local.get $i) (i32.const 0x21)))
          (call $set (global.get $bucket) (i32.const 2000) (i32.const 1)
            (i32.const 500000) (i32.const 60000) (i32.const 64))
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          (br_if $again (i32.lt_u (local.get $i) (i32.const 90))))
        (call $result (i32.const 4))))
    ;; Q: 2,000 calls; the answer is the last one's
    (if (i32.eq (local.get $what) (i32.const 0x51))
      (then
        (loop $again
          (call $delete (global.get $bucket) (local.get $key) (i32.const 1) (i32.const 64))
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          (br_if $again (i32.lt_u (local.get $i) (i32.const 2000))))
        (call $result (i32.const 4))))
    ;; G: 5,000 keys at once, all of them empty; W: set as many; D: delete as many
    (if (i32.eq (local.get $what) (i32.const 0x47))
      (then
        (call $get_many (global.get $bucket) (i32.const 500000) (i32.const 5000) (i32.const 64))
        (call $result (i32.const 4))))
    (if (i32.eq (local.get $what) (i32.const 0x57))
      (then
        (call $set_many (global.get $bucket) (i32.const 500000) (i32.const 5000) (i32.const 64))
        (call $result (i32.const 4))))
    (if (i32.eq (local.get $what) (i32.const 0x44))
      (then
        (call $delete_many (global.get $bucket) (i32.const 500000) (i32.const 10) (i32.const 64))
        (call $result (i32.const 4))))
    ;; v: the version that `configure` has found
    (if (i32.eq (local.get $what) (i32.const 0x76)) (then (call $digit (global.get $found))))
    ;; E: fail
    (if (i32.eq (local.get $what) (i32.const 0x45)) (then (return (i32.const 1))))
    ;; U: unreachable; Z: loop for ever
    (if (i32.eq (local.get $what) (i32.const 0x55)) (then (unreachable)))
    (if (i32.eq (local.get $what) (i32.const 0x5a)) (then (loop $ever (br $ever))))

    ;; t: interval NAME of 5 ms; T: of 1 ns; y: of an hour
    (if (i32.eq (local.get $what) (i32.const 0x74))
      (then
        (call $interval (local.get $key) (i32.const 1) (i64.const 5000000) (i32.const 64))
        (call $case)))
    (if (i32.eq (local.get $what) (i32.const 0x54))
      (then
        (call $interval (local.get $key) (i32.const 1) (i64.const 1) (i32.const 64))
        (call $case)))
    (if (i32.eq (local.get $what) (i32.const 0x79))
      (then
        (call $interval (local.get $key) (i32.const 1) (i64.const 3600000000000) (i32.const 64))
        (call $case)))
    ;; 1: once NAME, at once; w: at the wall clock's 1970
    (if (i32.eq (local.get $what) (i32.const 0x31))
      (then
        (call $once (local.get $key) (i32.const 1) (i64.const 0) (i32.const 64))
        (call $case)))
    (if (i32.eq (local.get $what) (i32.const 0x77))
      (then
        (call $at_wall (local.get $key) (i32.const 1) (i64.const 1000) (i32.const 64))
        (call $case)))
    ;; c: cancel NAME
    (if (i32.eq (local.get $what) (i32.const 0x63))
      (then (call $digit (call $cancel (local.get $key) (i32.const 1)))))

    ;; m: counter, p: gauge, q: histogram, of this name
    (if (i32.eq (local.get $what) (i32.const 0x6d))
      (then
        (call $count (local.get $key) (i32.sub (local.get $len) (i32.const 1)) (i64.const 7)
          (i32.const 64))
        (call $case)))
    (if (i32.eq (local.get $what) (i32.const 0x70))
      (then
        (call $gauge (local.get $key) (i32.sub (local.get $len) (i32.const 1)) (f64.const 2.5)
          (i32.const 64))
        (call $case)))
    (if (i32.eq (local.get $what) (i32.const 0x71))
      (then
        (call $observe (local.get $key) (i32.sub (local.get $len) (i32.const 1)) (f64.const nan)
          (i32.const 64))
        (call $case)))

    ;; a: value of the line of this name, or 7 and up for an error; A, x: set it, clear it
    (if (i32.eq (local.get $what) (i32.const 0x61))
      (then
        (call $line_get (local.get $key) (i32.sub (local.get $len) (i32.const 1)) (i32.const 64))
        (call $digit
          (i32.add
            (i32.load8_u (i32.const 68))
            (i32.mul (i32.load8_u (i32.const 64)) (i32.const 7))))))
    (if (i32.eq (local.get $what) (i32.const 0x41))
      (then
        (call $line_set (local.get $key) (i32.sub (local.get $len) (i32.const 1)) (i32.const 1)
          (i32.const 64))
        (call $case)))
    (if (i32.eq (local.get $what) (i32.const 0x78))
      (then
        (call $line_set (local.get $key) (i32.sub (local.get $len) (i32.const 1)) (i32.const 0)
          (i32.const 64))
        (call $case)))

    ;; r: random number; R: too many random bytes; b: 16 of them; S: a seed
    (if (i32.eq (local.get $what) (i32.const 0x72)) (then (call $number (call $random_number))))
    (if (i32.eq (local.get $what) (i32.const 0x52))
      (then (call $random (i64.const 70000) (i32.const 64))))
    (if (i32.eq (local.get $what) (i32.const 0x62))
      (then
        (call $random (i64.const 16) (i32.const 64))
        (call $answer (i32.load (i32.const 64)) (i32.load (i32.const 68)))))
    (if (i32.eq (local.get $what) (i32.const 0x53))
      (then
        (call $seed (i32.const 64))
        (call $number (i64.load (i32.const 72)))))
    ;; n: monotonic; N: wall, in seconds
    (if (i32.eq (local.get $what) (i32.const 0x6e)) (then (call $number (call $monotonic))))
    (if (i32.eq (local.get $what) (i32.const 0x4e))
      (then
        (call $wall (i32.const 64))
        (call $number (i64.load (i32.const 64)))))
    (i32.const 0))

  ;; result<_, string> at 0, result<list<event>, string> at 16. The text at 1100 says what to do, an
  ;; action of two bytes each.
  (func (export "configure") (result i32)
    (local $at i32)
    (global.set $found (call $version))
    (local.set $at (i32.const 1100))
    (block $done
      (loop $next
        (br_if $done (i32.eqz (i32.load8_u (local.get $at))))
        (drop (call $act (local.get $at) (i32.const 2)))
        (local.set $at (i32.add (local.get $at) (i32.const 2)))
        (br $next)))
    (i32.store8 (i32.const 0) (i32.const 0))
    (i32.const 0))

  (func (export "handle") (param $batch i32) (param $count i32) (result i32)
    (local $i i32)
    (local $event i32)
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $i) (local.get $count)))
        (local.set $event
          (i32.add (local.get $batch) (i32.mul (local.get $i) (i32.const 24))))
        ;; The event of a timer has no payload. Its topic is the answer, as far as there is room.
        (if (i32.eqz (i32.load (i32.add (local.get $event) (i32.const 12))))
          (then
            (call $answer
              (i32.load (local.get $event)) (i32.load (i32.add (local.get $event) (i32.const 4)))))
          (else
            ;; The event of a device is the answer, too.
            (if (i32.eq (i32.load8_u (i32.load (local.get $event))) (i32.const 0x24))
              (then (call $describe (local.get $event)))
              (else
                (if (call $act
                      (i32.load (i32.add (local.get $event) (i32.const 8)))
                      (i32.load (i32.add (local.get $event) (i32.const 12))))
                  (then
                    (i32.store8 (i32.const 16) (i32.const 1))
                    (i32.store (i32.const 20) (i32.const 1024))
                    (i32.store (i32.const 24) (i32.const 6))
                    (return (i32.const 16))))))))
        (i32.store (i32.add (local.get $event) (i32.const 8)) (global.get $at))
        (i32.store (i32.add (local.get $event) (i32.const 12)) (global.get $len))
        ;; On a topic of its own.
        (i32.store (local.get $event) (i32.const 1040))
        (i32.store (i32.add (local.get $event) (i32.const 4)) (i32.const 3))
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br $next)))
    (i32.store8 (i32.const 16) (i32.const 0))
    (i32.store (i32.const 20) (local.get $batch))
    (i32.store (i32.const 24) (local.get $count))
    (i32.const 16))

  (data (i32.const 1040) "out"))
