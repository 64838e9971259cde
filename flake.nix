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
      forAllSystems = f: lib.genAttrs systems (system: f nixpkgs.legacyPackages.${system});

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
              nixpkgs.hostPlatform = lib.mkDefault hostPlatform;
              nixpkgs.buildPlatform = lib.mkDefault buildPlatform;
              system.image.version = lib.mkDefault version;
              system.configurationRevision = self.rev or self.dirtyRev or null;
            }
          ]
          ++ modules;
        };

      nixosModules.default = ./modules;

      overlays.default = final: _prev: {
        headgate = final.callPackage ./package.nix { };
        # Components are the same for every machine: those of the build machine's compilers will do.
        headgate-apps = final.buildPackages.callPackage ./apps/package.nix { };
      };

      packages = forAllSystems (
        pkgs:
        let
          inherit (pkgs.stdenv.hostPlatform) system;
        in
        {
          default = self.packages.${system}.headgate;
          headgate = pkgs.callPackage ./package.nix { };
          headgate-apps = pkgs.callPackage ./apps/package.nix { };
          headgate-aarch64 = pkgs.pkgsCross.aarch64-multiplatform.callPackage ./package.nix {
            compiler = false;
          };
        }
      );
    };
}
