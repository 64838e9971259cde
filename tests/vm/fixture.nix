# What the module makes of a gateway that is booted by `cargo xtask vm-test`, which has no Nix: file
# names and their texts. `cargo xtask nix --write` puts them into fixture/.
{
  nixpkgs ? builtins.getEnv "NIXPKGS",
}:

let
  outputs = import ../eval/outputs.nix { inherit nixpkgs; };
  inherit (outputs.inputs.nixpkgs) lib;

  apps = outputs.packages.aarch64-linux.headgate-apps;

  gateway = outputs.lib.mkGateway {
    # Not cross-compiled: names then are those of any gateway.
    buildPlatform = "aarch64-linux";
    modules = [
      {
        services.headgate = {
          enable = true;
          cpu = "cortex-a72";
          settings = {
            mqtt = {
              listen = "0.0.0.0:1883";
              auth.anonymous = "always";
            };
            metrics.listen = "0.0.0.0:9464";
            journal = {
              topics = "plant/#";
              # The boot test is to see segments begin.
              segment_bytes = "64KiB";
            };
          };
          apps = {
            overheat-alarm.package = "${apps}/overheat-alarm";
            unit-convert.package = "${apps}/unit-convert";
          };
        };

        boot.loader.grub.enable = false;
        fileSystems."/" = {
          device = "/dev/vda";
          fsType = "ext4";
        };
        system.stateVersion = "26.05";
      }
    ];
  };
  inherit (gateway) config;
  inherit (config.services.headgate) settings;
  user = config.users.users.headgate;

  # Hashes change with everything that goes into a path, and say nothing.
  withoutHashes =
    text:
    lib.concatMapStrings (part: if lib.isList part then "/nix/store/" else part) (
      builtins.split "/nix/store/[0-9a-z]{32}-" (builtins.unsafeDiscardStringContext text)
    );
in
lib.mapAttrs (_: withoutHashes) {
  "headgate.service" = config.systemd.units."headgate.service".text;
  "headgate.toml" = import ../../modules/toml.nix { inherit lib; } settings;
  "sysusers.conf" = ''
    g ${user.group} -
    u ${user.name} -:${user.group} "" ${user.home}
  '';
  "compile-apps.sh" = config.services.headgate.compiledApps.buildCommand;
}
