# The module without the rest of NixOS, which takes a hundred times as long to evaluate: what it sets
# elsewhere is taken as it comes.
{ outputs }:

let
  inherit (outputs.inputs) nixpkgs;
  inherit (nixpkgs) lib;

  anything = lib.mkOption {
    type = lib.types.attrsOf lib.types.anything;
    default = { };
  };
  # One for all tests: it is what takes the time.
  packages = lib.mapAttrs (_: pkgs: pkgs.extend outputs.overlays.default) nixpkgs.legacyPackages;
in
rec {
  evaluate =
    {
      system ? "aarch64-linux",
    }:
    module:
    (lib.evalModules {
      modules = [
        outputs.nixosModules.default
        (nixpkgs.outPath + "/nixos/modules/misc/assertions.nix")
        {
          options = {
            boot = {
              kernelParams = lib.mkOption { };
              loader = lib.genAttrs [
                "efi"
                "external"
                "grub"
                "systemd-boot"
              ] (_: anything);
            };
            environment = anything;
            networking = anything;
            services.udev = anything;
            system = anything;
            systemd = anything;
            users = anything;
          };
          config._module.args.pkgs = packages.${system};
        }
        { config.services.headgate.enable = true; }
        module
      ];
    }).config;

  # The assertions that do not hold.
  complaints =
    arguments: module:
    map (assertion: assertion.message) (
      lib.filter (assertion: !assertion.assertion) (evaluate arguments module).assertions
    );
}
