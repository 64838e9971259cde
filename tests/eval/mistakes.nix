# Configurations with a mistake: one complaint each, which names the option and the remedy.
{ outputs }:

let
  inherit (outputs.inputs.nixpkgs) lib;
  inherit (import ./module.nix { inherit outputs; }) complaints;

  # Passes if there is one complaint, and it has all of `fragments`. In a failure the complaints show.
  complaint = arguments: fragments: headgate: {
    expr =
      let
        all = complaints arguments { services = { inherit headgate; }; };
      in
      if lib.length all == 1 && lib.all (fragment: lib.hasInfix fragment (lib.head all)) fragments then
        fragments
      else
        all;
    expected = fragments;
  };
  aarch64 = complaint { };
  x86_64 = complaint { system = "x86_64-linux"; };

  app = {
    component = "/var/empty/thermostat.wasm";
    version = "1.0.0";
    subscribe = [ "plant/#" ];
  };
  withApp = change: { apps.thermostat = app // change; };

  pem = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA==\n-----END PRIVATE KEY-----\n";
  secretInSettings = "holds a secret, which everybody could read in the Nix store.\nPut it into a file on the gateway, name that file in services.headgate.credentials.";
  secretInApp = "install it on the gateway";

  badFilter =
    direction: filter: problem:
    aarch64
      [
        "services.headgate.apps.thermostat.${direction}: \"${lib.substring 0 80 filter}"
        problem
      ]
      (withApp {
        ${direction} = [ filter ];
      });
in
{
  "test: a store's path that systemd would misread" = aarch64 [
    "services.headgate.settings.store.path (/srv/my store)"
    "Begin it with a slash"
  ] { settings.store.path = "/srv/my store"; };

  "test: a store's path that leaves its folder" = aarch64 [
    "services.headgate.settings.store.path (/var/lib/headgate/../x)"
  ] { settings.store.path = "/var/lib/headgate/../x"; };

  "test: a store where nothing stays" = aarch64 [
    "services.headgate.settings.store.path (/tmp/store)"
    "Take a folder of its own"
  ] { settings.store.path = "/tmp/store"; };

  "test: no admin socket" = aarch64 [
    "services.headgate.settings.admin.socket ()"
    "Take a path in /run/headgate"
  ] { settings.admin.socket = null; };

  "test: a TLS certificate that the service can't see" = aarch64 [
    "services.headgate.settings.mqtt.tls.certificate (/home/ada/mqtt.crt)"
    "hand it over through services.headgate.credentials"
  ] { settings.mqtt.tls.certificate = "/home/ada/mqtt.crt"; };

  "test: a credential whose name is a path" = aarch64 [
    "services.headgate.credentials.\"a/b\""
    "Take letters, digits"
  ] { credentials."a/b" = "/var/lib/secrets/x"; };

  "test: a port that does not exist" = aarch64 [
    "services.headgate.settings.mqtt.listen (0.0.0.0:123456789012345678901234567890)"
    "Take one from 1 to 65535"
  ] { settings.mqtt.listen = "0.0.0.0:123456789012345678901234567890"; };

  "test: a secret in camel case" =
    aarch64
      [
        "services.headgate.apps.thermostat.config.accessToken"
        secretInApp
      ]
      (withApp {
        config.accessToken = "abc";
      });

  "test: a password in a URL" =
    aarch64
      [
        "services.headgate.apps.thermostat.config.upstream"
        secretInApp
      ]
      (withApp {
        config.upstream = "mqtts://ada:lovelace@example.org";
      });

  "test: a password that is a number, with a dash in its name" =
    aarch64
      [
        "services.headgate.apps.thermostat.config.db-pass"
        secretInApp
      ]
      (withApp {
        config.db-pass = 1234;
      });

  "test: an app has no component" =
    aarch64
      [
        "services.headgate.apps.thermostat has no component"
        "Set services.headgate.apps.thermostat.package to a folder"
        "or services.headgate.apps.thermostat.component to a .wasm file"
      ]
      (withApp {
        component = null;
      });

  "test: an app's component does not exist" =
    aarch64
      [
        "services.headgate.apps.thermostat.component: "
        "/missing.wasm does not exist"
        "`git add` it"
      ]
      (withApp {
        component = ./missing.wasm;
      });

  "test: an app's package is no package" =
    aarch64
      [
        "services.headgate.apps.thermostat.package: there is no "
        "/tests/eval/manifest.toml"
        "Give a folder"
      ]
      {
        apps.thermostat.package = ./.;
      };

  "test: an app has both a package and a component" =
    aarch64
      [
        "services.headgate.apps.thermostat.package and services.headgate.apps.thermostat.component are both set"
        "Take out"
      ]
      {
        apps.thermostat = {
          package = "/var/empty/thermostat";
          component = "/var/empty/thermostat.wasm";
        };
      };

  "test: an option for the manifest of a package" =
    aarch64
      [
        "services.headgate.apps.thermostat.config is set, but the manifest in services.headgate.apps.thermostat.package is the one that counts"
        "set services.headgate.apps.thermostat.component"
      ]
      {
        apps.thermostat = {
          package = "/var/empty/thermostat";
          config.target = 21;
        };
      };

  "test: two apps of one name" =
    aarch64
      [
        "services.headgate.apps.thermostat and services.headgate.apps.thermostat-2 have the same name, \"thermostat\""
        "Set services.headgate.apps.thermostat-2.name to another"
      ]
      {
        apps.thermostat = app;
        apps.thermostat-2 = app // {
          name = "thermostat";
        };
      };

  "test: an app without a version" =
    aarch64
      [
        "services.headgate.apps.thermostat.version is not set"
        "Write it as in"
      ]
      (withApp {
        version = null;
      });

  "test: an app that subscribes to nothing" =
    aarch64
      [
        "services.headgate.apps.thermostat.subscribe is empty"
        "Name the topics"
      ]
      (withApp {
        subscribe = [ ];
      });

  "test: too many topic filters" =
    aarch64
      [
        "services.headgate.apps.thermostat.publish has 65 topic filters"
        "put some together with + or #"
      ]
      (withApp {
        publish = lib.genList (number: "a/${toString number}") 65;
      });

  "test: an empty topic filter" = badFilter "subscribe" "" "can't be empty";
  "test: # before the last level" = badFilter "subscribe" "plant/#/x" "`#` must be the last level";
  "test: # not alone in its level" = badFilter "publish" "plant/a#" "`#` must be the last level";
  "test: + not alone in its level" = badFilter "publish" "plant/a+/b" "`+` must stand alone";
  "test: a topic filter that is too long" =
    badFilter "subscribe" (lib.strings.replicate 65536 "x")
      "at most 65535 bytes";
  "test: a topic filter of too many levels" =
    badFilter "subscribe" (lib.strings.replicate 200 "a/")
      "at most 200 levels";
  "test: an app with a shared subscription" =
    badFilter "subscribe" "$share/g/plant/#"
      "leave out the first two levels";
  "test: an app that publishes on the gateway's topics" =
    badFilter "publish" "$SYS/load"
      "choose another";

  "test: TLS without a certificate" =
    aarch64
      [
        "services.headgate.settings.mqtt.tls.certificate is not set"
        "path of a PEM file"
      ]
      {
        settings.mqtt.tls = {
          listen = "0.0.0.0:8883";
          key = "/var/lib/secrets/mqtt.key";
        };
      };

  "test: TLS without a key" =
    aarch64
      [
        "services.headgate.settings.mqtt.tls.key is not set"
        "or mqtt.tls.listen to \"off\""
      ]
      {
        settings.mqtt.tls = {
          listen = "0.0.0.0:8883";
          certificate = "/etc/mqtt.crt";
        };
      };

  "test: WebSocket with TLS without a key" =
    aarch64
      [
        "services.headgate.settings.mqtt.tls.key is not set, but mqtt.websocket.tls_listen is \"0.0.0.0:8084\""
        "or mqtt.websocket.tls_listen to \"off\""
      ]
      {
        settings.mqtt.websocket.tls_listen = "0.0.0.0:8084";
        settings.mqtt.tls.certificate = "/etc/mqtt.crt";
      };

  "test: authorities of clients that the service can't see" = aarch64 [
    "services.headgate.settings.mqtt.tls.client_ca (/home/ada/clients.crt)"
  ] { settings.mqtt.tls.client_ca = "/home/ada/clients.crt"; };

  "test: a TLS key in the Nix store" =
    aarch64
      [
        "services.headgate.settings.mqtt.tls.key lies in the Nix store"
        "set services.headgate.credentials.\"mqtt.key\""
      ]
      {
        settings.mqtt.tls = {
          listen = "0.0.0.0:8883";
          certificate = "/etc/mqtt.crt";
          key = "${builtins.toFile "mqtt.key" "not a key"}";
        };
      };

  "test: passwords in the Nix store" =
    aarch64
      [
        "services.headgate.settings.mqtt.auth.password_file lies in the Nix store"
        "such as \"/var/lib/headgate/passwords\""
      ]
      {
        settings.mqtt.auth.password_file = "${builtins.toFile "passwords" "anna:hash"}";
      };

  "test: a key of tokens in the Nix store" =
    aarch64
      [
        "services.headgate.settings.mqtt.auth.jwt_key lies in the Nix store"
        "set services.headgate.credentials.\"jwt.key\""
        "environment.etc.\"headgate/jwt.pem\".source"
      ]
      {
        settings.mqtt.auth.jwt_key = "${builtins.toFile "jwt.key" "not a key"}";
      };

  "test: no listener for clients" = aarch64 [
    "services.headgate.settings.mqtt.listen and the listeners of"
    "such as \"0.0.0.0:1883\""
  ] { settings.mqtt.listen = "off"; };

  "test: a private key in the settings" =
    aarch64
      [
        "services.headgate.settings.mqtt.tls.certificate "
        secretInSettings
      ]
      {
        settings.mqtt.tls.certificate = pem;
      };

  "test: a secret in an app's configuration" =
    aarch64
      [
        "services.headgate.apps.thermostat.config.api_token holds a secret"
        secretInApp
      ]
      (withApp {
        config.api_token = "0b9f1c";
      });

  "test: a private key in an app's configuration" =
    aarch64
      [
        "services.headgate.apps.thermostat.config.greeting holds a secret"
        secretInApp
      ]
      (withApp {
        config.greeting = pem;
      });

  "test: MQTT and metrics on one port" =
    aarch64
      [
        "services.headgate.settings.metrics.listen (127.0.0.1:1883) and services.headgate.settings.mqtt.listen (0.0.0.0:1883)"
        "Give one of them another"
      ]
      {
        settings = {
          mqtt.listen = "0.0.0.0:1883";
          metrics.listen = "127.0.0.1:1883";
        };
      };

  "test: MQTT and MQTT with TLS on one port" =
    aarch64
      [
        "services.headgate.settings.mqtt.listen ([::]:8883) and services.headgate.settings.mqtt.tls.listen (0.0.0.0:8883)"
      ]
      {
        settings.mqtt = {
          listen = "[::]:8883";
          tls = {
            listen = "0.0.0.0:8883";
            certificate = "/etc/mqtt.crt";
            key = "/var/lib/secrets/mqtt.key";
          };
        };
      };

  "test: one port of localhost and of its address" = aarch64 [
    "services.headgate.settings.metrics.listen (localhost:1883) and services.headgate.settings.mqtt.listen (127.0.0.1:1883)"
  ] { settings.metrics.listen = "localhost:1883"; };

  "test: a firewall opened for a listener that is off" = aarch64 [
    "services.headgate.openFirewall.mqttTls has no port to open"
    "Give the listener a port"
  ] { openFirewall.mqttTls = true; };

  "test: a credential in the Nix store" = aarch64 [
    "services.headgate.credentials.\"mqtt.key\" lies in the Nix store"
    "Give a path on the gateway, as a string"
  ] { credentials."mqtt.key" = builtins.toFile "mqtt.key" "not a key"; };

  "test: a credential that is built" =
    aarch64
      [
        "services.headgate.credentials.\"mqtt.key\" lies in the Nix store"
        "Give a path on the gateway, as a string"
      ]
      {
        credentials."mqtt.key" =
          outputs.inputs.nixpkgs.legacyPackages.aarch64-linux.writeText "mqtt.key" "not a key";
      };

  "test: a credential that Nix would copy to the store" = aarch64 [
    "services.headgate.credentials.\"mqtt.key\""
    "Give a path on the gateway, as a string"
  ] { credentials."mqtt.key" = ./mistakes.nix; };

  "test: a credential that nobody provides" =
    aarch64
      [
        "services.headgate.settings.mqtt.tls.key uses the credential \"mqtt.key\""
        "Set services.headgate.credentials.\"mqtt.key\""
      ]
      {
        settings.mqtt.tls = {
          listen = "0.0.0.0:8883";
          certificate = "/etc/mqtt.crt";
          key = "/run/credentials/headgate.service/mqtt.key";
        };
      };

  "test: a key that the gateway does not have" = aarch64 [
    "services.headgate.settings.mqtt.lisen: headgate.toml has no such key"
    "docs/configuration.md"
  ] { settings.mqtt.lisen = "0.0.0.0:1883"; };

  "test: a store whose place depends on where one stands" = aarch64 [
    "services.headgate.settings.store.path (store) is no path that a service can be given"
    "Begin it with a slash"
  ] { settings.store.path = "store"; };

  "test: an admin socket where the service can't write" = aarch64 [
    "services.headgate.settings.admin.socket (/tmp/admin.sock)"
    "Take a path in /run/headgate"
  ] { settings.admin.socket = "/tmp/admin.sock"; };

  "test: a processor of another architecture" = x86_64 [
    "services.headgate.cpu: \"cortex-a72\" is no processor of x86_64-linux"
    "Take one of: generic, x86-64-v2, x86-64-v3"
  ] { cpu = "cortex-a72"; };

  "test: apps compiled by another version" =
    aarch64
      [
        "services.headgate.package is of version 9.9.9"
        "Set both from the same source"
      ]
      (
        withApp { }
        // {
          package = outputs.packages.aarch64-linux.headgate // {
            version = "9.9.9";
          };
        }
      );

  # An unknown key too, but what matters of it is said.
  "test: a password in the settings" = {
    expr = lib.any (lib.hasInfix "services.headgate.settings.mqtt.password ${secretInSettings}") (
      complaints { } { services.headgate.settings.mqtt.password = "hunter2"; }
    );
    expected = true;
  };
}
