# The partition definitions as NixOS renders them, the boot loader's configuration, and what the system says
# about its boot, for the tests that run without Nix: an attribute set from file name to text.
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
    pkgs
    ;

  # As pkgs.formats.ini does, but without a build.
  render = lib.mapAttrs' (
    name: partition:
    lib.nameValuePair "${name}.conf" (
      lib.generators.toINI { listsAsDuplicateKeys = true; } { Partition = partition; }
    )
  );
  inFolder = folder: lib.mapAttrs' (name: lib.nameValuePair "${folder}/${name}");

  # Store paths change with every input, and mean nothing here.
  store = name: "${builtins.storeDir}/${lib.fixedWidthString 32 "0" ""}-${name}";
  toplevel = store "nixos-system";
in
inFolder "image.repart.d" (
  render (lib.mapAttrs (_: partition: partition.repartConfig) config.image.repart.partitions)
)
// inFolder "gateway.repart.d" (render config.systemd.repart.partitions)
// {
  "loader.conf" = config.boot.loader.headgate.loaderConf;
  # As nixos/modules/system/activation/bootspec.nix writes it.
  "boot.json" = builtins.toJSON {
    "org.nixos.bootspec.v1" = {
      inherit (pkgs.stdenv.hostPlatform) system;
      inherit (config.boot) kernelParams;
      inherit toplevel;
      init = "${toplevel}/init";
      initrd = "${store "initrd-linux"}/${config.system.boot.loader.initrdFile}";
      kernel = "${store "linux"}/${config.system.boot.loader.kernelFile}";
      label = "NixOS";
    };
  };
}
