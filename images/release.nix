# What a gateway is to be updated from: a binary cache of the system's closure and a description of
# the release. `headgate release sign` makes a channel of it: it adds the time, and signs the description and
# each store path. That takes a key, which no build has.
{
  config,
  pkgs,
  ...
}:

let
  inherit (config.system.build) toplevel;
  inherit (config.system.image) version;
  inherit (config.services.headgate.settings.ota) product;

  description = pkgs.writeText "release.json" (
    builtins.toJSON {
      schema = 1;
      inherit product version;
      inherit (pkgs.stdenv.hostPlatform) system;
      toplevel = "${toplevel}";
    }
  );
in
{
  system.build.headgateRelease =
    (pkgs.buildPackages.mkBinaryCache {
      name = "${product}-release-${version}";
      rootPaths = [ toplevel ];
      compression = "zstd";
    }).overrideAttrs
      (previous: {
        buildCommand = previous.buildCommand + ''
          install -m 0644 ${description} "$out/release.json"
        '';
      });
}
