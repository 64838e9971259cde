# The crates that the gateway's program may contain, from Cargo.toml and Cargo.lock at evaluation time:
# name, version, SHA-256 of the crate file, and which others each needs.
#
# A lock file knows neither features nor targets, so these are somewhat more than are linked.
{ lib }:

let
  manifest = lib.importTOML ../Cargo.toml;
  packages = (lib.importTOML ../Cargo.lock).package;
  byName = lib.groupBy (package: package.name) packages;

  # Cargo.lock writes "name" where that is clear, else "name version", else "name version (source)".
  resolve =
    dependency:
    let
      parts = lib.splitString " " dependency;
      name = lib.head parts;
      fits = package: lib.length parts == 1 || package.version == lib.elemAt parts 1;
    in
    lib.findFirst fits (throw "Cargo.lock: no package ${dependency}") byName.${name};

  identity = package: "${package.name}@${package.version}";

  # Cargo.lock lists the root's development dependencies with the others: leave them to the tests.
  targets = [ manifest ] ++ lib.attrValues (manifest.target or { });
  direct = lib.concatMap (
    target:
    lib.mapAttrsToList (name: dependency: dependency.package or name) (
      target.dependencies or { } // target.build-dependencies or { }
    )
  ) targets;
  root = lib.head byName.${manifest.package.name};
  isDirect = dependency: lib.elem (lib.head (lib.splitString " " dependency)) direct;
  dependencies =
    package:
    map resolve (
      (if package == root then lib.filter isDirect else lib.id) (package.dependencies or [ ])
    );

  closure = lib.genericClosure {
    startSet = [
      {
        key = identity root;
        package = root;
      }
    ];
    operator =
      { package, ... }:
      map (package: {
        key = identity package;
        inherit package;
      }) (dependencies package);
  };
in
map (
  { package, ... }:
  {
    inherit (package) name version;
    checksum = package.checksum or null;
    dependencies = map identity (dependencies package);
  }
) closure
