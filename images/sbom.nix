# What is in an image, as CycloneDX 1.6: every store path of the closure, and the Rust crates in the
# gateway's program.
{
  config,
  lib,
  pkgs,
  ...
}:

{
  options.image.sbom.paths = lib.mkOption {
    type = lib.types.listOf lib.types.package;
    default = [ ];
    description = "Store paths whose files are in the image, although the system does not refer to them.";
  };

  config.system.build.headgateSbom =
    let
      roots = [ config.system.build.toplevel ] ++ config.image.sbom.paths;
    in
    pkgs.buildPackages.runCommand
      "${config.system.image.id}-sbom-${config.system.image.version}.cdx.json"
      {
        __structuredAttrs = true;
        nativeBuildInputs = [ pkgs.buildPackages.jq ];
        exportReferencesGraph.closure = roots;
        # A list of store paths is not a reason to keep them.
        unsafeDiscardReferences.out = true;
        product = {
          inherit (config.system.image) id version;
          roots = map toString roots;
        };
        gateway = "${config.services.headgate.package}";
        crates = import ./crates.nix { inherit lib; };
      }
      ''
        jq --sort-keys --from-file ${./sbom.jq} "$NIX_ATTRS_JSON_FILE" > "$out"
      '';
}
