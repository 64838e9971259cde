# The boot files of an image: systemd-boot and one entry, for the system that the image carries, written as
# updates write theirs. It has a counter like any other: the first boot is declared good, and has shown
# that boots are counted here.
{
  config,
  lib,
  pkgs,
  ...
}:

{
  boot.loader = {
    headgate.enable = true;
    timeout = lib.mkDefault 0;
  };

  # Files, not links: systemd-repart leaves symbolic links out of a FAT file system without a word.
  system.build.headgateEsp =
    pkgs.runCommand "headgate-esp"
      {
        nativeBuildInputs = [ config.services.headgate.buildPackage ];
        strictDeps = true;
        __structuredAttrs = true;
      }
      ''
        mkdir "$out"
        headgate boot install --offline --esp "$out" --generation 1 \
          ${lib.escapeShellArgs config.boot.loader.headgate.arguments} ${config.system.build.toplevel}
      '';
}
