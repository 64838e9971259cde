# An app that crashes is started again; the service and the other apps do not notice.
{
  name = "headgate-crashing-app";

  nodes.gateway =
    { pkgs, ... }:
    {
      imports = [ ./gateway.nix ];

      services.headgate.apps.crasher = {
        # The guest of the gateway's own tests: it traps on a payload that begins with U, and passes
        # others on.
        component = pkgs.runCommand "crasher.wasm" { nativeBuildInputs = [ pkgs.wasm-tools ]; } ''
          sed 's/CONFIGURE//' ${../../src/apps/tests/guest.wat} > crasher.wat
          wasm-tools component embed --world app ${../../wit} crasher.wat --output embedded.wasm
          wasm-tools component new embedded.wasm --output "$out"
        '';
        version = "1.0.0";
        subscribe = [ "crasher/in" ];
        publish = [ "crasher/#" ];
      };
    };

  testScript = # python
    ''
      import json

      def inspect(app: str) -> dict:
          return json.loads(gateway.succeed(f"headgate --json app inspect {app}"))

      def main_pid() -> str:
          return gateway.get_unit_property("headgate.service", "MainPID")

      gateway.wait_for_unit("headgate.service")
      gateway.wait_until_succeeds("curl -fsS http://127.0.0.1:9464/readyz", timeout=60)
      pid = main_pid()

      with subtest("an app that crashes is started again"):
          for crash in range(1, 4):
              gateway.succeed("mosquitto_pub -t crasher/in -m U -q 1")
              gateway.wait_until_succeeds(
                  "headgate --json app inspect crasher"
                  f" | jq --exit-status '.restarts >= {crash} and .state == \"running\"'",
                  timeout=120,
              )
          t.assertIn("unreachable", inspect("crasher")["last_error"])

      with subtest("the other app works, and never stopped"):
          # The subscription is in force once this message, which is retained, has come.
          gateway.succeed("mosquitto_pub -t here -m here -q 1 -r")
          gateway.succeed("mosquitto_sub -t here -t 'alarms/#' -C 2 -W 60 > alarms &")
          gateway.wait_until_succeeds("grep here alarms", timeout=60)
          gateway.succeed("mosquitto_pub -t plant/press/temperature -m '{\"value\": 93.5}'")
          gateway.wait_until_succeeds("grep raised alarms", timeout=60)
          t.assertEqual(0, inspect("overheat-alarm")["restarts"])

      with subtest("the service is the same process as before"):
          t.assertEqual(pid, main_pid())
          t.assertEqual("0", gateway.get_unit_property("headgate.service", "NRestarts"))
    '';
}
