# The sample apps as components: a folder each, with manifest, as `headgate app install` takes them.
{
  lib,
  lld,
  rustPlatform,
  wasm-tools,
}:

rustPlatform.buildRustPackage {
  pname = "headgate-apps";
  inherit ((lib.importTOML ./Cargo.toml).workspace.package) version;

  # The apps depend on the SDK, and the SDK on the interface, by path.
  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      (lib.fileset.difference ./. ./package.nix)
      ../sdk
      ../wit
    ];
  };
  cargoRoot = "apps";
  buildAndTestSubdir = "apps";
  cargoLock.lockFile = ./Cargo.lock;

  nativeBuildInputs = [
    lld
    wasm-tools
  ];
  # nixpkgs' compiler has the target's standard library, but not its linker.
  env.CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER = "wasm-ld";

  buildPhase = ''
    runHook preBuild
    (
      cd apps
      cargo build --offline --locked --release --lib --workspace --target wasm32-unknown-unknown
    )
    runHook postBuild
  '';

  # What it adds for audits is for programs, not for components.
  auditable = false;

  # `cargo test` on the build machine, where an app is a plain struct.
  doCheck = true;

  installPhase = ''
    runHook preInstall
    for manifest in apps/*/manifest.toml; do
      folder=''${manifest%/manifest.toml}
      name=''${folder#apps/}
      mkdir -p "$out/$name"
      cp "$manifest" "$out/$name"
      wasm-tools component new -o "$out/$name/$name.wasm" \
        "apps/target/wasm32-unknown-unknown/release/''${name//-/_}.wasm"
    done
    runHook postInstall
  '';

  strictDeps = true;
  __structuredAttrs = true;

  meta = {
    description = "Sample apps of the edge gateway Headgate";
    license = with lib.licenses; [
      asl20
      mit
    ];
    platforms = [
      "x86_64-linux"
      "aarch64-linux"
    ];
  };
}
