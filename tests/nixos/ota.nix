# The image as it is flashed, updated twice over the air: to a system that is healthy, and stays, and to one
# that is not, and is left again without anybody's help.
#
# Releases are signed when the test runs, with a key that it makes: none lies in the repository.
{
  config,
  lib,
  ...
}:

let
  inherit (config) nodes;

  system =
    { version, extra }:
    { lib, ... }:
    {
      imports = [
        ./gateway.nix
        ../../images/uefi.nix
        extra
      ];

      # An overlay is laid over it below, which needs it as it is.
      image.repart.compression.enable = false;
      system.image.version = version;

      virtualisation = {
        directBoot.enable = false;
        mountHostNixStore = false;
        useEFIBoot = true;
        # The image's own.
        fileSystems = lib.mkForce { };
      };

      services.headgate = {
        ota.enable = true;
        settings.ota = {
          channel = "http://server/channel";
          # The store can't have the test's key: its configuration is another one below.
          trusted_keys = "none-1:Ek6nP3k4WlX1CqVYqPTnOqVNV5r3mY4pZ5zl4rQYc3I=";
          health = {
            deadline_s = 60;
            settle_s = 2;
          };
        };
      };
      # The key is made when the test runs, and has to be trusted by the systems that updates bring, too.
      systemd.services =
        lib.genAttrs
          [
            "headgate-ota"
            "headgate-ota-commit"
            "headgate-ota-failed"
            "headgate-ota-health"
          ]
          (_: {
            serviceConfig.EnvironmentFile = "-/var/lib/headgate/ota.env";
          });
    };
in
{
  name = "headgate-ota";

  nodes = {
    gateway = system {
      version = "1.0.0";
      extra = { };
    };
    # These two are never started: they are what the updates bring.
    healthy = system {
      version = "1.1.0";
      extra = { };
    };
    unhealthy = system {
      version = "1.2.0";
      extra.systemd.services.plc-answers = {
        description = "A check of somebody's own, which fails";
        requiredBy = [ "boot-complete.target" ];
        before = [ "boot-complete.target" ];
        serviceConfig = {
          Type = "oneshot";
          ExecStart = "/run/current-system/sw/bin/false";
        };
      };
    };

    server = {
      networking.firewall.allowedTCPPorts = [ 80 ];
      environment.systemPackages = [ nodes.gateway.services.headgate.buildPackage ];
      virtualisation.diskSize = 8192;
      services.nginx = {
        enable = true;
        virtualHosts.server.root = "/srv";
      };
    };
  };

  testScript =
    let
      inherit (nodes.gateway.virtualisation.qemu) package;
      image = "${nodes.gateway.system.build.image}/${nodes.gateway.image.filePath}";
      releases = lib.mapAttrs (_: node: "${node.system.build.headgateRelease}") {
        inherit (nodes) healthy unhealthy;
      };
    in
    # python
    ''
      import json
      import os
      import subprocess
      import tempfile

      disk = os.path.join(tempfile.mkdtemp(), "disk.qcow2")
      subprocess.run(
          ["${package}/bin/qemu-img", "create", "-q", "-f", "qcow2", "-b", "${image}", "-F", "raw", disk, "6G"],
          check=True,
      )
      os.environ["NIX_DISK_IMAGE"] = disk


      def version() -> str:
          return gateway.succeed(". /etc/os-release; echo $IMAGE_VERSION").strip()


      def entries() -> list[str]:
          return sorted(gateway.succeed("ls /boot/loader/entries").split())


      def status() -> dict:
          return json.loads(gateway.succeed("headgate ota status --json"))


      def publish(release: str) -> None:
          server.succeed(
              f"rm -rf /srv/channel && headgate release sign {release} --output /srv/channel --key-file /root/key"
          )


      def update() -> None:
          """Installs what is published; the machine restarts into it by itself."""
          gateway.succeed("systemctl start --no-block headgate-ota.service")
          gateway.wait_for_shutdown()
          gateway.start()
          gateway.wait_for_unit("multi-user.target")


      server.start()
      server.wait_for_unit("nginx.service")
      key = server.succeed("headgate release keygen plant-1 /root/key").strip()

      gateway.start()
      gateway.wait_for_unit("headgate.service")

      with subtest("the first boot was counted, declared good, and so shows that updates can go back"):
          gateway.wait_for_unit("systemd-bless-boot.service")
          t.assertEqual(["headgate-1.conf"], entries())
          gateway.wait_for_unit("headgate-ota-commit.service")
          t.assertEqual("works", json.loads(gateway.succeed("headgate boot list --json"))["counting"])

      gateway.succeed(f"echo HEADGATE_OTA_TRUSTED_KEYS={key} > /var/lib/headgate/ota.env")

      with subtest("a release that nobody has signed changes nothing"):
          server.succeed("mkdir -p /srv && cp -r ${releases.healthy} /srv/channel")
          gateway.fail("systemctl start headgate-ota.service")
          t.assertEqual(["headgate-1.conf"], entries())

      with subtest("a healthy update stays, with only those store paths fetched that were missing"):
          publish("${releases.healthy}")
          update()
          gateway.wait_for_unit("systemd-bless-boot.service")
          gateway.wait_for_unit("headgate-ota-commit.service")
          t.assertEqual("1.1.0", version())
          t.assertEqual(["headgate-1.conf", "headgate-2.conf"], entries())
          fetched = int(server.succeed("grep -c 'GET /channel/nar/' /var/log/nginx/access.log"))
          paths = int(server.succeed("ls /srv/channel/*.narinfo | wc -l"))
          t.assertGreater(fetched, 0)
          t.assertLess(fetched, paths / 2)

      with subtest("an update that is not healthy uses up its tries, and the system before is back"):
          publish("${releases.unhealthy}")
          update()
          gateway.wait_until_succeeds(
              ". /etc/os-release; test $IMAGE_VERSION = 1.1.0 && systemctl is-active headgate-ota-commit.service",
              timeout=900,
          )
          rollback = json.dumps(status())
          t.assertIn("plc-answers.service", rollback)
          t.assertNotIn("headgate-3.conf", entries())
          gateway.wait_until_succeeds("curl -fsS http://127.0.0.1:9464/readyz", timeout=60)

      with subtest("what was left again is not taken again"):
          gateway.execute("systemctl start headgate-ota.service")
          t.assertEqual("1.1.0", version())
          t.assertFalse([entry for entry in entries() if "+" in entry])
    '';
}
