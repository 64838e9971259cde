# TOML as text, by evaluation alone: what is rendered can be looked at and tested without building.
{ lib }:

let
  # A key that is no bare one is quoted as a string is.
  key = name: if builtins.match "[A-Za-z0-9_-]+" name != null then name else builtins.toJSON name;

  # JSON's strings, numbers and booleans are TOML's, too. Tables in lists are inline ones.
  render =
    value:
    if lib.isList value then
      "[${lib.concatMapStringsSep "," render value}]"
    else if lib.isAttrs value && !lib.isDerivation value then
      "{${
        lib.concatStringsSep ", " (lib.mapAttrsToList (name: part: "${key name} = ${render part}") value)
      }}"
    else
      builtins.toJSON value;
in
# With dotted keys no table needs a header. Null, which TOML does not have, is a key that is not set.
table:
lib.concatStrings (
  lib.mapAttrsToListRecursiveCond (_: value: !lib.isDerivation value) (
    path: value: "${lib.concatMapStringsSep "." key path} = ${render value}\n"
  ) (lib.filterAttrsRecursive (_: value: value != null) table)
)
