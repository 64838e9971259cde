# The partition definitions as NixOS renders them, and the boot files' text, for the tests that run
# without Nix: an attribute set from file name to text.
{ nixpkgs }:

let
  inherit
    (import (nixpkgs + "/nixos/lib/eval-config.nix") {
      system = null;
      modules = [
        ../../modules
        ../../images/uefi.nix
        {
          nixpkgs.hostPlatform = "aarch64-linux";
          system.image.version = "0.1.0";
        }
      ];
    })
    config
    lib
    ;

  # As pkgs.formats.ini does, but without a build.
  render = lib.mapAttrs' (
    name: partition:
    lib.nameValuePair "${name}.conf" (
      lib.generators.toINI { listsAsDuplicateKeys = true; } { Partition = partition; }
    )
  );
  inFolder = folder: lib.mapAttrs' (name: lib.nameValuePair "${folder}/${name}");

  # Its path changes with every input, and means nothing here.
  withoutSystem = lib.replaceStrings [ "${config.system.build.toplevel}" ] [ "/nix/store/system" ];
in
inFolder "image.repart.d" (
  render (lib.mapAttrs (_: partition: partition.repartConfig) config.image.repart.partitions)
)
// inFolder "gateway.repart.d" (render config.systemd.repart.partitions)
// lib.mapAttrs' (
  name: text: lib.nameValuePair "esp/${name}" (withoutSystem text)
) config.system.build.headgateBootFiles
