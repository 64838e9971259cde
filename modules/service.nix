# The service, its user, its file and its holes in the firewall.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  cfg = config.services.headgate;
  inherit (cfg) settings;

  toTOML = import ./toml.nix { inherit lib; };
  listen = import ./listen.nix { inherit lib; };

  rendered = pkgs.writeText "headgate.toml" (toTOML settings);

  # The gateway's own parser looks at it, so that a mistake fails the build and not the boot.
  checked =
    pkgs.runCommand "headgate.toml"
      {
        nativeBuildInputs = [ cfg.buildPackage ];
        strictDeps = true;
        __structuredAttrs = true;
      }
      ''
        # The files that it names are on the gateway.
        headgate --config ${rendered} config check --no-files
        cp ${rendered} "$out"
      '';

  listeners = lib.filter (address: !listen.isOff address) [
    settings.mqtt.listen
    settings.mqtt.tls.listen
    settings.mqtt.websocket.listen
    settings.mqtt.websocket.tls_listen
    settings.ingest.listen
    settings.ingest.tls_listen
    settings.metrics.listen
  ];
  isPrivileged = address: listen.port address != 0 && listen.port address < 1024;
  hasPrivileged = lib.any isPrivileged listeners;

  # An address that is the machine's own can be listened on once the network has given it.
  needsAddress = lib.any (
    address: !listen.isLoopback address && !listen.isWildcard address
  ) listeners;
  network = if needsAddress then "network-online.target" else "network.target";

  # A store that is elsewhere than in the folder that systemd makes for the service.
  otherStore = lib.optional (
    settings.store.path != null
    && settings.store.path != "/var/lib/headgate"
    && !lib.hasPrefix "/var/lib/headgate/" settings.store.path
  ) settings.store.path;

  # Some app may have GPIO lines, so the service sees their chips. systemd's private /dev has none.
  hasGpio = settings.apps.gpio != "";

  # An empty list renders no line, and so no restriction.
  capabilities = if hasPrivileged then "CAP_NET_BIND_SERVICE" else "";
in
{
  config = lib.mkIf cfg.enable {
    environment.etc."headgate/headgate.toml".source = checked;
    environment.systemPackages = [ cfg.package ];

    networking.firewall.allowedTCPPorts = map listen.port (
      lib.filter (address: !listen.isOff address && listen.port address != 0) (
        lib.optional cfg.openFirewall.mqtt settings.mqtt.listen
        ++ lib.optional cfg.openFirewall.mqttTls settings.mqtt.tls.listen
        ++ lib.optional cfg.openFirewall.mqttWebSocket settings.mqtt.websocket.listen
        ++ lib.optional cfg.openFirewall.mqttWebSocketTls settings.mqtt.websocket.tls_listen
        ++ lib.optional cfg.openFirewall.ingest settings.ingest.listen
        ++ lib.optional cfg.openFirewall.ingestTls settings.ingest.tls_listen
        ++ lib.optional cfg.openFirewall.metrics settings.metrics.listen
      )
    );

    users.users.headgate = {
      isSystemUser = true;
      group = "headgate";
    };
    users.groups = {
      headgate = { };
    }
    // lib.optionalAttrs hasGpio { gpio = { }; };

    services.udev.extraRules = lib.mkIf hasGpio ''
      SUBSYSTEM=="gpio", KERNEL=="gpiochip*", GROUP="gpio", MODE="0660"
    '';

    systemd.tmpfiles.rules = map (path: "d ${path} 0750 headgate headgate -") otherStore;

    systemd.services.headgate = {
      description = "Headgate edge gateway";
      wantedBy = [ "multi-user.target" ];
      wants = lib.optional needsAddress network;
      after = [ network ];
      restartTriggers = [ rendered ];
      # The gateway starts no other program.
      enableDefaultPath = false;

      # Nobody is there to start a gateway that has given up: it goes on trying, ever more slowly.
      unitConfig = {
        StartLimitIntervalSec = 0;
        # Without its disk the store would be begun anew below the mount point.
        RequiresMountsFor = otherStore;
      };

      serviceConfig = {
        Type = "notify";
        NotifyAccess = "main";
        ExecStart = "${lib.getExe cfg.package} --config /etc/headgate/headgate.toml run";
        # Says what is wrong, and fails, if it is refused.
        ExecReload = "${lib.getExe cfg.package} --config /etc/headgate/headgate.toml reload";
        WatchdogSec = "30s";
        Restart = "always";
        RestartSec = "1s";
        RestartSteps = 5;
        RestartMaxDelaySec = "30s";
        TimeoutStartSec = "90s";
        # A shutdown takes at most `shutdown.timeout_ms` and a moment.
        TimeoutStopSec = "${toString (settings.shutdown.timeout_ms / 1000 + 10)}s";

        User = "headgate";
        Group = "headgate";
        SupplementaryGroups = lib.optional hasGpio "gpio";
        StateDirectory = "headgate";
        StateDirectoryMode = "0750";
        ReadWritePaths = otherStore;
        RuntimeDirectory = "headgate";
        RuntimeDirectoryMode = "0750";
        UMask = "0077";

        LoadCredential = lib.mapAttrsToList (name: path: "${name}:${toString path}") cfg.credentials;
        ImportCredential = "headgate.*";

        # Sockets, and as many files again; systemd's own limit is what most other programs get.
        LimitNOFILE = lib.max 65536 (2 * settings.mqtt.max_connections);
        TasksMax = 1024;
        # Of what runs on the machine the gateway is to be killed last, and with a compiler that was
        # killed for its memory the gateway is not.
        OOMScoreAdjust = -500;
        OOMPolicy = "continue";
        LogRateLimitIntervalSec = "30s";
        LogRateLimitBurst = 2000;

        AmbientCapabilities = capabilities;
        CapabilityBoundingSet = capabilities;
        DeviceAllow = if hasGpio then [ "char-gpiochip rw" ] else "";
        DevicePolicy = "closed";
        KeyringMode = "private";
        LockPersonality = true;
        # Compiled apps are mapped executable, which this would refuse.
        MemoryDenyWriteExecute = false;
        NoNewPrivileges = true;
        PrivateDevices = !hasGpio;
        PrivateIPC = true;
        PrivateMounts = true;
        PrivateTmp = true;
        # In a user namespace of its own it could not listen on a port below 1024.
        PrivateUsers = !hasPrivileged;
        ProcSubset = "pid";
        ProtectClock = true;
        ProtectControlGroups = true;
        ProtectHome = true;
        ProtectHostname = true;
        ProtectKernelLogs = true;
        ProtectKernelModules = true;
        ProtectKernelTunables = true;
        ProtectProc = "invisible";
        ProtectSystem = "strict";
        RemoveIPC = true;
        RestrictAddressFamilies = [
          "AF_INET"
          "AF_INET6"
          "AF_UNIX"
        ];
        RestrictNamespaces = true;
        RestrictRealtime = true;
        RestrictSUIDSGID = true;
        SystemCallArchitectures = "native";
        # What is refused fails, as where the kernel refuses it: the compiler's child process asks for
        # less priority and does without.
        SystemCallErrorNumber = "EPERM";
        SystemCallFilter = [
          "@system-service"
          "~@privileged @resources"
        ];
      };
    };
  };
}
