# Updates over the air and boot entries: what the modules make of them, and what is said about a mistake.
{ outputs }:

let
  inherit (outputs.inputs.nixpkgs) lib;

  ota = {
    boot.loader.headgate.enable = true;
    services.headgate = {
      ota.enable = true;
      settings.ota = {
        channel = "https://updates.example.org/stable";
        trusted_keys = "plant-1:Ek6nP3k4WlX1CqVYqPTnOqVNV5r3mY4pZ5zl4rQYc3I=";
      };
    };
  };

  image =
    module:
    (outputs.lib.mkGateway {
      modules = [
        outputs.nixosModules.image-uefi
        ota
        module
      ];
    }).config;

  # A NixOS as somebody has it, with Nix.
  machine =
    module:
    (outputs.lib.mkGateway {
      modules = [
        {
          services.headgate.enable = true;
          fileSystems = {
            "/" = {
              device = "/dev/vda2";
              fsType = "ext4";
            };
            "/boot" = {
              device = "/dev/vda1";
              fsType = "vfat";
            };
          };
          system.stateVersion = "26.05";
        }
        ota
        module
      ];
    }).config;

  complaints =
    config: map (assertion: assertion.message) (lib.filter (it: !it.assertion) config.assertions);

  # Passes if there is one complaint, and it has all of `fragments`. In a failure the complaints show.
  complaint = fragments: module: {
    expr =
      let
        all = complaints (machine module);
      in
      if lib.length all == 1 && lib.all (fragment: lib.hasInfix fragment (lib.head all)) fragments then
        fragments
      else
        all;
    expected = fragments;
  };

  ours = lib.filterAttrs (name: _: lib.hasPrefix "headgate-ota" name) gateway.systemd.services;
  gateway = image { };
  withNix = machine { };
