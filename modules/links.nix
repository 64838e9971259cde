# Links to other machines: where events are shipped, and where commands come from.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkOption types;

  cfg = config.services.headgate;
  toTOML = import ./toml.nix { inherit lib; };

  rendered = pkgs.writeText "headgate-links.toml" (toTOML {
    link = cfg.links;
  });

  # The gateway's own parser looks at them, so that a mistake fails the build and not the boot.
  checked =
    pkgs.runCommand "headgate-links.toml"
      {
        nativeBuildInputs = [ cfg.buildPackage ];
        strictDeps = true;
        __structuredAttrs = true;
      }
      ''
        touch empty.toml
        HEADGATE_UPLINK_LINKS_FILE=${rendered} headgate --config empty.toml config check
        cp ${rendered} "$out"
      '';
in
{
  options.services.headgate.links = mkOption {
    type = types.listOf (pkgs.formats.toml { }).type;
    default = [ ];
    example = lib.literalExpression ''
      [
        {
          name = "cloud";
          kind = "jetstream";
          servers = [ "tls://nats.example:4222" ];
          credentials_file = "''${config.services.headgate.credentialsDirectory}/cloud.creds";
          ship = [
            {
              topics = [ "plant/#" ];
              stream = "HEADGATE_{gateway}";
            }
          ];
        }
      ]
    '';
    description = ''
      Links to NATS JetStream servers and MQTT brokers: each is a `[[link]]` of {file}`docs/uplink.md`. Logins
      are files: put them into `services.headgate.credentials`. The module sets `uplink.links_file`, unless you do.
    '';
  };

  config = lib.mkIf (cfg.enable && cfg.links != [ ]) {
    services.headgate.settings.uplink.links_file = lib.mkDefault "/etc/headgate/links.toml";
    environment.etc."headgate/links.toml".source = checked;
    systemd.services.headgate.restartTriggers = [ rendered ];
  };
}
