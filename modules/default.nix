# `services.headgate`: the gateway as a service of NixOS. It has no opinion on disks, SSH or overlays.
{
  imports = [
    ./options.nix
    ./apps.nix
    ./mappings.nix
    ./rules.nix
    ./service.nix
    ./assertions.nix
  ];
}
