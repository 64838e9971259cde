# `services.headgate.ota`: updates of the whole system over the air. A new system boots on probation; if it
# is not healthy in time it is left again.
#
# The gateway's own service has no privileges and can only ask, by a file; what acts are the units here,
# which do what is signed by a trusted key and nothing else.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkOption types;

  cfg = config.services.headgate;
  inherit (cfg.settings) ota;
  esp = config.boot.loader.efi.efiSysMountPoint;

  headgate = "${lib.getExe cfg.package} --config /etc/headgate/headgate.toml";
  request = "${dirOf cfg.settings.admin.socket}/ota-requested";
  counted = "/sys/firmware/efi/efivars/LoaderBootCountPath-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";

  # All of these run as root, without most of what root can do.
  confined = {
    Type = "oneshot";
    StateDirectory = lib.removePrefix "/var/lib/" ota.state;
    StateDirectoryMode = "0755";
    UMask = "0022";

    # The gateway's socket belongs to the gateway's user.
    CapabilityBoundingSet = [ "CAP_DAC_OVERRIDE" ];
    KeyringMode = "private";
    LockPersonality = true;
    MemoryDenyWriteExecute = true;
    NoNewPrivileges = true;
    PrivateDevices = true;
    PrivateIPC = true;
    PrivateMounts = true;
    PrivateTmp = true;
    ProtectClock = true;
    ProtectControlGroups = true;
    ProtectHome = true;
    ProtectHostname = true;
    ProtectKernelLogs = true;
    ProtectKernelModules = true;
    ProtectKernelTunables = true;
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
    SystemCallErrorNumber = "EPERM";
    SystemCallFilter = [ "@system-service" ];
  };

  # Two of them write the store and boot entries, and restart the machine.
  changing = confined // {
    CapabilityBoundingSet = [
      "CAP_CHOWN"
      "CAP_DAC_OVERRIDE"
      "CAP_FOWNER"
      # To mount the store.
      "CAP_SYS_ADMIN"
      # systemd asks for it before it restarts the machine.
      "CAP_SYS_BOOT"
    ];
    # NixOS mounts the store read-only on top of itself: they have it otherwise in a mount namespace of their
    # own, as Nix does.
    RestrictNamespaces = [ "mnt" ];
    # A path that is not there is told by the program itself, which says what to do.
    ReadWritePaths = [
      "-${esp}"
      "/nix"
      "-/run/headgate"
    ];
    SystemCallFilter = [
      "@system-service"
      "@mount"
    ];
    # Events come first.
    CPUWeight = "idle";
    IOSchedulingClass = "idle";
    Nice = 10;
  };

  unit = {
    enableDefaultPath = false;
    # A switch to another system must not end what is under way.
    restartIfChanged = false;
  };

  option = path: "services.headgate.${path}";
