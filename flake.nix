{
  description = "Headgate: an edge gateway as a NixOS system";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;

      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];
      forAllSystems =
        f:
        lib.genAttrs systems (
          system: f system (nixpkgs.legacyPackages.${system}.extend self.overlays.default)
        );

      inherit ((lib.importTOML ./Cargo.toml).workspace.package) version;
    in
    {
      # The NixOS system of a gateway: by default an aarch64 one, built on x86_64.
      lib.mkGateway =
        {
          modules,
          hostPlatform ? "aarch64-linux",
          buildPlatform ? "x86_64-linux",
        }:
        lib.nixosSystem {
          modules = [
            self.nixosModules.default
            {
              nixpkgs = {
                hostPlatform = lib.mkDefault hostPlatform;
                buildPlatform = lib.mkDefault buildPlatform;
                overlays = [ self.overlays.default ];
              };
              system = {
                image.version = lib.mkDefault version;
                configurationRevision = self.rev or self.dirtyRev or null;
              };
            }
          ]
          ++ modules;
        };

      nixosModules = {
        default = ./modules;
        image-rpi = ./images/rpi.nix;
        image-uefi = ./images/uefi.nix;
      };

      overlays.default = final: _prev: {
        headgate = final.callPackage ./package.nix { };
        # Components are the same for every machine: the build machine's compiler will do.
        headgate-apps = final.buildPackages.callPackage ./apps/package.nix { };
      };

      templates.default = {
        path = ./templates/default;
        description = "A gateway of your own";
      };

      packages = forAllSystems (
        system: pkgs:
        let
          buildOf =
            image:
            (self.lib.mkGateway {
              buildPlatform = system;
              modules = [
                image
                ./images/demo.nix
              ];
            }).config.system.build;
          rpi = buildOf self.nixosModules.image-rpi;
          uefi = buildOf self.nixosModules.image-uefi;
        in
        {
          default = self.packages.${system}.headgate;
          inherit (pkgs) headgate headgate-apps;
          headgate-aarch64 = pkgs.pkgsCross.aarch64-multiplatform.headgate.override { compiler = false; };

          image-rpi = rpi.sdImage;
          image-uefi = uefi.image;
          release-rpi = rpi.headgateRelease;
          release-uefi = uefi.headgateRelease;
          sbom-rpi = rpi.headgateSbom;
          sbom-uefi = uefi.headgateSbom;

          options-doc = pkgs.writeText "nixos-options.md" (
            import ./docs/nixos-options.nix { inherit lib pkgs; }
          );
        }
      );

      apps = forAllSystems (
        system: pkgs: {
          default = self.apps.${system}.headgate;
          # `nix run . -- demo` wants the sample apps.
          headgate = {
            type = "app";
            program = lib.getExe (
              pkgs.writeShellScriptBin "headgate" ''
                export HEADGATE_DEMO_APPS="''${HEADGATE_DEMO_APPS-${pkgs.headgate-apps}}"
                exec ${lib.getExe pkgs.headgate} "$@"
              ''
            );
            meta.description = "Headgate's command line, with the sample apps for its demo";
          };
        }
      );

      checks = forAllSystems (
        system: pkgs:
        {
          inherit (self.packages.${system})
            headgate
            headgate-aarch64
            headgate-apps
            ;

          clippy = pkgs.headgate.overrideAttrs (previous: {
            pname = "headgate-clippy";
            nativeBuildInputs = previous.nativeBuildInputs ++ [ pkgs.clippy ];
            buildPhase = "cargo clippy --offline --release --workspace --all-targets -- --deny warnings";
            doCheck = false;
            installPhase = "touch $out";
          });

          rustfmt =
            pkgs.runCommand "headgate-rustfmt"
              {
                nativeBuildInputs = [
                  pkgs.cargo
                  pkgs.rustfmt
                ];
                workspaces = [
                  pkgs.headgate.src
                  "${pkgs.headgate-apps.src}/apps"
                ];
              }
              ''
                for workspace in $workspaces; do
                  (cd "$workspace" && cargo fmt --all --check)
                done
                touch "$out"
              '';

          nix =
            pkgs.runCommand "headgate-nix"
              {
                nativeBuildInputs = [
                  pkgs.deadnix
                  pkgs.nixfmt-rs
                  pkgs.statix
                ];
                src = lib.fileset.toSource {
                  root = ./.;
                  fileset = lib.fileset.fileFilter (file: file.hasExt "nix") ./.;
                };
              }
              ''
                find "$src" -name '*.nix' -exec nixfmt --check {} +
                deadnix --fail "$src"
                statix check "$src"
                touch "$out"
              '';

          # Made by evaluation; what is in it is of no interest if there is something.
          evaluation = pkgs.writeText "headgate-evaluation" (
            let
              inherit (import ./tests/eval { outputs = self; }) failures;
            in
            if failures == [ ] then "ok" else throw (lib.generators.toPretty { } failures)
          );

          options-doc = pkgs.runCommand "headgate-options-doc" { } ''
            diff -u ${./docs/nixos-options.md} ${self.packages.${system}.options-doc}
            touch "$out"
          '';
        }
        // lib.mapAttrs' (
          file: _:
          lib.nameValuePair "vm-${lib.removeSuffix ".nix" file}" (
            pkgs.testers.runNixOSTest {
              imports = [ ./tests/nixos/${file} ];
              defaults.imports = [ self.nixosModules.default ];
            }
          )
        ) (removeAttrs (builtins.readDir ./tests/nixos) [ "gateway.nix" ])
      );

      devShells = forAllSystems (
        _: pkgs: {
          default = pkgs.mkShell {
            inputsFrom = [ pkgs.headgate ];
            packages = [
              pkgs.cargo-deny
              pkgs.clippy
              pkgs.deadnix
              pkgs.libfaketime
              pkgs.mosquitto
              pkgs.nixfmt-rs
              pkgs.python3
              pkgs.qemu
              pkgs.rust-analyzer
              pkgs.rustfmt
              pkgs.statix
              # The name by which rustc looks for the linker of the apps.
              (pkgs.runCommand "rust-lld" { } ''
                mkdir -p "$out/bin"
                ln -s ${lib.getExe' pkgs.lld "lld"} "$out/bin/rust-lld"
              '')
            ];
          };
        }
      );

      formatter = forAllSystems (_: pkgs: pkgs.nixfmt-tree.override { nixfmtPackage = pkgs.nixfmt-rs; });
    };
}
