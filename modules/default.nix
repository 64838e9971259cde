# `services.headgate`: the gateway as a service of NixOS, with updates of the system that it is part of, and
# the boot entries that these take. It has no opinion on disks, SSH or overlays.
{
  imports = [
    ./options.nix
    ./apps.nix
    ./boot-loader.nix
    ./mappings.nix
    ./ota.nix
    ./links.nix
    ./rules.nix
    ./service.nix
    ./assertions.nix
  ];
}
