# Apps, and what was said to them on the gateway, are the same after a reboot and after a power cut.
{
  name = "headgate-survives-power-cut";

  nodes.gateway =
    { config, pkgs, ... }:
    let
      cfg = config.services.headgate;
      apps = pkgs.headgate-apps or (pkgs.callPackage ../../apps/package.nix { });
    in
    {
      imports = [ ./gateway.nix ];

      # An app that is not declared, for somebody to install on the gateway: that takes a compiler.
      services.headgate.package = cfg.buildPackage;
      environment.etc."unit-convert".source = "${apps}/unit-convert";
    };

  testScript = # python
    ''
      import json

      def state(app: str) -> str:
          return json.loads(gateway.succeed(f"headgate --json app inspect {app}"))["state"]

      def is_ready() -> None:
          gateway.wait_for_unit("headgate.service")
          gateway.wait_until_succeeds("curl -fsS http://127.0.0.1:9464/readyz", timeout=60)

      def is_as_it_was_left() -> None:
          is_ready()
          t.assertEqual("running", state("unit-convert"))
          t.assertEqual("stopped", state("overheat-alarm"))
          gateway.fail("journalctl --boot --unit headgate.service --grep ERROR")

      is_ready()
      gateway.succeed("headgate app install /etc/unit-convert")
      gateway.succeed("headgate app stop overheat-alarm")
      is_as_it_was_left()

      with subtest("after a reboot"):
          gateway.shutdown()
          gateway.start()
          is_as_it_was_left()

      with subtest("after a power cut while events come in"):
          gateway.succeed(
              "yes '{\"value\": 68}' | mosquitto_pub -t plant/press/temperature_f -q 1 -l"
              " > /dev/null 2>&1 &"
          )
          gateway.wait_until_succeeds(
              "headgate --json app inspect unit-convert | jq --exit-status '.counters.handled > 1000'",
              timeout=60,
          )
          gateway.crash()
          gateway.start()
          is_as_it_was_left()

      with subtest("after another, right behind an answer"):
          gateway.succeed("headgate app start overheat-alarm")
          gateway.succeed("headgate app remove unit-convert")
          gateway.crash()
          gateway.start()
          is_ready()
          t.assertEqual("running", state("overheat-alarm"))
          gateway.fail("headgate app inspect unit-convert")
    '';
}
