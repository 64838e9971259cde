# What the modules make of a gateway that is updated over the air by `cargo xtask ota-test`, which builds nothing
# with Nix: file names and their texts. `cargo xtask nix --write` puts them into fixture/.
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
            ota = {
              # The test has others.
              channel = "http://10.0.2.2";
              trusted_keys = "ota-test-1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
              min_free_bytes = "16MiB";
              # The test restarts the machine.
              reboot = "never";
              health = {
                deadline_s = 30;
                settle_s = 1;
              };
            };
          };
          apps = {
            overheat-alarm.package = "${apps}/overheat-alarm";
            unit-convert.package = "${apps}/unit-convert";
          };
          ota.enable = true;
        };

        boot.loader.headgate = {
          enable = true;
          tries = 2;
        };
        boot.loader.timeout = 0;
        fileSystems = {
          "/" = {
            device = "/dev/vda2";
            fsType = "ext4";
          };
          "/boot" = {
            device = "/dev/vda1";
            fsType = "vfat";
            options = [ "umask=0077" ];
          };
        };
        # As on the images: paths come and go with updates only.
        nix.enable = false;
        system.stateVersion = "26.05";
      }
    ];
  };
  inherit (gateway) config;
  user = config.users.users.headgate;

  # Hashes change with everything that goes into a path, and say nothing.
  withoutHashes =
    text:
    lib.concatMapStrings (part: if lib.isList part then "/nix/store/" else part) (
      builtins.split "/nix/store/[0-9a-z]{32}-" (builtins.unsafeDiscardStringContext text)
    );
  # NixOS makes links of what is required, and only writes what is wanted into the unit.
  unit =
    name:
    let
      inherit (config.systemd.units.${name}) requiredBy text;
    in
    text
    + lib.optionalString (requiredBy != [ ]) ''
      [Install]
      RequiredBy=${lib.concatStringsSep " " requiredBy}
    '';
in
# Not the timer: the test says when to look for updates.
lib.mapAttrs (_: withoutHashes) {
  "units/headgate-ota-commit.service" = unit "headgate-ota-commit.service";
  "units/headgate-ota-failed.service" = unit "headgate-ota-failed.service";
  "units/headgate-ota-health.service" = unit "headgate-ota-health.service";
  "units/headgate-ota.path" = unit "headgate-ota.path";
  "units/headgate-ota.service" = unit "headgate-ota.service";
  # Added to systemd's own.
  "units/boot-complete.target.d/overrides.conf" = unit "boot-complete.target";
  "headgate.service" = unit "headgate.service";
  "headgate.toml" = import ../../modules/toml.nix { inherit lib; } config.services.headgate.settings;
  "loader.conf" = config.boot.loader.headgate.loaderConf;
  "sysusers.conf" = ''
    g ${user.group} -
    u ${user.name} -:${user.group} "" ${user.home}
  '';
  "compile-apps.sh" = config.services.headgate.compiledApps.buildCommand;
}
