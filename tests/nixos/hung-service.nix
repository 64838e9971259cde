# A service that hangs is killed and started again by systemd's watchdog.
{
  name = "headgate-hung-service";

  nodes.gateway = ./gateway.nix;

  testScript = # python
    ''
      gateway.wait_for_unit("headgate.service")
      pid = gateway.get_unit_property("headgate.service", "MainPID")
      t.assertEqual("0", gateway.get_unit_property("headgate.service", "NRestarts"))

      gateway.succeed(f"kill -STOP {pid}")
      gateway.wait_until_succeeds(
          "test $(systemctl show headgate.service --property NRestarts --value) -gt 0", timeout=180
      )
      gateway.wait_for_unit("headgate.service")

      with subtest("it was the watchdog"):
          gateway.succeed("journalctl --unit headgate.service --grep 'Watchdog timeout'")

      with subtest("the gateway serves again, with its app"):
          gateway.wait_until_succeeds("curl -fsS http://127.0.0.1:9464/readyz", timeout=60)
          gateway.succeed("mosquitto_pub -t plant/state -m ready -q 1")
    '';
}
