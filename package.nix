# The gateway. It is built for `stdenv.hostPlatform`, so cross as well as native.
{
  lib,
  rustPlatform,
  stdenv,
  # Whether the gateway can compile apps. One that can't runs apps that were compiled for it
  # beforehand, and is much smaller: what a device needs.
  compiler ? true,
}:

rustPlatform.buildRustPackage {
  pname = "headgate";
  inherit ((lib.importTOML ./Cargo.toml).workspace.package) version;

  # Only what cargo reads: who edits a module or an image does not rebuild the gateway.
  src = lib.fileset.toSource {
    root = ./.;
    fileset = lib.fileset.unions [
      ./Cargo.lock
      ./Cargo.toml
      ./benches
      ./docs/configuration.md
      ./guest
      ./modules/cpus.nix
      ./modules/settings.schema.json
      ./sdk
      ./src
      ./templates/app
      ./tests/cli.rs
      ./tests/e2e
      ./wit
      ./xtask
    ];
  };

  # A local file with a checksum a crate: no import-from-derivation, and no hash to keep current.
  cargoLock.lockFile = ./Cargo.lock;

  buildType = "dist";
  cargoBuildFlags = [
    "--package=headgate"
    "--bin=headgate"
  ];
  buildNoDefaultFeatures = !compiler;

  # The tests compile apps, and the result must run on the machine that builds it. Those in tests/e2e
  # want the sample apps and a network: `./dev test` runs them.
  doCheck = compiler && stdenv.buildPlatform.canExecute stdenv.hostPlatform;
  cargoTestFlags = [
    "--package=headgate"
    "--lib"
    "--test=cli"
  ];

  strictDeps = true;
  __structuredAttrs = true;

  meta = {
    description = "Edge gateway: MQTT in, WASM apps in batches, MQTT out";
    license = with lib.licenses; [
      asl20
      mit
    ];
    mainProgram = "headgate";
    platforms = [
      "x86_64-linux"
      "aarch64-linux"
    ];
  };
}
