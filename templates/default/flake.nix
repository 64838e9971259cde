{
  inputs.headgate.url = "github:OWNER/headgate";
  outputs =
    { headgate, ... }:
    let
      gateway = headgate.lib.mkGateway {
        modules = [
          headgate.nixosModules.image-rpi # or image-uefi, and below `image` instead of `sdImage`
          ./gateway.nix
        ];
      };
    in
    {
      nixosConfigurations = { inherit gateway; };
      packages.x86_64-linux.default = gateway.config.system.build.sdImage;
    };
}
