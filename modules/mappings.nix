# The mappings that are part of the system.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkOption types;

  cfg = config.services.headgate;

  # JSON is YAML.
  fileOf =
    name: mapping:
    if lib.isAttrs mapping && !lib.isDerivation mapping then
      pkgs.writeText "${name}.yaml" (builtins.toJSON mapping)
    else
      mapping;

  files = lib.mapAttrs' (
    name: mapping: lib.nameValuePair "${name}.yaml" (fileOf name mapping)
  ) cfg.mappings;

  # The gateway's own parser and compiler look at them, so that a mistake fails the build and not the boot.
  checked =
    pkgs.runCommand "headgate-mappings"
      {
        nativeBuildInputs = [ cfg.buildPackage ];
        strictDeps = true;
        __structuredAttrs = true;
        inherit files;
        passthru = { inherit files; };
      }
      ''
        mkdir "$out"
        for file in "''${!files[@]}"; do
          cp "''${files[$file]}" "$out/$file"
          headgate mapping check "$out/$file"
        done
      '';
in
{
  options.services.headgate = {
    mappings = mkOption {
      type =
        types.addCheck (types.attrsOf (types.either types.path (types.attrsOf types.anything))) (
          mappings:
          lib.all (name: builtins.match "[a-z0-9][a-z0-9-]{0,63}" name != null) (lib.attrNames mappings)
        )
        // {
          description = "attribute set of (path or YAML as Nix), with names of lower-case letters, digits and hyphens";
        };
      default = { };
      example = lib.literalExpression ''
        {
          pump = ./pump.yaml;
        }
      '';
      description = ''
        Mappings, by name: stream processors of the unified namespace, as a file or as what would stand in it.
        {file}`docs/mappings.md` says more. The module sets `mappings.preinstalled`.
      '';
    };

    checkedMappings = mkOption {
      type = types.package;
      default = checked;
      readOnly = true;
      internal = true;
      description = "The folder of the mappings, checked.";
    };
  };

  config.services.headgate.settings.mappings.preinstalled = lib.mkIf (
    cfg.enable && cfg.mappings != { }
  ) "${cfg.checkedMappings}";
}
