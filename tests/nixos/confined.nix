# The service can write its state and nothing else, and can get no more rights than it has.
{
  name = "headgate-confined";

  nodes.gateway = ./gateway.nix;

  testScript = # python
    ''
      gateway.wait_for_unit("headgate.service")
      pid = gateway.get_unit_property("headgate.service", "MainPID")

      def in_its_place(command: str) -> str:
          """The command, run in what the service sees of the file system, even as root."""
          return f"nsenter --target {pid} --mount {command}"

      def status(field: str) -> str:
          return gateway.succeed(f"sed -n 's/^{field}:[[:space:]]*//p' /proc/{pid}/status").strip()

      with subtest("it writes its state"):
          gateway.succeed(in_its_place("touch /var/lib/headgate/a-file"))
          gateway.succeed("rm /var/lib/headgate/a-file")

      with subtest("it writes nothing else"):
          for folder in ["/", "/etc", "/nix", "/nix/store", "/root", "/usr", "/var", "/var/lib"]:
              gateway.fail(in_its_place(f"touch {folder}/a-file"))
          t.assertEqual("headgate", gateway.succeed(f"stat -c %U /proc/{pid}").strip())

      with subtest("it has no privileges and can't get any"):
          t.assertEqual("1", status("NoNewPrivs"))
          for capabilities in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"]:
              t.assertEqual(0, int(status(capabilities), 16), capabilities)

      with subtest("system calls are filtered"):
          t.assertEqual("2", status("Seccomp"))

      with subtest("systemd agrees that little is exposed: at most 1.5 of 10"):
          print(gateway.succeed("systemd-analyze security --threshold=15 headgate.service"))
    '';
}
