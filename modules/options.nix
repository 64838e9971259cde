# What can be said about the gateway; apps.nix has what can be said about apps.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib)
    literalExpression
    mkEnableOption
    mkOption
    types
    ;

  cfg = config.services.headgate;
  schema = import ./schema.nix { inherit lib; };

  openFirewall =
    _: key:
    mkOption {
      type = types.bool;
      default = false;
      description = "Whether to open the port of {option}`services.headgate.settings.${key}` in the firewall.";
    };
in
{
  options.services.headgate = {
    enable = mkEnableOption "Headgate, an edge gateway with an MQTT broker and WebAssembly apps";

    # NixOS' VM tests have a package set that can't be given overlays: the module makes do without.
    package = mkOption {
      type = types.package;
      default = (pkgs.headgate or (pkgs.callPackage ../package.nix { })).override { compiler = false; };
      defaultText = literalExpression "pkgs.headgate.override { compiler = false; }";
      description = ''
        The package that runs on the gateway. The default has no compiler: it runs the apps in
        {option}`services.headgate.apps`, which are compiled while the system is built, and no
        others. With `pkgs.headgate`, `headgate app install` takes any component.
      '';
    };

    buildPackage = mkOption {
      type = types.package;
      default = pkgs.buildPackages.headgate or (pkgs.buildPackages.callPackage ../package.nix { });
      defaultText = literalExpression "pkgs.buildPackages.headgate";
      description = ''
        The package that runs while the system is built, where it checks the configuration and
        compiles apps. It must be of the same version as {option}`services.headgate.package`.
      '';
    };

    settings = mkOption {
      type = types.submodule {
        # Without it the module system would reject an unknown key before assertions.nix can say that
        # a secret belongs elsewhere.
        freeformType = types.toml;
        options = schema.optionsOf (lib.importJSON ./settings.schema.json);
      };
      default = { };
      example = literalExpression ''
        {
          mqtt.listen = "0.0.0.0:1883";
          mqtt.max_packet_bytes = "256KiB";
        }
      '';
      description = ''
        What stands in {file}`headgate.toml`. While the system is
        built, `headgate config check` looks at the result.

        The module sets `apps.preinstalled` to what it makes of {option}`services.headgate.apps`, and
        `admin.socket`, unless you do, to {file}`/run/headgate/admin.sock`. The store is in
        {file}`/var/lib/headgate`, unless you set `store.path`.

        Everybody can read the Nix store, so secrets do not belong here; see
        {option}`services.headgate.credentials`.
      '';
    };

    credentials = mkOption {
      type = types.attrsOf types.path;
      default = { };
      example = {
        "mqtt.key" = "/var/lib/secrets/mqtt.key";
      };
      description = ''
        Files with secrets, by name. systemd hands them to the service, which need not be allowed to
        read them where they lie, in {option}`services.headgate.credentialsDirectory`. Credentials of
        the machine ({manpage}`systemd.exec(5)`, `ImportCredential=`) whose names start with
        `headgate.` are there too.
      '';
    };

    credentialsDirectory = mkOption {
      type = types.str;
      default = "/run/credentials/headgate.service";
      readOnly = true;
      description = "Where the service finds its credentials; for use in {option}`services.headgate.settings`.";
    };

    openFirewall = lib.mapAttrs openFirewall {
      mqtt = "mqtt.listen";
      mqttTls = "mqtt.tls.listen";
      mqttWebSocket = "mqtt.websocket.listen";
      mqttWebSocketTls = "mqtt.websocket.tls_listen";
      ingest = "ingest.listen";
      ingestTls = "ingest.tls_listen";
      metrics = "metrics.listen";
    };
  };

  # The command line finds the service by this key: it has no $RUNTIME_DIRECTORY to go by.
  config.services.headgate.settings.admin.socket = lib.mkIf cfg.enable (
    lib.mkDefault "/run/headgate/admin.sock"
  );
}
