# What an address as `host:port` says.
{ lib }:

rec {
  isOff = address: address == "off" || address == "";

  host = address: lib.head (builtins.match "(.*):[0-9]+" address);

  port = address: lib.toIntBase10 (lib.head (builtins.match ".*:([0-9]+)" address));

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
    !isOff one
    && !isOff other
    && port one != 0
    && port one == port other
    && (host one == host other || isWildcard one || isWildcard other);
}
