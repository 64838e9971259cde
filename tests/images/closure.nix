# A closure of three store paths and what Nix tells a build about it, without any package: the input
# of images/sbom.jq, made by the Nix at hand.
let
  write =
    name: text:
    derivation {
      inherit name;
      system = builtins.currentSystem;
      builder = "/bin/sh";
      args = [
        "-c"
        "echo ${text} > ${placeholder "out"}"
      ];
    };

  library = write "library-with-a-long-name-1.2.3-lib" "library";
  gateway = write "headgate-0.1.0" library;
  top = write "nixos-system-test" gateway;
in
derivation {
  name = "closure.json";
  system = builtins.currentSystem;
  builder = "/bin/sh";
  # The shell alone can do it, which is all that a sandbox has.
  args = [
    "-c"
    "read -r attributes < .attrs.json; printf '%s\\n' \"$attributes\" > ${placeholder "out"}"
  ];

  __structuredAttrs = true;
  unsafeDiscardReferences.out = true;
  exportReferencesGraph.closure = [ top ];
  product = {
    id = "headgate";
    version = "0.1.0";
    roots = [ top ];
  };
  inherit gateway;
  crates = [
    {
      name = "headgate";
      version = "0.1.0";
      checksum = null;
      dependencies = [ "toml@1.2.1+spec-1.1.0" ];
    }
    {
      name = "toml";
      version = "1.2.1+spec-1.1.0";
      checksum = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
      dependencies = [ ];
    }
  ];
}
