# The images' systems: what is in them, what is not, and what is said about a mistake.
{ outputs }:

let
  inherit (outputs.inputs.nixpkgs) lib;

  gateway =
    {
      image ? outputs.nixosModules.image-uefi,
      hostPlatform ? "aarch64-linux",
    }:
    module:
    (outputs.lib.mkGateway {
      inherit hostPlatform;
      modules = [
        image
        module
      ];
    }).config;
  rpi = {
    image = outputs.nixosModules.image-rpi;
  };

  # The assertions that do not hold.
  complaints =
    config: map (assertion: assertion.message) (lib.filter (it: !it.assertion) config.assertions);
  isAbout =
    fragments: all: lib.length all == 1 && lib.all (it: lib.hasInfix it (lib.head all)) fragments;

  uefi = gateway { } { };

  flake = (import ../../templates/default/flake.nix).outputs { headgate = outputs; };
in
{
  "test: an image has nothing to complain about" = {
    expr = map complaints [
      uefi
      (gateway rpi { })
      (gateway { hostPlatform = "x86_64-linux"; } { })
    ];
    expected = [
      [ ]
      [ ]
      [ ]
    ];
  };

  "test: what is installed in an image is little" = {
    expr = lib.unique (lib.sort lib.lessThan (map lib.getName uefi.environment.systemPackages));
    expected = [
      "bash-interactive"
      "coreutils"
      "curl"
      "dbus"
      "dbus-broker"
      "dosfstools"
      "e2fsprogs"
      "glibc"
      "gnugrep"
      "headgate"
      "iproute2"
      "kbd"
      "kmod"
      "less"
      "linux-pam"
      "mtools"
      "nftables"
      "nixos-firewall-tool"
      "procps"
      "shadow"
      "systemd"
      "util-linux"
    ];
  };

  "test: Nix, its tools, documentation and locales are not in an image" = {
    expr = [
      uefi.nix.enable
      uefi.system.switch.enable
      uefi.documentation.enable
      (uefi.i18n.glibcLocales != null)
    ];
    expected = [
      false
      false
      false
      false
    ];
  };

  "test: an interpreter in an image is named" = {
    expr = isAbout [ "environment.systemPackages has python3" ] (
      complaints (
        gateway { } (
          { pkgs, ... }:
          {
            environment.systemPackages = [ pkgs.python3 ];
          }
        )
      )
    );
    expected = true;
  };

  "test: an interpreter deeper in the closure fails the build" = {
    expr =
      map
        (
          path:
          lib.any (regex: builtins.match ".*${regex}.*" path != null) uefi.system.forbiddenDependenciesRegexes
        )
        [
          "/nix/store/0000000000000000000000000000000a-perl-5.42.0"
          "/nix/store/0000000000000000000000000000000a-python3-aarch64-unknown-linux-gnu-3.13.1"
          "/nix/store/0000000000000000000000000000000a-lua-5.4.7"
          "/nix/store/0000000000000000000000000000000a-headgate-0.1.0"
          "/nix/store/0000000000000000000000000000000a-bash-5.3"
        ];
    expected = [
      true
      true
      true
      false
      false
    ];
  };

  "test: the Raspberry Pi's image for another processor is refused with the remedy" = {
    expr = isAbout [
      "images/rpi.nix is for the 64-bit Raspberry Pi"
      "x86_64-linux"
      "use images/uefi.nix"
    ] (complaints (gateway (rpi // { hostPlatform = "x86_64-linux"; }) { }));
    expected = true;
  };

  "test: a boot touches no partition but that of the data" = {
    expr = lib.mapAttrs (_: partition: partition.Label) uefi.systemd.repart.partitions;
    expected = {
      "30-data" = "headgate-data";
    };
  };

  "test: the service never runs without its data partition" = {
    # systemd makes a service require the mount of its StateDirectory=.
    expr = [
      uefi.fileSystems."/var/lib/headgate".device
      uefi.systemd.services.headgate.serviceConfig.StateDirectory
    ];
    expected = [
      "/dev/disk/by-partlabel/headgate-data"
      "headgate"
    ];
  };

  "test: the template is a gateway without complaints, and its image a derivation" = {
    expr = [
      (complaints flake.nixosConfigurations.gateway.config)
      (lib.isDerivation flake.packages.x86_64-linux.default)
    ];
    expected = [
      [ ]
      true
    ];
  };
}