in
{
  "test: updates on an image have nothing to complain about, nor on a machine with Nix" = {
    expr = map complaints [
      gateway
      withNix
    ];
    expected = [
      [ ]
      [ ]
    ];
  };

  "test: only a boot that is counted asks for the health of the system" = {
    expr = {
      inherit (ours.headgate-ota-health) requiredBy wantedBy;
      failed = ours.headgate-ota-failed.wantedBy ++ ours.headgate-ota-failed.requiredBy;
      condition = lib.hasInfix "/LoaderBootCountPath-" ours.headgate-ota-failed.unitConfig.ConditionPathExists;
    };
    expected = {
      requiredBy = [ "boot-complete.target" ];
      wantedBy = [ ];
      failed = [ ];
      condition = true;
    };
  };

  "test: what is not healthy in time says why, and restarts the machine" = {
    expr = [
      gateway.systemd.targets.boot-complete.onFailure
      (
        gateway.systemd.targets.boot-complete.unitConfig.JobTimeoutSec
        > gateway.services.headgate.settings.ota.health.deadline_s
      )
      (lib.hasSuffix " ota failed" ours.headgate-ota-failed.serviceConfig.ExecStart)
      ours.headgate-ota-failed.unitConfig.FailureAction
    ];
    expected = [
      [ "headgate-ota-failed.service" ]
      true
      true
      "reboot-force"
    ];
  };

  "test: a check of one's own decides along with those of the module" = {
    expr =
      (image {
        systemd.services.modem-is-up = {
          requiredBy = [ "boot-complete.target" ];
          before = [ "boot-complete.target" ];
        };
      }).systemd.services.modem-is-up.requiredBy;
    expected = [ "boot-complete.target" ];
  };

  "test: a system that panics or hangs uses up its tries" = {
    expr = [
      (lib.intersectLists [ "panic=10" "boot.panic_on_fail" ] gateway.boot.kernelParams)
      gateway.systemd.settings.Manager.RuntimeWatchdogSec
      gateway.systemd.enableEmergencyMode
    ];
    expected = [
      [
        "panic=10"
        "boot.panic_on_fail"
      ]
      "30s"
      false
    ];
  };

  "test: the gateway's service can write neither boot entries nor the store" = {
    expr = [
      gateway.systemd.services.headgate.serviceConfig.ProtectSystem
      gateway.systemd.services.headgate.serviceConfig.ReadWritePaths
      gateway.systemd.services.headgate.serviceConfig.CapabilityBoundingSet
    ];
    expected = [
      "strict"
      [ ]
      ""
    ];
  };

  "test: two of the privileged services can change the system, and only by root's capabilities that it takes" =
    {
      expr = lib.mapAttrs (
        _: service:
        assert service.serviceConfig.NoNewPrivileges && service.serviceConfig.ProtectSystem == "strict";
        lib.elem "CAP_SYS_ADMIN" service.serviceConfig.CapabilityBoundingSet
      ) ours;
      expected = {
        headgate-ota = true;
        headgate-ota-commit = true;
        headgate-ota-failed = false;
        headgate-ota-health = false;
      };
    };

  "test: the gateway asks for an update by a file, which is gone before the update begins" = {
    expr = lib.hasSuffix " ${gateway.systemd.paths.headgate-ota.pathConfig.PathExists}" ours.headgate-ota.serviceConfig.ExecStartPre;
    expected = true;
  };

  "test: one writer of boot entries, for images and for who switches" = {
    expr =
      map
        (
          text:
          lib.all (it: lib.hasInfix it text) [
            "boot install"
            "--tries 3"
            "--loader-conf"
          ]
        )
        [
          gateway.system.build.headgateEsp.buildCommand
          withNix.boot.loader.external.installHook.text
        ];
    expected = [
      true
      true
    ];
  };

  "test: with Nix, updates are registered, and the image's own paths too" = {
    expr = [
      (lib.hasSuffix "/bin/nix-store" withNix.services.headgate.settings.ota.nix_store)
      gateway.services.headgate.settings.ota.nix_store
      (image { nix.enable = true; }).systemd.services.headgate-register.serviceConfig.StandardInput
      (gateway.systemd.services ? headgate-register)
    ];
    expected = [
      true
      ""
      "file:/nix/var/headgate/registration"
      false
    ];
  };

  "test: a release is of the product that its gateways take" = {
    expr = (image { system.image.id = "line-2"; }).services.headgate.settings.ota.product;
    expected = "line-2";
  };

  "test: updates without boot entries that count" =
    complaint
      [
        "services.headgate.ota.enable needs boot entries"
        "Set boot.loader.headgate.enable"
      ]
      {
        boot.loader = {
          headgate.enable = lib.mkForce false;
          systemd-boot.enable = true;
        };
      };

  "test: updates without a gateway" = complaint [
    "services.headgate.enable is not"
    "Set both"
  ] { services.headgate.enable = lib.mkForce false; };

  "test: updates from nowhere" = complaint [
    "services.headgate.settings.ota.channel is not set"
    "URL of the folder with release.json"
  ] { services.headgate.settings.ota.channel = lib.mkForce ""; };

  "test: updates that nobody has signed" = complaint [
    "services.headgate.settings.ota.trusted_keys is not set"
    "headgate release keygen"
  ] { services.headgate.settings.ota.trusted_keys = lib.mkForce ""; };

  "test: updates that Nix would not know of" = complaint [
    "nix.enable is set"
    "services.headgate.settings.ota.nix_store"
  ] { services.headgate.settings.ota.nix_store = ""; };

  "test: a state that systemd can't make a folder for" = complaint [
    "services.headgate.settings.ota.state (/srv/ota)"
    "/var/lib/headgate-ota"
  ] { services.headgate.settings.ota.state = "/srv/ota"; };

  "test: settings of updates that contradict the system" = complaint [
    "services.headgate.settings.ota.root, .esp or .tries"
    "boot.loader.headgate.tries"
  ] { services.headgate.settings.ota.root = "/sysroot"; };

  "test: an EFI system partition that may not be there" = complaint [
    ''fileSystems."/boot".options has nofail''
    "Take it out"
  ] { fileSystems."/boot".options = [ "nofail" ]; };

  "test: an EFI system partition that is mounted when somebody looks" =
    complaint
      [
        "options has noauto, x-systemd.automount"
      ]
      {
        fileSystems."/boot".options = [
          "noauto"
          "x-systemd.automount"
        ];
      };

  "test: an EFI system partition that nobody puts right" = complaint [
    ''fileSystems."/boot".noCheck''
  ] { fileSystems."/boot".noCheck = true; };

  "test: a boot loader that would boot one entry for ever" = complaint [
    "boot.loader.headgate.loaderConf has another `default`"
  ] { boot.loader.headgate.loaderConf = "default nixos-generation-7.conf"; };
}
