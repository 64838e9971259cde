# What the images of this flake run, as they have no other configuration: the sample apps, and MQTT
# for everybody on the network. An image of one's own comes from templates/default instead.
{ pkgs, ... }:

{
  services.headgate = {
    settings.mqtt = {
      listen = "0.0.0.0:1883";
      auth.anonymous = "always";
    };
    openFirewall.mqtt = true;
    apps = {
      overheat-alarm.package = "${pkgs.headgate-apps}/overheat-alarm";
      unit-convert.package = "${pkgs.headgate-apps}/unit-convert";
    };
  };
}
