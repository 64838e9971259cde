# TOML as text, by evaluation alone: what is rendered can be looked at and tested without building.
{ lib }:

let
  # A key that is no bare one is quoted as a string is.
  key = name: if builtins.match "[A-Za-z0-9_-]+" name != null then name else builtins.toJSON name;
in
# With dotted keys no table needs a header. JSON's strings, numbers, booleans and lists are TOML's, too;
# null, which TOML does not have, is a key that is not set.
table:
lib.concatStrings (
  lib.mapAttrsToListRecursiveCond (_: value: !lib.isDerivation value) (
    path: value: "${lib.concatMapStringsSep "." key path} = ${builtins.toJSON value}\n"
  ) (lib.filterAttrsRecursive (_: value: value != null) table)
)
