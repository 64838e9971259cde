# `boot.loader.headgate`: systemd-boot with entries that Headgate writes, the same code for images, for
# `nixos-rebuild boot` and for updates over the air. Each new system has a number of tries; one that is
# never declared good is left for the one before.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkOption types;

  cfg = config.boot.loader.headgate;
  inherit (config.boot.loader) timeout;
  esp = config.boot.loader.efi.efiSysMountPoint;
  inherit (config.system.image) version;

  arguments = [
    "--tries"
    (toString cfg.tries)
    "--systemd-boot"
    "${config.systemd.package}/lib/systemd/boot/efi/systemd-boot${pkgs.stdenv.hostPlatform.efiArch}.efi"
    "--efi-arch"
    pkgs.stdenv.hostPlatform.efiArch
    "--loader-conf"
    (pkgs.writeText "loader.conf" cfg.loaderConf)
  ]
  ++ lib.optionals (version != null) [
    "--version"
    version
  ];

  fileSystem = config.fileSystems.${esp} or null;
  badOptions = lib.intersectLists fileSystem.options [
    "noauto"
    "nofail"
    "ro"
    "x-systemd.automount"
  ];
in
{
  options.boot.loader.headgate = {
    enable = lib.mkEnableOption "systemd-boot with entries that Headgate writes, and that count their tries";

    tries = mkOption {
      type = types.ints.between 1 9;
      default = 3;
      description = ''
        How often a new system may be booted before the boot loader goes back to the one before. What
        reaches `boot-complete.target` is declared good, and not counted any more; see
        [Automatic Boot Assessment](https://systemd.io/AUTOMATIC_BOOT_ASSESSMENT/).
      '';
    };

    loaderConf = mkOption {
      type = types.lines;
      description = ''
        {file}`loader.conf` of systemd-boot. The module sets the timeout, `editor no`, and as the default a
        pattern: a default that names one entry would be booted when that is bad, too.
      '';
    };

    arguments = mkOption {
      type = types.listOf types.str;
      readOnly = true;
      internal = true;
      default = map toString arguments;
      description = "What `headgate boot install` is called with, for images.";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = fileSystem == null || badOptions == [ ];
        message = ''
          fileSystems."${esp}".options has ${lib.concatStringsSep ", " badOptions}, and what writes boot entries and
          declares a boot good must find the EFI system partition. Take it out, or set
          boot.loader.efi.efiSysMountPoint to where the partition is mounted.'';
      }
      {
        assertion = fileSystem == null || !fileSystem.noCheck;
        message = ''fileSystems."${esp}".noCheck is set, but after a power cut only fsck.fat puts a FAT right. Take it out.'';
      }
      {
        assertion =
          !lib.any (
            line: builtins.match "[[:space:]]*default[[:space:]].*" line != null && line != "default headgate-*"
          ) (lib.splitString "\n" cfg.loaderConf);
        message = ''
          boot.loader.headgate.loaderConf has another `default` than headgate-*, by which a bad system would never be
          left. Take that line out.'';
      }
    ];

    boot = {
      loader = {
        # It is not asked for an entry: the firmware finds systemd-boot by the name that removable disks have.
        efi.canTouchEfiVariables = lib.mkDefault false;
        grub.enable = false;
        systemd-boot.enable = false;

        headgate.loaderConf = ''
          timeout ${if timeout == null then "menu-force" else toString timeout}
          default headgate-*
          editor no
        '';

        external = {
          enable = true;
          installHook = pkgs.writeShellScript "headgate-boot-install" ''
            exec ${lib.getExe config.services.headgate.package} boot install \
              --esp ${lib.escapeShellArg esp} ${lib.escapeShellArgs cfg.arguments} "$1"
          '';
        };
      };
      # Tries are used up by boots only: a system that can't go on has to start again, also one that has not
      # come further than its initrd.
      kernelParams = [
        "panic=10"
        "boot.panic_on_fail"
      ];
    };

    # systemd-boot starts the kernel as a program of the firmware.
    system.requiredKernelConfig = [ (config.lib.kernelConfig.isYes "EFI_STUB") ];

    systemd = {
      # An emergency shell waits for somebody at a keyboard.
      enableEmergencyMode = lib.mkDefault false;
      # A system that hangs is reset by the board's own watchdog, where it has one.
      settings.Manager = {
        RuntimeWatchdogSec = lib.mkDefault "30s";
        RebootWatchdogSec = lib.mkDefault "2min";
      };
    };
  };
}
