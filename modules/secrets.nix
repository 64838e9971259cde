# Finds secrets where everybody could read them: in values that go to the Nix store.
{ lib }:

let
  hasSecretName =
    name:
    builtins.match "(.*[._-])?(password|passwd|passphrase|secret|token|api_?key|private_?key)" (
      lib.toLower name
    ) != null;

  isPrivateKey = value: lib.isString value && lib.hasInfix "PRIVATE KEY-----" value;

  # A path says where the secret lies, not what it is.
  isPath = value: lib.isString value && lib.hasPrefix "/" value;

  isSecret =
    path: value:
    isPrivateKey value
    || hasSecretName (lib.last path) && lib.isString value && value != "" && !isPath value;
in
# The keys in `table` whose values look like secrets, with dots.
table:
lib.filter (key: key != null) (
  lib.mapAttrsToListRecursive (
    path: value: if isSecret path value then lib.concatStringsSep "." path else null
  ) table
)
