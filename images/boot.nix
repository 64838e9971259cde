# The boot files of an image: systemd-boot and one entry, for the system that the image carries.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (config.system.build) toplevel;
  inherit (pkgs.stdenv.hostPlatform) efiArch;

  systemdBoot = "${config.systemd.package}/lib/systemd/boot/efi/systemd-boot${efiArch}.efi";

  # A pattern, so that the newest entry wins, and the one before it once the newest is marked as bad.
  loaderConf = ''
    timeout ${toString config.boot.loader.timeout}
    default headgate-*
    editor no
  '';

  # `version` sorts the entries; the file's name carries no counter of tries, as nothing on the
  # gateway would ever declare the boot a success and end the counting.
  entry = ''
    title Headgate ${config.system.image.version}
    sort-key headgate
    version 1
    linux /EFI/headgate/1/kernel.efi
    initrd /EFI/headgate/1/initrd
    options init=${toplevel}/init ${toString config.boot.kernelParams}
  '';
in
{
  boot.loader = {
    # The image's own files are all there is: no script of NixOS writes boot entries.
    grub.enable = false;
    timeout = lib.mkDefault 0;
  };

  system = {
    # systemd-boot starts the kernel as a program of the firmware.
    requiredKernelConfig = [ (config.lib.kernelConfig.isYes "EFI_STUB") ];

    build.headgateBootFiles = {
      "loader/loader.conf" = loaderConf;
      "loader/entries/headgate-1.conf" = entry;
    };

    # Files, not links: systemd-repart leaves symbolic links out of a FAT file system without a word.
    build.headgateEsp = pkgs.runCommand "headgate-esp" { __structuredAttrs = true; } ''
      install -D -m 0644 ${systemdBoot} "$out/EFI/BOOT/BOOT${lib.toUpper efiArch}.EFI"
      ${lib.concatStrings (
        lib.mapAttrsToList (name: text: ''
          install -D -m 0644 ${pkgs.writeText (baseNameOf name) text} "$out/${name}"
        '') config.system.build.headgateBootFiles
      )}
      install -D -m 0644 ${toplevel}/kernel "$out/EFI/headgate/1/kernel.efi"
      install -D -m 0644 ${toplevel}/initrd "$out/EFI/headgate/1/initrd"
    '';
  };
}
