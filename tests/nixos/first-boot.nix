# The image as it is flashed: its first boot makes the data partition out of the rest of the disk, and
# later boots leave what is on it as it is, on a larger disk too.
{ lib, ... }:

{
  name = "headgate-first-boot";

  nodes.gateway = {
    imports = [
      ./gateway.nix
      ../../images/uefi.nix
    ];

    # An overlay is laid over it below, which needs it as it is.
    image.repart.compression.enable = false;
    system.image.version = "0.1.0";

    virtualisation = {
      directBoot.enable = false;
      mountHostNixStore = false;
      useEFIBoot = true;
      # The image's own.
      fileSystems = lib.mkForce { };
    };
  };

  testScript =
    { nodes, ... }:
    let
      inherit (nodes.gateway.virtualisation.qemu) package;
      image = "${nodes.gateway.system.build.image}/${nodes.gateway.image.filePath}";
    in
    # python
    ''
      import os
      import subprocess
      import tempfile

      def qemu_img(*arguments: str) -> None:
          subprocess.run(["${package}/bin/qemu-img", *arguments], check=True)

      disk = os.path.join(tempfile.mkdtemp(), "disk.qcow2")
      qemu_img("create", "-q", "-f", "qcow2", "-b", "${image}", "-F", "raw", disk, "6G")
      os.environ["NIX_DISK_IMAGE"] = disk

      def partition() -> float:
          """Its size in GiB."""
          size = gateway.succeed("blockdev --getsize64 /dev/disk/by-partlabel/headgate-data")
          return int(size) / 2**30

      def file_system() -> float:
          """Its size in GiB."""
          size = gateway.succeed("findmnt --bytes --noheadings --output SIZE /var/lib/headgate")
          return int(size) / 2**30

      gateway.wait_for_unit("headgate.service")

      with subtest("the first boot makes the data partition out of what the image leaves"):
          gateway.succeed("findmnt --source PARTLABEL=headgate-data --mountpoint /var/lib/headgate")
          t.assertGreater(partition(), 2.3)

      gateway.succeed("headgate app stop overheat-alarm")
      gateway.shutdown()

      with subtest("on a larger disk it grows, and what was on it is still there"):
          qemu_img("resize", "-q", disk, "9G")
          gateway.start()
          gateway.wait_for_unit("headgate.service")
          t.assertGreater(partition(), 5.3)
          t.assertGreater(file_system(), 5)
          gateway.succeed("headgate --json app inspect overheat-alarm | jq -e '.state == \"stopped\"'")

      with subtest("the image is what it says"):
          t.assertIn('IMAGE_VERSION="0.1.0"', gateway.succeed("cat /etc/os-release"))
    '';
}
