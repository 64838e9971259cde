# A gateway with a declared app, as the tests here want it: every file but this one is a test.
{ pkgs, ... }:

let
  # These tests share one package set, which can't be given the flake's overlay.
  apps = pkgs.headgate-apps or (pkgs.callPackage ../../apps/package.nix { });
in
{
  services.headgate = {
    enable = true;
    settings.mqtt = {
      listen = "0.0.0.0:1883";
      auth.anonymous = "always";
    };
    openFirewall.mqtt = true;
    apps.overheat-alarm.package = "${apps}/overheat-alarm";
  };

  environment.systemPackages = [
    pkgs.jq
    pkgs.mosquitto
  ];
}
