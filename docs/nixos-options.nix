# The text of nixos-options.md, from the options themselves.
{ lib, pkgs }:

let
  evaluated = lib.evalModules {
    modules = [
      ../modules
      {
        _module.args.pkgs = pkgs;
        # Only the options are looked at, not what the module makes of them in NixOS.
        _module.check = false;
      }
    ];
  };

  isOurs =
    name: lib.hasPrefix "services.headgate." name || lib.hasPrefix "boot.loader.headgate." name;
  options = lib.filter (option: isOurs option.name && option.visible == true && !option.internal) (
    lib.optionAttrSetToDocList evaluated.options
  );

  # Roles of the NixOS manual, which other readers of Markdown do not know.
  plain = lib.replaceStrings [ "{option}" "{file}" "{manpage}" ] [ "" "" "" ];

  code =
    name: value:
    let
      text = lib.removeSuffix "\n" value.text;
    in
    if lib.hasInfix "\n" text then "${name}:\n\n```nix\n${text}\n```\n" else "${name}: `${text}`\n";

  section = option: ''
    ## `${option.name}`

    ${lib.trim (plain option.description)}

    Type: ${plain option.type}

    ${
      if option.readOnly then
        "Read-only: ${code "its value" option.default}"
      else if option ? default then
        code "Default" option.default
      else
        "It has no default.\n"
    }${lib.optionalString (option ? example) "\n${code "Example" option.example}"}
  '';
in
''
  # Options of the NixOS module

  <!-- Made by `cargo xtask nix --write` from modules/. -->

  [nixos.md](nixos.md) says how to use them. Keys of `services.headgate.settings` are those of
  [configuration.md](configuration.md).

''
+ lib.removeSuffix "\n" (
  lib.concatMapStrings section (lib.sort (one: other: one.name < other.name) options)
)
