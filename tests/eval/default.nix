# Tests of the module and the images, by evaluation; `cargo xtask nix` runs them.
{
  nixpkgs ? builtins.getEnv "NIXPKGS",
  outputs ? import ./outputs.nix { inherit nixpkgs; },
}:

let
  inherit (outputs.inputs.nixpkgs) lib;
  inherit (import ./module.nix { inherit outputs; }) evaluate;
  toTOML = import ../../modules/toml.nix { inherit lib; };

  tests = lib.mergeAttrsList (
    map (file: import file { inherit outputs; }) [
      ./images.nix
      ./mistakes.nix
      ./ota.nix
      ./rendering.nix
    ]
  );
  rejected = import ./rejected.nix { inherit outputs; };

  headgateOf = module: (evaluate { } module).services.headgate;
in
{
  # Empty, if all is well.
  failures = lib.runTests tests;
  count = lib.length (lib.attrNames tests);

  optionsDoc = import ../../docs/nixos-options.nix {
    inherit lib;
    pkgs = outputs.inputs.nixpkgs.legacyPackages.x86_64-linux;
  };

  # Each of `values` can't be evaluated, and the error contains what `messages` says.
  messages = lib.mapAttrs (_: case: case.message) rejected;
  values = lib.mapAttrs (_: case: case.value) rejected;

  # Texts that the gateway itself must take.
  configurations =
    lib.mapAttrs (_: module: builtins.unsafeDiscardStringContext (toTOML (headgateOf module).settings))
      {
        defaults = { };
        everything = ./everything.nix;
      };
  manifests = lib.mapAttrs' (_: app: lib.nameValuePair app.name app.manifest) (
    lib.filterAttrs (_: app: app.enable && app.package == null) (headgateOf ./everything.nix).apps
  );
}
