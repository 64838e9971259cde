# What every gateway image has in common: a small system that nobody attends, without interpreters.
{
  config,
  lib,
  modulesPath,
  pkgs,
  ...
}:

let
  interpreters = [
    "guile"
    "lua"
    "nodejs"
    "perl"
    "php"
    "python2"
    "python3"
    "ruby"
  ];
  installed = map lib.getName config.environment.systemPackages;
in
{
  imports = [
    "${modulesPath}/profiles/minimal.nix"
    "${modulesPath}/profiles/perlless.nix"
    ./boot.nix
    ./disk.nix
    ./release.nix
    ./sbom.nix
  ];

  system = {
    image = {
      id = lib.mkDefault "headgate";
      # Weaker than the `mkDefault` of `lib.mkGateway`.
      version = lib.mkOverride 1100 config.services.headgate.package.version;
    };
    stateVersion = lib.mkDefault "26.05";

    # Systems arrive as finished closures; nothing is built, evaluated or switched on the gateway.
    switch.enable = lib.mkDefault false;
    disableInstallerTools = true;

    # Checked against the whole closure when the system is built. bash is not among them: login,
    # NixOS's activation and the start of nftables are shell scripts.
    forbiddenDependenciesRegexes = map (name: "-${name}-") interpreters;
  };
  nix.enable = lib.mkDefault false;

  # The same, as far as evaluation can see it: seconds, not a build, after the mistake.
  assertions = map (name: {
    assertion = !lib.elem name installed;
    message = ''
      environment.systemPackages has ${name}, and a gateway's image carries no interpreters: take it
      out, or run it elsewhere and talk to the gateway over MQTT.
    '';
  }) interpreters;

  boot = {
    initrd.systemd.enable = true;
    tmp.useTmpfs = true;
    # Kept out of the closure: storage that gateways don't have.
    bcache.enable = lib.mkDefault false;
    kexec.enable = lib.mkDefault false;
    supportedFilesystems.zfs = false;
  };
  fonts.fontconfig.enable = lib.mkDefault false;
  hardware.enableRedistributableFirmware = lib.mkDefault false;
  security = {
    sudo.enable = lib.mkDefault false;
    # It would bring the libraries of X11.
    pam.services.su.forwardXAuth = lib.mkForce false;
  };
  i18n = {
    defaultLocale = lib.mkDefault "C.UTF-8";
    # glibc has C.UTF-8 built in; an archive of locales would only be dead weight.
    glibcLocales = lib.mkDefault null;
  };
  programs = {
    bash.completion.enable = lib.mkDefault false;
    nano.enable = lib.mkDefault false;
  };

  # Enough to look around on a serial console. NixOS's own list has archivers, awk and more.
  environment.corePackages = lib.mkForce [
    pkgs.bashInteractive
    pkgs.coreutils
    pkgs.curlMinimal
    pkgs.gnugrep
    pkgs.iproute2
    pkgs.less
    pkgs.procps
    pkgs.stdenv.cc.libc
    pkgs.util-linux
  ];

  systemd = {
    # It downloads containers, and would bring GnuPG.
    services.systemd-importd.enable = false;
    # A gateway with several ports is online as soon as one of them is.
    network.wait-online.anyInterface = true;
  };

  networking = {
    # Weaker than `mkDefault`, which NixOS's tests use for the name of a node.
    hostName = lib.mkOverride 1250 "headgate";
    useNetworkd = true;
    useDHCP = lib.mkDefault true;
    nftables.enable = true;
    firewall.enable = true;
  };

  services = {
    headgate = {
      enable = lib.mkDefault true;
      # Releases of another product are not for this machine.
      settings.ota.product = lib.mkDefault config.system.image.id;
    };
    lvm.enable = lib.mkDefault false;
    resolved.enable = lib.mkDefault true;
    # The journal shares the root partition with the systems to come.
    journald.extraConfig = ''
      SystemMaxUse=64M
    '';
  };

  users = {
    mutableUsers = false;
    # The image as it is has no login; docs/images.md shows how to add one.
    allowNoPasswordLogin = true;
  };
}
