# The disk of a gateway: EFI system partition and root come with the image, and the first boot makes
# the rest of the disk the data partition, which every later system leaves as it is.
{
  config,
  lib,
  modulesPath,
  pkgs,
  ...
}:

let
  inherit (config.system.build) headgateEsp toplevel;

  # What `nix-env --profile /nix/var/nix/profiles/system --set` would have left behind, and what is known of
  # the image's store paths: no signature vouches for those, so that a scrub has their hashes from here.
  profile = pkgs.runCommand "headgate-profile" { __structuredAttrs = true; } ''
    mkdir -p "$out/nix/var/nix/profiles"
    ln -s ${toplevel} "$out/nix/var/nix/profiles/system-1-link"
    ln -s system-1-link "$out/nix/var/nix/profiles/system"
    install -D -m 0644 ${pkgs.closureInfo { rootPaths = [ toplevel ]; }}/registration \
      "$out/nix/var/headgate/registration"
  '';
in
{
  imports = [ "${modulesPath}/image/repart.nix" ];

  image.repart = {
    name = config.system.image.id;
    compression = {
      enable = lib.mkDefault true;
      # An image is built once and then flashed many times.
      level = lib.mkDefault 9;
    };
    # What SD cards have, and all that U-Boot reads.
    sectorSize = 512;
    partitions = {
      # Room for the kernels and initrds of four systems beside the Raspberry Pi's firmware.
      "10-esp" = {
        contents."/".source = lib.mkDefault headgateEsp;
        repartConfig = {
          Type = "esp";
          Label = "headgate-esp";
          Format = "vfat";
          SizeMinBytes = "512M";
          SizeMaxBytes = "512M";
        };
      };
      # Of a fixed size, so that the data partition's place never depends on the system's size.
      "20-root" = {
        storePaths = [ toplevel ];
        contents."/nix/var".source = "${profile}/nix/var";
        repartConfig = {
          Type = "root";
          Label = "headgate-root";
          Format = "ext4";
          SizeMinBytes = "3G";
          SizeMaxBytes = "3G";
        };
      };
    };
  };

  # Nix removes what it does not know.
  systemd.services.headgate-register = lib.mkIf config.nix.enable {
    description = "Tell Nix of the store paths that came with the image";
    wantedBy = [ "multi-user.target" ];
    before = [
      "headgate-ota.service"
      "nix-daemon.service"
      "nix-gc.service"
    ];
    unitConfig.ConditionPathExists = "!/nix/var/nix/db/db.sqlite";
    serviceConfig = {
      Type = "oneshot";
      ExecStart = "${lib.getExe' config.nix.package "nix-store"} --load-db";
      StandardInput = "file:/nix/var/headgate/registration";
    };
  };

  # In the first boot this makes the partition and its file system, later it only grows a partition
  # that has got more room. The type is Headgate's own: systemd-repart tells partitions by their type,
  # and must not take one that somebody made for other things on the same disk.
  boot.initrd.systemd.repart.enable = true;
  systemd.repart.partitions."30-data" = {
    Type = "07249c49-6dcd-498f-8cb8-f93536f30906";
    Label = "headgate-data";
    Format = "ext4";
    SizeMinBytes = "256M";
  };

  fileSystems = {
    "/" = {
      device = "/dev/disk/by-partlabel/headgate-root";
      fsType = "ext4";
      options = [ "noatime" ];
    };
    # Neither `nofail` nor automounted: what blesses a boot waits for this mount.
    "/boot" = {
      device = "/dev/disk/by-partlabel/headgate-esp";
      fsType = "vfat";
      options = [
        "umask=0077"
        "noatime"
      ];
    };
    # Without it the machine still comes up, for somebody to log in. The service does not: it needs
    # the mount through its StateDirectory=, and so never writes below the mount point by mistake.
    "/var/lib/headgate" = {
      device = "/dev/disk/by-partlabel/headgate-data";
      fsType = "ext4";
      options = [
        "noatime"
        "nofail"
        "x-systemd.growfs"
      ];
    };
  };
}
