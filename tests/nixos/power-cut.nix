# What was acknowledged is in the journal after a power cut under load, on whatever disk it leaves.
#
# The disk with the store logs each write and flush (QEMU's blklogwrites). The cut halts the machine; disks that it
# may have left are made from the log: all up to a flush, and of what came after it some, in whole or in part.
# `cargo xtask vm-test` does the same without Nix, and docs/vm-test.md says more.
{
  name = "headgate-power-cut";

  nodes.gateway = {
    imports = [ ./gateway.nix ];

    services.headgate.settings.journal = {
      topics = "plant/#";
      segment_bytes = "64KiB";
    };

    virtualisation = {
      qemu.options = [
        (
          "-blockdev driver=blklogwrites,node-name=state,log-sector-size=512"
          + ",file.driver=file,file.filename=state.img,file.cache.no-flush=on"
          + ",log.driver=file,log.filename=state.log,log.cache.no-flush=on"
        )
        "-device virtio-blk-pci,drive=state,serial=state,write-cache=on,discard=off,write-zeroes=off"
      ];
      fileSystems."/var/lib/headgate" = {
        device = "/dev/disk/by-id/virtio-state";
        fsType = "ext4";
        autoFormat = true;
      };
      # For clients that see the log grow.
      forwardPorts = [
        {
          from = "host";
          host.port = 1883;
          guest.port = 1883;
        }
      ];
    };
  };

  testScript = # python
    ''
      import json
      import random
      import socket
      import struct
      import threading

      DISK_BYTES = 256 << 20
      SECTOR = 512
      FLUSH, FUA, DISCARD = 1, 2, 4
      CLIENTS, MOST, ENOUGH, IN_FLIGHT = 4, 2000, 3000, 10

      image = gateway.state_dir / "state.img"
      log = gateway.state_dir / "state.log"

      seed = random.randrange(1 << 32)
      print(f"seed {seed}")
      random.seed(seed)


      def switch_on() -> None:
          log.write_bytes(b"")
          gateway.start()
          gateway.wait_for_unit("headgate.service")
          gateway.wait_until_succeeds("curl -fsS http://127.0.0.1:9464/readyz", timeout=60)


      def ask_journal(command: str) -> str:
          return gateway.succeed(f"headgate --json journal {command} --folder /var/lib/headgate/journal")


      def handled() -> int:
          app = json.loads(gateway.succeed("headgate --json app inspect overheat-alarm"))
          return app["counters"]["handled"]


      def packet(kind: int, body: bytes) -> bytes:
          assert len(body) < 128
          return bytes([kind, len(body)]) + body


      def text(value: str) -> bytes:
          return struct.pack(">H", len(value)) + value.encode()


      def publish(client: int, acknowledged: list[int]) -> None:
          """Publishes numbered readings at QoS 1, and notes how long the log was at each acknowledgement."""
          with socket.create_connection(("127.0.0.1", 1883)) as stream:
              answers = stream.makefile("rb")
              stream.sendall(packet(0x10, text("MQTT") + b"\x04\x02\x00\x1e" + text(f"client-{client}")))
              assert answers.read(4) == b"\x20\x02\x00\x00"
              sent = 0
              while len(acknowledged) < MOST:
                  while sent < min(MOST, len(acknowledged) + IN_FLIGHT):
                      sent += 1
                      body = text("plant/cut/temperature") + struct.pack(">H", sent)
                      payload = json.dumps({"value": 20, "client": client, "number": sent})
                      stream.sendall(packet(0x32, body + payload.encode()))
                  answer = answers.read(4)
                  if len(answer) < 4:
                      break
                  assert answer == struct.pack(">BBH", 0x40, 2, len(acknowledged) + 1)
                  acknowledged.append(log.stat().st_size)


      def publish_until_the_end(client: int, acknowledged: list[int]) -> None:
          try:
              publish(client, acknowledged)
          except OSError:
              pass  # The power was cut.


      def read_log(logged: bytes) -> list[tuple[int, int, bytes, int]]:
          """Flags, place on the disk, data, length of the log behind it, of each entry."""
          magic, version, _, sector = struct.unpack_from("<QQQI", logged)
          assert (magic, version, sector) == (0x6A736677736872, 1, SECTOR)
          entries, at = [], SECTOR
          while at < len(logged):
              sector, sectors, flags, _ = struct.unpack_from("<QQQQ", logged, at)
              at += SECTOR
              data = b""
              if flags in (0, FUA) and sectors > 0:
                  data = logged[at : at + sectors * SECTOR]
                  at += len(data)
              else:
                  assert flags in (FLUSH, DISCARD), f"the entry at {at - SECTOR} is none of QEMU's"
              entries.append((flags, sector * SECTOR, data, at))
          return entries


      def cut_behind(flush: int) -> None:
          """Makes a disk of the log up to this entry, and of what was not flushed then."""
          kept = random.random()
          with open(image, "wb") as disk:
              disk.truncate(DISK_BYTES)
              for flags, place, data, _ in entries[:flush]:
                  disk.seek(place)
                  disk.write(data)
              for flags, place, data, _ in entries[flush + 1 :]:
                  if flags == FLUSH:
                      break
                  is_whole = flags == FUA or random.random() < kept
                  is_torn = random.random() < 0.5
                  for offset in range(0, len(data), SECTOR):
                      if is_whole or is_torn and random.random() < 0.5:
                          disk.seek(place + offset)
                          disk.write(data[offset : offset + SECTOR])


      with open(image, "wb") as disk:
          disk.truncate(DISK_BYTES)
      switch_on()
      with subtest("the journal is written through io_uring, confined as it is"):
          status = json.loads(gateway.succeed("headgate --json status"))
          t.assertEqual("io_uring", status["journal"]["io"])

      with subtest("the power is cut under load"):
          gateway.succeed("headgate app pause overheat-alarm")
          acknowledged: list[list[int]] = [[] for _ in range(CLIENTS)]
          threads = [
              threading.Thread(target=publish_until_the_end, args=arguments)
              for arguments in enumerate(acknowledged)
          ]
          for thread in threads:
              thread.start()
          retry(lambda _: sum(map(len, acknowledged)) >= ENOUGH, timeout_seconds=120)
          log_bytes = log.stat().st_size
          # QEMU ends what it is about to log; what it flushes of its own accord is behind those bytes.
          gateway.send_monitor_command("stop")
          gateway.crash()
          for thread in threads:
              thread.join()

      logged = log.read_bytes()
      entries = [entry for entry in read_log(logged) if entry[3] <= log_bytes]
      first = min(min(lengths) for lengths in acknowledged)
      flushes = [
          index for index, (flags, _, _, end) in enumerate(entries) if flags == FLUSH and end >= first
      ]
      assert flushes, "events were acknowledged, and the guest has flushed nothing"

      later = 0
      for number in range(5):
          flush = random.choice(flushes)
          with subtest(f"disk {number}, cut behind entry {flush} of {len(entries)}"):
              cut_behind(flush)
              switch_on()
              ask_journal("verify")
              found = [0] * CLIENTS
              records = ask_journal("tail --topic plant/cut/temperature -n 1000000").splitlines()
              for record in records:
                  reading = json.loads(json.loads(record)["payload"])
                  client = reading["client"]
                  t.assertEqual(found[client] + 1, reading["number"], f"of client {client}")
                  found[client] += 1
              for client, lengths in enumerate(acknowledged):
                  owed = sum(length <= entries[flush][3] for length in lengths)
                  t.assertGreaterEqual(found[client], owed, f"acknowledged events of {client} are lost")
                  later += max(0, len(lengths) - found[client])
              # The app that was paused had finished none.
              retry(lambda _: handled() >= len(records), timeout_seconds=60)
              t.assertEqual(len(records), handled())
              gateway.fail("journalctl --boot --unit headgate.service --grep ERROR")
              gateway.crash()
      assert later > 0, "no disk lacks any event, so none would be missed"
    '';
}
