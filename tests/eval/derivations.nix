# Every output of the flake that can be built, by name: `cargo xtask nix` evaluates each to its
# derivation. `scripts` are the Python programs of the VM tests.
{
  nixpkgs ? builtins.getEnv "NIXPKGS",
  outputs ? import ./outputs.nix { inherit nixpkgs; },
}:

let
  inherit (outputs.inputs.nixpkgs) lib;

  # { x86_64-linux.name = value; … } as { "kind.x86_64-linux.name" = value; … }
  flat =
    kind:
    lib.concatMapAttrs (
      system: lib.mapAttrs' (name: lib.nameValuePair "${kind}.${system}.${name}")
    ) outputs.${kind};
in
rec {
  derivations =
    lib.concatMapAttrs (kind: _: lib.mapAttrs (_: output: output.drvPath) (flat kind)) {
      packages = null;
      checks = null;
      devShells = null;
    }
    // lib.mapAttrs (_: app: app.program) (flat "apps")
    // lib.mapAttrs' (
      system: formatter: lib.nameValuePair "formatter.${system}" formatter.drvPath
    ) outputs.formatter;

  scripts = lib.concatMapAttrs (
    name: check:
    lib.optionalAttrs (lib.hasPrefix "vm-" name) {
      ${name} = builtins.unsafeDiscardStringContext check.config.testScriptString;
    }
  ) outputs.checks.x86_64-linux;

  names = lib.attrNames derivations;
  scriptNames = lib.attrNames scripts;
}
