# What the module makes of configurations that are right.
{ outputs }:

let
  inherit (outputs.inputs.nixpkgs) lib;
  inherit (import ./module.nix { inherit outputs; }) complaints evaluate;
  toTOML = import ../../modules/toml.nix { inherit lib; };

  everything = evaluate { } ./everything.nix;
  service = config: config.systemd.services.headgate.serviceConfig;
  tomlOf = config: toTOML config.services.headgate.settings;
  linesOf = text: lib.splitString "\n" text;
  hasLines = wanted: text: {
    expr = lib.intersectLists wanted (linesOf text);
    expected = wanted;
  };
in
{
  "test: a gateway that only says enable is well" = {
    expr = complaints { } { };
    expected = [ ];
  };

  "test: on x86_64, too" = {
    expr = complaints { system = "x86_64-linux"; } { services.headgate.cpu = "x86-64-v3"; };
    expected = [ ];
  };

  "test: a gateway that sets everything is well" = {
    expr = complaints { } ./everything.nix ++ everything.warnings;
    expected = [ ];
  };

  "test: everything is everything" =
    let
      schema = lib.importJSON ../../modules/settings.schema.json;
      same =
        table: settings:
        lib.concatLists (
          lib.mapAttrsToList (
            key: of:
            if of.type or null == "object" then
              map (path: "${key}.${path}") (same of settings.${key})
            else
              lib.optional (settings.${key} == of.default or null) key
          ) table.properties
        );
    in
    {
      expr = same schema everything.services.headgate.settings;
      expected = [ ];
    };

  "test: mappings are a folder that the gateway is told of, with a file for each" =
    let
      with' = mappings: (evaluate { } { services.headgate = { inherit mappings; }; }).services.headgate;
      some = with' {
        pump = ./everything.nix;
        line-2.stream_processor.mode = "timeseries";
      };
    in
    {
      expr = {
        folder = some.settings.mappings.preinstalled == "${some.checkedMappings}";
        files = lib.attrNames some.checkedMappings.files;
        without = (with' { }).settings.mappings.preinstalled;
      };
      expected = {
        folder = true;
        files = [
          "line-2.yaml"
          "pump.yaml"
        ];
        without = "";
      };
    };

  "test: rules are a file that the gateway is told of" =
    let
      config = evaluate { } { services.headgate.rules = [ { topics = [ "alarms/#" ]; } ]; };
    in
    {
      expr = {
        file = config.services.headgate.settings.pipeline.rules_file;
        made = config.environment.etc ? "headgate/rules.toml";
        without = (evaluate { } { }).services.headgate.settings.pipeline.rules_file;
      };
      expected = {
        file = "/etc/headgate/rules.toml";
        made = true;
        without = "";
      };
    };

  "test: links are a file that the gateway is told of" =
    let
      link = {
        name = "cloud";
        kind = "jetstream";
        servers = [ "nats://nats.example:4222" ];
        ship = [
          {
            topics = [ "plant/#" ];
            stream = "HEADGATE_{gateway}";
          }
        ];
      };
      config = evaluate { } { services.headgate.links = [ link ]; };
    in
    {
      expr = {
        file = config.services.headgate.settings.uplink.links_file;
        made = config.environment.etc ? "headgate/links.toml";
        without = (evaluate { } { }).services.headgate.settings.uplink.links_file;
      };
      expected = {
        file = "/etc/headgate/links.toml";
        made = true;
        without = "";
      };
    };

  "test: keys that are null are left out" = {
    expr = lib.filter (lib.hasInfix "null") (linesOf (tomlOf (evaluate { } { })));
    expected = [ ];
  };

  "test: the settings as TOML" = hasLines [
    ''log.level = "info,headgate::broker=debug"''
    ''metrics.listen = "192.0.2.1:9464"''
    ''mqtt.tls.key = "/run/credentials/headgate.service/mqtt.key"''
    "pipeline.batch.max_events = 32"
    "store.max_bytes = 2147483648"
  ] (tomlOf everything);

  "test: the manifest as TOML" = {
    expr = everything.services.headgate.apps.line-2.manifest;
    expected = ''
      capabilities = ["gpio","sensors"]
      config."a key.with dots" = "text\nof two lines"
      config.hysteresis = 5
      config.threshold = 90.5
      config.verbose = true
      description = "Watches \"line 2\", C:\\temp and ünïcode"
      gpio = [{active_low = true, chip = "gpiochip0", direction = "input", line = 17, name = "door"},{chip = "gpiochip0", direction = "output", line = "LAMP", name = "lamp"}]
      limits.batch_deadline_ms = 20
      limits.instances = 4
      limits.kv_bytes = 65536
      limits.kv_per_batch = 2
      limits.log_per_batch = 1
      limits.memory_pages = 64
      limits.publish_per_batch = 0
      limits.queue_events = 10
      limits.queue_full = "drop-oldest"
      limits.table_elements = 1000
      limits.timers = 3
      limits.weight = 50
      name = "overheat-alarm-2"
      placement = "singleton"
      publish = ["alarms/#"]
      recycle.max_failures = 10
      recycle.max_uses = 1000
      restart.first_pause_ms = 50
      restart.longest_pause_ms = 1000
      restart.most_failures = 5
      restart.retries = 2
      restart.window_s = 30
      sensor = [{channel = "temp1_input", device = "cpu_thermal", name = "cpu"}]
      state_version = 2
      subscribe = ["plant/line2/+","#"]
      upgrade.trial_batches = 5
      version = "1.2.3-rc.1"
    '';
  };

  "test: only a gateway with GPIO lines sees their chips" =
    let
      access =
        config:
        let
          unit = service config;
        in
        {
          inherit (unit) DeviceAllow PrivateDevices SupplementaryGroups;
          hasGroup = config.users.groups ? gpio;
        };
    in
    {
      expr = map access [
        (evaluate { } { })
        everything
      ];
      expected = [
        {
          DeviceAllow = "";
          PrivateDevices = true;
          SupplementaryGroups = [ ];
          hasGroup = false;
        }
        {
          DeviceAllow = [ "char-gpiochip rw" ];
          PrivateDevices = false;
          SupplementaryGroups = [ "gpio" ];
          hasGroup = true;
        }
      ];
    };

  "test: the command line finds the service" = hasLines [
    ''admin.socket = "/run/headgate/admin.sock"''
  ] (tomlOf (evaluate { } { }));

  "test: apps are compiled for the gateway, by the build machine" = {
    expr = map (lib.replaceStrings [ "${outputs.packages.aarch64-linux.headgate-apps}" ] [ "APPS" ]) (
      lib.filter (lib.hasInfix "--name overheat-alarm ") (
        linesOf everything.services.headgate.compiledApps.buildCommand
      )
    );
    expected = [
      ''headgate app compile APPS/overheat-alarm --name overheat-alarm --target aarch64-unknown-linux-gnu --cpu cortex-a53 --output "$out"/overheat-alarm''
    ];
  };

  "test: an app that is not enabled is not there" = {
    expr = lib.hasInfix "--name off" everything.services.headgate.compiledApps.buildCommand;
    expected = false;
  };

  "test: without apps nothing is compiled" = {
    expr = (evaluate { } { }).services.headgate.settings.apps.preinstalled;
    expected = "";
  };

  "test: secrets come as credentials" = {
    expr = (service everything).LoadCredential;
    expected = [ "mqtt.key:/var/lib/secrets/mqtt.key" ];
  };

  "test: a credential of the machine needs no declaration" = {
    expr = complaints { } {
      services.headgate.settings.mqtt.tls.key = "/run/credentials/headgate.service/headgate.mqtt-key";
    };
    expected = [ ];
  };

  "test: the path of a token is no secret" = {
    expr = complaints { } {
      services.headgate.apps.a = {
        component = "/var/empty/a.wasm";
        version = "1.0.0";
        subscribe = [ "a" ];
        config = {
          token = "/run/secrets/token";
          token_topic = "tokens";
          secret = "";
        };
      };
    };
    expected = [ ];
  };

  "test: the firewall stays closed" = {
    expr =
      (evaluate { } { services.headgate.settings.mqtt.listen = "0.0.0.0:1883"; })
      .networking.firewall.allowedTCPPorts;
    expected = [ ];
  };

  "test: the firewall is opened for the listeners that are named" = {
    expr = everything.networking.firewall.allowedTCPPorts;
    expected = [
      883
      8883
      8083
      8084
      7411
      7412
      9464
    ];
  };

  "test: a firewall opened for loopback is warned of" = {
    expr =
      map (lib.hasInfix "such as 0.0.0.0:1883")
        (evaluate { } {
          services.headgate.openFirewall.mqtt = true;
        }).warnings;
    expected = [ true ];
  };

  "test: a port below 1024 takes a capability, and no other is given" = {
    expr = lib.getAttrs [ "AmbientCapabilities" "CapabilityBoundingSet" "PrivateUsers" ] (
      service everything
    );
    expected = {
      AmbientCapabilities = "CAP_NET_BIND_SERVICE";
      CapabilityBoundingSet = "CAP_NET_BIND_SERVICE";
      PrivateUsers = false;
    };
  };

  "test: without such a port there is no capability" = {
    expr = lib.getAttrs [ "AmbientCapabilities" "CapabilityBoundingSet" "PrivateUsers" ] (
      service (evaluate { } { })
    );
    expected = {
      AmbientCapabilities = "";
      CapabilityBoundingSet = "";
      PrivateUsers = true;
    };
  };

  "test: only an address of the machine's own waits for the network" = {
    expr =
      map
        (
          address:
          (evaluate { } { services.headgate.settings.mqtt.listen = address; }).systemd.services.headgate.wants
        )
        [
          "0.0.0.0:1883"
          "[::1]:1883"
          "192.0.2.1:1883"
        ];
    expected = [
      [ ]
      [ ]
      [ "network-online.target" ]
    ];
  };

  "test: systemd waits for as long as a shutdown may take" = {
    expr = (service everything).TimeoutStopSec;
    expected = "30s";
  };

  "test: a store elsewhere is made, and the service may write there" = {
    expr =
      let
        config = evaluate { } { services.headgate.settings.store.path = "/data/headgate"; };
      in
      config.systemd.tmpfiles.rules ++ (service config).ReadWritePaths;
    expected = [
      "d /data/headgate 0750 headgate headgate -"
      "/data/headgate"
    ];
  };

  "test: there are files enough for the connections" = {
    expr = (service everything).LimitNOFILE;
    expected = 180000;
  };

  "test: the same port on two addresses is no clash" = {
    expr = complaints { } {
      services.headgate.settings = {
        mqtt.listen = "192.0.2.1:1883";
        metrics.listen = "127.0.0.1:1883";
      };
    };
    expected = [ ];
  };

  "test: IPv4 beside IPv6 is no clash" = {
    expr = complaints { } {
      services.headgate.settings = {
        mqtt.listen = "0.0.0.0:1883";
        metrics.listen = "[::1]:1883";
      };
    };
    expected = [ ];
  };

  "test: ports that are taken when they are free do not clash" = {
    expr = complaints { } {
      services.headgate.settings = {
        mqtt.listen = "127.0.0.1:0";
        metrics.listen = "127.0.0.1:0";
      };
    };
    expected = [ ];
  };

  "test: nothing is said about a gateway that is off" = {
    expr =
      let
        config = evaluate { } {
          services.headgate = {
            enable = lib.mkForce false;
            apps.broken = { };
          };
        };
      in
      config.assertions ++ lib.attrNames (config.systemd.services or { });
    expected = [ ];
  };
}