in
{
  options.services.headgate.ota = {
    enable = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether the whole system is updated over the air, from the channel in
        {option}`services.headgate.settings.ota.channel`. A new system boots on probation, and is left again if
        it is not healthy.
      '';
    };

    timerConfig = mkOption {
      type = types.attrsOf (
        types.oneOf [
          types.bool
          types.int
          types.str
        ]
      );
      default = {
        OnCalendar = "*:0/15";
        RandomizedDelaySec = "14min";
        FixedRandomDelay = true;
      };
      description = ''
        When to look for updates, and whether it is time to restart into one; see {manpage}`systemd.timer(5)`.
        It must be more often than the shortest window of {option}`services.headgate.settings.ota.window` lasts.
      '';
    };
  };

  config = lib.mkIf cfg.ota.enable {
    assertions = [
      {
        assertion = cfg.enable;
        message = "${option "ota.enable"} is set, but ${option "enable"} is not: there is no gateway to update. Set both.";
      }
      {
        assertion = config.boot.loader.headgate.enable;
        message = ''
          ${option "ota.enable"} needs boot entries that count their tries, or a bad update would stay.
          Set boot.loader.headgate.enable, which takes the place of other boot loaders.'';
      }
      {
        assertion = ota.channel != "";
        message = "${option "settings.ota.channel"} is not set. Set it to the URL of the folder with release.json.";
      }
      {
        assertion = ota.trusted_keys != "";
        message = ''
          ${option "settings.ota.trusted_keys"} is not set, so no update would ever be taken. Set it to what
          `headgate release keygen` prints as the public key.'';
      }
      {
        assertion = config.nix.enable -> ota.nix_store != "";
        message = ''
          nix.enable is set, and Nix would remove store paths that it does not know. Leave
          ${option "settings.ota.nix_store"} as it is, so that updates are registered, or set nix.enable = false.'';
      }
      {
        assertion = builtins.match "/var/lib/[A-Za-z0-9._-]+" ota.state != null;
        message = ''
          ${option "settings.ota.state"} (${ota.state}) is no folder that systemd can make for the service.
          Take one right below /var/lib, such as /var/lib/headgate-ota.'';
      }
      {
        assertion = ota.root == "/" && ota.esp == esp && ota.tries == config.boot.loader.headgate.tries;
        message = ''
          ${option "settings.ota.root"}, .esp or .tries say other than the system that they are part of. Leave them as they
          are, and set boot.loader.efi.efiSysMountPoint and boot.loader.headgate.tries.'';
      }
    ];

    services.headgate.settings.ota = {
      inherit esp;
      inherit (config.boot.loader.headgate) tries;
      nix_store = lib.mkIf config.nix.enable (lib.mkDefault (lib.getExe' config.nix.package "nix-store"));
    };

    systemd = {
      # Asked for by the gateway, on behalf of whoever may use its socket.
      paths.headgate-ota = {
        wantedBy = [ "paths.target" ];
        pathConfig.PathExists = request;
      };
      timers.headgate-ota = {
        wantedBy = [ "timers.target" ];
        inherit (cfg.ota) timerConfig;
      };
      services.headgate-ota = unit // {
        description = "Update of the gateway's system";
        wants = [ "network-online.target" ];
        # Not while a boot is still on probation.
        after = [
          "boot-complete.target"
          "headgate-ota-commit.service"
          "headgate.service"
          "network-online.target"
        ];
        path = [ config.systemd.package ];
        serviceConfig = changing // {
          ExecStartPre = "${lib.getExe' pkgs.coreutils "rm"} -f ${request}";
          ExecStart = "${headgate} ota update";
        };
      };

      # Only boots that are counted ask for this target: systemd-bless-boot.service does, which declares the
      # system good. What must be well before that is required by the target.
      targets.boot-complete = {
        onFailure = [ "headgate-ota-failed.service" ];
        unitConfig = {
          # From when the boot begins; also what never ends counts as a failure then.
          JobTimeoutSec = ota.health.deadline_s + 300;
        };
      };
      services.headgate-ota-health = unit // {
        description = "Health of the gateway's new system";
        requiredBy = [ "boot-complete.target" ];
        before = [ "boot-complete.target" ];
        after = [ "headgate.service" ];
        path = [ config.systemd.package ];
        serviceConfig = confined // {
          ExecStart = "${headgate} ota health";
          RemainAfterExit = true;
          # It says by itself what is missing, before that.
          TimeoutStartSec = ota.health.deadline_s + 60;
        };
      };
      services.headgate-ota-failed = unit // {
        description = "Another try of a system that is not healthy";
        path = [ config.systemd.package ];
        unitConfig = {
          # Nothing that the bad system has or lacks keeps it from being left.
          DefaultDependencies = false;
          # Whatever else starts the target restarts nothing.
          ConditionPathExists = counted;
          FailureAction = "reboot-force";
        };
        serviceConfig = confined // {
          ExecStart = "${headgate} ota failed";
          CapabilityBoundingSet = confined.CapabilityBoundingSet ++ [ "CAP_SYS_BOOT" ];
          TimeoutStartSec = 90;
        };
      };

      services.headgate-ota-commit = unit // {
        description = "What follows once the gateway's new system is good";
        wantedBy = [ "multi-user.target" ];
        after = [
          "headgate.service"
          "systemd-bless-boot.service"
        ];
        path = [ config.systemd.package ];
        serviceConfig = changing // {
          ExecStart = "${headgate} ota commit";
          RemainAfterExit = true;
        };
      };
    };
  };
}
