{ pkgs, ... }:

{
  services = {
    headgate = {
      settings.mqtt = {
        listen = "0.0.0.0:1883";
        # Whoever reaches this port may publish and subscribe to all. For passwords, take this out, set
        # auth.password_file = "/var/lib/headgate/passwords", and run `headgate user add NAME`.
        auth.anonymous = "always";
      };
      openFirewall.mqtt = true;
      cpu = "cortex-a53"; # Raspberry Pi 3, and what newer ones can do as well.
      apps.overheat-alarm.package = "${pkgs.headgate-apps}/overheat-alarm";
    };

    # Without this nobody can log in. Put your own public key here.
    openssh = {
      enable = true;
      settings.PasswordAuthentication = false;
    };
  };

  users.users.root.openssh.authorizedKeys.keys = [ ];
}
