;; A guest that does what the first byte of a batch tells it to.
(module
  (import "wasi:logging/logging@0.1.0-draft" "log"
    (func $log (param i32 i32 i32 i32 i32)))
  (import "wasi:config/store@0.2.0-draft" "get"
    (func $config (param i32 i32 i32)))
  (import "headgate:app/publisher@0.1.0" "publish"
    (func $publish (param i32 i32 i32)))

  (memory (export "memory") 8)
  (data (i32.const 1024) "greeting")
  (data (i32.const 1040) "no thanks")
  (data (i32.const 1056) "out/$SYS/not/mine")

  ;; Everything above here is free again after each call.
  (global $top (mut i32) (i32.const 4096))

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

  ;; result<_, string> at 0, result<list<event>, string> at 16.
  (func (export "configure") (result i32)
    CONFIGURE
    ;; result<option<string>, error> at 64
    (call $config (i32.const 1024) (i32.const 8) (i32.const 64))
    (if (i32.load8_u (i32.const 68))
      (then
        (call $log (i32.const 2) (i32.const 1024) (i32.const 8)
          (i32.load (i32.const 72)) (i32.load (i32.const 76)))))
    (i32.store8 (i32.const 0) (i32.const 0))
    (i32.const 0))

  (func $recurse (param i64) (result i64)
    (i64.add (call $recurse (i64.add (local.get 0) (i64.const 1))) (local.get 0)))

  (func $return (param $batch i32) (param $count i32) (result i32)
    (i32.store8 (i32.const 16) (i32.const 0))
    (i32.store (i32.const 20) (local.get $batch))
    (i32.store (i32.const 24) (local.get $count))
    (i32.const 16))

  (func (export "handle") (param $batch i32) (param $count i32) (result i32)
    (local $what i32)
    (local $i i32)
    (local.set $what (i32.load8_u (i32.load (i32.add (local.get $batch) (i32.const 8)))))

    ;; U: unreachable
    (if (i32.eq (local.get $what) (i32.const 0x55)) (then (unreachable)))

    ;; L: loop for ever
    (if (i32.eq (local.get $what) (i32.const 0x4c)) (then (loop $ever (br $ever))))

    ;; G: grow without bound
    (if (i32.eq (local.get $what) (i32.const 0x47))
      (then (loop $ever (drop (memory.grow (i32.const 1))) (br $ever))))

    ;; S: overflow the stack
    (if (i32.eq (local.get $what) (i32.const 0x53))
      (then (drop (call $recurse (i64.const 0)))))

    ;; E: return an error
    (if (i32.eq (local.get $what) (i32.const 0x45))
      (then
        (i32.store8 (i32.const 16) (i32.const 1))
        (i32.store (i32.const 20) (i32.const 1040))
        (i32.store (i32.const 24) (i32.const 9))
        (return (i32.const 16))))

    ;; P: publish the first event 100,000 times; return nothing
    (if (i32.eq (local.get $what) (i32.const 0x50))
      (then
        (loop $again
          (call $publish (local.get $batch) (i32.const 1) (i32.const 96))
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          (br_if $again (i32.lt_u (local.get $i) (i32.const 100000))))
        (return (call $return (i32.const 0) (i32.const 0)))))

    ;; O: log 100 lines; return nothing
    (if (i32.eq (local.get $what) (i32.const 0x4f))
      (then
        (loop $again
          (call $log (i32.const 3) (i32.const 0) (i32.const 0) (i32.const 1040) (i32.const 9))
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          (br_if $again (i32.lt_u (local.get $i) (i32.const 100))))
        (return (call $return (i32.const 0) (i32.const 0)))))

    ;; D: return the first event on a topic of the gateway's, and the others as they are
    (if (i32.eq (local.get $what) (i32.const 0x44))
      (then
        (i32.store (local.get $batch) (i32.const 1060))
        (i32.store (i32.add (local.get $batch) (i32.const 4)) (i32.const 13))))

    ;; W: publish on a topic with a wildcard and pass the case of the error on as the timestamp
    (if (i32.eq (local.get $what) (i32.const 0x57))
      (then
        (i32.store8 (i32.load (local.get $batch)) (i32.const 0x2b))
        (call $publish (local.get $batch) (local.get $count) (i32.const 96))
        (i32.store8 (i32.load (local.get $batch)) (i32.const 0x6f))
        (i64.store (i32.add (local.get $batch) (i32.const 16))
          (i64.add (i64.const 1000) (i64.extend_i32_u (i32.load8_u (i32.const 100)))))))

    ;; A: return a list that is all one big string, over and over
    (if (i32.eq (local.get $what) (i32.const 0x41))
      (then
        (local.set $i (i32.const 8192))
        (loop $again
          (i32.store (local.get $i) (i32.load (local.get $batch)))
          (i32.store (i32.add (local.get $i) (i32.const 4)) (i32.const 5))
          (i32.store (i32.add (local.get $i) (i32.const 8)) (i32.const 0))
          (i32.store (i32.add (local.get $i) (i32.const 12)) (i32.const 500000))
          (local.set $i (i32.add (local.get $i) (i32.const 24)))
          (br_if $again (i32.lt_u (local.get $i) (i32.const 400000))))
        (return (call $return (i32.const 8192) (i32.const 16000)))))

    ;; 0: return the events with the timestamp 0
    (if (i32.eq (local.get $what) (i32.const 0x30))
      (then (i64.store (i32.add (local.get $batch) (i32.const 16)) (i64.const 0))))

    ;; Anything else: return the events as they are
    (call $return (local.get $batch) (local.get $count)))
)
