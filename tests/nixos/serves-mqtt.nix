# A gateway serves MQTT to other machines and runs the app that its configuration declares.
{
  name = "headgate-serves-mqtt";

  nodes = {
    gateway = {
      imports = [ ./gateway.nix ];
      # Only the firewall keeps others from it.
      services.headgate.settings.metrics.listen = "0.0.0.0:9464";
    };
    plant =
      { pkgs, ... }:
      {
        environment.systemPackages = [
          pkgs.curl
          pkgs.mosquitto
        ];
      };
  };

  testScript = # python
    ''
      import json

      start_all()
      gateway.wait_for_unit("headgate.service")
      plant.wait_for_unit("multi-user.target")

      with subtest("what one client publishes, another gets"):
          plant.succeed("mosquitto_pub -h gateway -t plant/state -m ready -q 1 -r")
          state = plant.succeed("mosquitto_sub -h gateway -t plant/state -C 1 -W 10")
          t.assertEqual("ready", state.strip())

      with subtest("the declared app is ready before the gateway says that it is"):
          gateway.wait_until_succeeds("curl -fsS http://127.0.0.1:9464/readyz", timeout=60)
          app = json.loads(gateway.succeed("headgate --json app inspect overheat-alarm"))
          t.assertEqual("running", app["state"])

      with subtest("the declared app raises an alarm"):
          # The retained message comes at once, and so shows that the subscription is in force.
          plant.succeed(
              "mosquitto_sub -h gateway -t plant/state -t 'alarms/#' -C 2 -W 60 > alarms &"
          )
          plant.wait_until_succeeds("grep ready alarms", timeout=60)
          plant.succeed(
              "mosquitto_pub -h gateway -t plant/press/temperature -m '{\"value\": 93.5}'"
          )
          plant.wait_until_succeeds("grep raised alarms", timeout=60)

      with subtest("only the port that was asked for is open"):
          plant.fail("curl -fsS --max-time 5 http://gateway:9464/metrics")
    '';
}
