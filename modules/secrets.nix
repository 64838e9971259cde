# Finds secrets where everybody could read them: in values that go to the Nix store.
{ lib }:

let
  # Written together, as camel case and the like come to in lower case.
  plain = name: lib.replaceStrings [ "_" "-" "." ] [ "" "" "" ] (lib.toLower name);
  hasSecretName =
    name:
    builtins.match ".*(password|passwd|passphrase|secret|(api|private|access|signing)key|credential|authorization|bearer).*|.*token|pass|pwd|psk" (
      plain name
    ) != null
    || builtins.match ".*[_.-](pass|pwd|psk)" (lib.toLower name) != null;

  # scheme://user:password@host
  hasPassword = value: lib.isString value && builtins.match ".*://[^/@]*:[^/@]+@.*" value != null;

  isPrivateKey = value: lib.isString value && lib.hasInfix "PRIVATE KEY-----" value;

  # A path says where the secret lies, not what it is; unless it is the store, where all can read it.
  isPath =
    value:
    lib.isString value
    && builtins.match "(/[A-Za-z0-9._@+-]+)+" value != null
    && !lib.hasPrefix builtins.storeDir value;

  # A number that is a limit is not a secret; one that is called a password is.
  isValue = value: lib.isString value && value != "" || lib.isInt value;

  isSecret =
    path: value:
    isPrivateKey value
    || hasPassword value
    || hasSecretName (lib.last path) && isValue value && !isPath value;
in
# The keys in `table` whose values look like secrets, with dots.
table:
lib.filter (key: key != null) (
  lib.mapAttrsToListRecursiveCond (_: value: !lib.isDerivation value) (
    path: value: if isSecret path value then lib.concatStringsSep "." path else null
  ) table
)
