# What a gateway is to be updated from: a binary cache of the system's closure and a description of
# the release. Nothing here is signed: that takes a key, which no build has.
{
  config,
  pkgs,
  ...
}:

let
  inherit (config.system.build) toplevel;
  inherit (config.system.image) id version;

  description = pkgs.writeText "release.json" (
    builtins.toJSON {
      schema = 1;
      product = id;
      inherit version;
      inherit (pkgs.stdenv.hostPlatform) system;
      toplevel = "${toplevel}";
    }
  );
in
{
  system.build.headgateRelease =
    (pkgs.buildPackages.mkBinaryCache {
      name = "${id}-release-${version}";
      rootPaths = [ toplevel ];
      compression = "zstd";
    }).overrideAttrs
      (previous: {
        buildCommand = previous.buildCommand + ''
          install -m 0644 ${description} "$out/release.json"
        '';
      });
}
