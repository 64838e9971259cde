# What an address as `host:port` says.
{ lib }:

rec {
  isOff = address: address == "off" || address == "";

  host = address: lib.head (builtins.match "(.*):[0-9]+" address);

  # One that is longer than any port is none, and Nix can't count that far.
  port =
    address:
    let
      digits = lib.head (builtins.match ".*:([0-9]+)" address);
    in
    if lib.stringLength digits > 5 then 65536 else lib.toIntBase10 digits;

  isWildcard =
    address:
    lib.elem (host address) [
      "0.0.0.0"
      "[::]"
    ];

  isLoopback =
    address:
    host address == "localhost" || host address == "[::1]" || lib.hasPrefix "127." (host address);

  # Port 0 takes a port that is free.
  clash =
    one: other:
    let
      isV6 = address: lib.hasPrefix "[" address;
      # The wildcard of IPv6 takes IPv4's connections too.
      covers =
        one: other:
        host one == "[::]"
        || host one == "0.0.0.0" && !isV6 other
        || host one == "localhost" && isLoopback other;
    in
    !isOff one
    && !isOff other
    && port one != 0
    && port one == port other
    && (host one == host other || covers one other || covers other one);
}
