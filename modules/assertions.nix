# What can be wrong though every option has its type. Each message names the option and the remedy.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  cfg = config.services.headgate;
  inherit (cfg) settings;
  inherit (pkgs.stdenv) hostPlatform;

  listen = import ./listen.nix { inherit lib; };
  secretsIn = import ./secrets.nix { inherit lib; };
  problemOf = import ./topic-filter.nix { inherit lib; };
  schema = import ./schema.nix { inherit lib; };
  cpus = import ./cpus.nix;

  option = path: "services.headgate.${path}";

  # `toString` does not copy a path to the store, where interpolation would.
  inStore = path: lib.isPath path || lib.hasPrefix builtins.storeDir (toString path);

  unknown = map (path: {
    assertion = false;
    message = "${option "settings.${lib.concatStringsSep "." path}"}: headgate.toml has no such key. See docs/configuration.md for those it has.";
  }) (schema.unknownKeys (lib.importJSON ./settings.schema.json) settings);

  secretsInSettings = map (key: {
    assertion = false;
    message = ''
      ${option "settings.${key}"} holds a secret, which everybody could read in the Nix store.
      Put it into a file on the gateway, name that file in ${option "credentials.<name>"}, and set
      the key of headgate.toml that takes a path to "''${config.${option "credentialsDirectory"}}/<name>".'';
  }) (lib.filter (key: !(key == passwordFile && storedPasswords)) (secretsIn settings));

  # It is found as a secret too, but belongs where `headgate user` can change it.
  passwordFile = "mqtt.auth.password_file";
  storedPasswords = inStore settings.mqtt.auth.password_file;

  auth = [
    {
      assertion = !storedPasswords;
      message = ''
        ${option "settings.${passwordFile}"} lies in the Nix store, where everybody can read the hashes, and
        `headgate user` can't change them. Set it to a file on the gateway, such as "/var/lib/headgate/passwords".'';
    }
    {
      assertion = !inStore settings.mqtt.auth.jwt_key;
      message = ''
        ${option "settings.mqtt.auth.jwt_key"} lies in the Nix store, where everybody can read a secret.
        Put it into a file on the gateway, set ${option ''credentials."jwt.key"''} to its path, and this to
        "''${config.${option "credentialsDirectory"}}/jwt.key"; or, if it is a public key, set
        environment.etc."headgate/jwt.pem".source to it, and this to "/etc/headgate/jwt.pem".'';
    }
  ];

  tls =
    lib.concatLists (
      lib.mapAttrsToList
        (
          listener: address:
          map
            (key: {
              assertion = listen.isOff address || settings.mqtt.tls.${key} != "";
              message = ''
                ${option "settings.mqtt.tls.${key}"} is not set, but ${listener} is ${builtins.toJSON address}.
                Set it to the path of a PEM file, or ${listener} to "off".'';
            })
            [
              "certificate"
              "key"
            ]
        )
        {
          "mqtt.tls.listen" = settings.mqtt.tls.listen;
          "mqtt.websocket.tls_listen" = settings.mqtt.websocket.tls_listen;
          "ingest.tls_listen" = settings.ingest.tls_listen;
        }
    )
    ++ [
      {
        assertion = !inStore settings.mqtt.tls.key;
        message = ''
          ${option "settings.mqtt.tls.key"} lies in the Nix store, where everybody can read it.
          Put the key into a file on the gateway, set ${option ''credentials."mqtt.key"''} to its path, and this
          to "''${config.${option "credentialsDirectory"}}/mqtt.key".'';
      }
    ];

  storedCredentials = lib.mapAttrsToList (name: path: {
    assertion = !inStore path;
    message = ''
      ${option ''credentials."${name}"''} lies in the Nix store, where everybody can read it, or is a path
      that Nix would copy there. Give a path on the gateway, as a string: "/var/lib/secrets/${name}".'';
  }) cfg.credentials;

  # Those that the settings name below the credentials' directory, with the key that does.
  usedCredentials = lib.filter (used: used != null) (
    lib.mapAttrsToListRecursiveCond (_: value: !lib.isDerivation value) (
      path: value:
      if lib.isString value && lib.hasPrefix "${cfg.credentialsDirectory}/" value then
        {
          key = lib.concatStringsSep "." path;
          name = lib.removePrefix "${cfg.credentialsDirectory}/" value;
        }
      else
        null
    ) settings
  );
  undeclaredCredentials = map (used: {
    assertion = cfg.credentials ? ${used.name} || lib.hasPrefix "headgate." used.name;
    message = ''
      ${option "settings.${used.key}"} uses the credential "${used.name}", which nobody provides.
      Set ${option ''credentials."${used.name}"''} to the path of a file on the gateway.'';
  }) usedCredentials;

  paths = [
    {
      assertion = settings.store.path == null || isPlain settings.store.path;
      message = ''
        ${option "settings.store.path"} (${toString settings.store.path}) is no path that a service can be given.
        Begin it with a slash, and take letters, digits, dots, dashes and underscores, but no folder "..".'';
    }
    {
      assertion =
        settings.store.path == null
        || !isPlain settings.store.path
        || !lib.any (folder: lib.hasPrefix folder "${settings.store.path}/") hidden;
      message = ''
        ${option "settings.store.path"} (${toString settings.store.path}) is where the service can't write,
        or what it writes does not stay. Take a folder of its own, such as /var/lib/headgate or /srv/headgate.'';
    }
    {
      assertion =
        settings.admin.socket != null
        && isPlain settings.admin.socket
        && lib.hasPrefix "/run/headgate/" settings.admin.socket;
      message = ''
        ${option "settings.admin.socket"} (${toString settings.admin.socket}) is where the service can't write.
        Take a path in /run/headgate.'';
    }
  ]
  ++
    map
      (key: {
        assertion =
          let
            path = settings.mqtt.tls.${key};
          in
          path == ""
          # A key in the place of its path is told as a secret.
          || lib.hasPrefix "-----" path
          ||
            isPlain path
            && !lib.any (folder: lib.hasPrefix folder path) [
              "/home/"
              "/root/"
              "/run/user/"
            ];
        message = ''
          ${option "settings.mqtt.tls.${key}"} (${settings.mqtt.tls.${key}}) is no file that the service can read.
          Begin its path with a slash, outside of /home and /root; or hand it over through ${option "credentials"}.'';
      })
      [
        "certificate"
        "client_ca"
        "client_crl"
        "key"
      ];

  # systemd splits at spaces and reads %; and the service sees neither /home nor the machine's /tmp.
  isPlain =
    path:
    builtins.match "(/[A-Za-z0-9._@+-]+)+" path != null && !lib.elem ".." (lib.splitString "/" path);
  hidden = [
    "/dev/"
    "/etc/"
    "/home/"
    "/nix/"
    "/proc/"
    "/root/"
    "/run/"
    "/sys/"
    "/tmp/"
    "/usr/"
    "/var/tmp/"
  ];

  credentialNames = lib.mapAttrsToList (name: path: {
    assertion =
      builtins.match "[A-Za-z0-9._-]+" name != null
      && !lib.elem name [
        "."
        ".."
      ]
      && isPlain (toString path);
    message = ''
      ${option "credentials.${builtins.toJSON name}"} (${toString path}) is nothing that systemd can load.
      Take letters, digits, dots, dashes and underscores, for the name and for each folder of an absolute path.'';
  }) cfg.credentials;

  ports = lib.mapAttrsToList (key: address: {
    assertion = listen.port address <= 65535;
    message = "${option "settings.${key}"} (${address}) has a port that does not exist. Take one from 1 to 65535.";
  }) listeners;

  listeners = lib.filterAttrs (_: address: !listen.isOff address) {
    "mqtt.listen" = settings.mqtt.listen;
    "mqtt.tls.listen" = settings.mqtt.tls.listen;
    "mqtt.websocket.listen" = settings.mqtt.websocket.listen;
    "mqtt.websocket.tls_listen" = settings.mqtt.websocket.tls_listen;
    "ingest.listen" = settings.ingest.listen;
    "ingest.tls_listen" = settings.ingest.tls_listen;
    "metrics.listen" = settings.metrics.listen;
  };
  pairs = lib.filter ({ one, other }: one < other) (
    lib.cartesianProduct {
      one = lib.attrNames listeners;
      other = lib.attrNames listeners;
    }
  );
  clashes = map (
    { one, other }:
    {
      assertion = !listen.clash listeners.${one} listeners.${other};
      message = ''
        ${option "settings.${one}"} (${listeners.${one}}) and ${option "settings.${other}"} (${listeners.${other}})
        take the same port. Give one of them another.'';
    }
  ) pairs;

  someListener = {
    assertion = lib.any (name: name != "metrics.listen") (lib.attrNames listeners);
    message = ''
      ${option "settings.mqtt.listen"} and the listeners of mqtt.tls and mqtt.websocket are all "off": no client
      could connect. Set one of them to where clients connect, such as "0.0.0.0:1883".'';
  };

  firewall = lib.mapAttrsToList (name: address: {
    assertion = cfg.openFirewall.${name} -> !listen.isOff address && listen.port address != 0;
    message = ''
      ${option "openFirewall.${name}"} has no port to open: its listener is ${builtins.toJSON address}.
      Give the listener a port in ${option "settings"}, or leave the firewall as it is.'';
  }) addressOf;
  unreachable = lib.concatLists (
    lib.mapAttrsToList (
      name: address:
      lib.optional (cfg.openFirewall.${name} && !listen.isOff address && listen.isLoopback address) ''
        ${option "openFirewall.${name}"} opens a port that nobody can reach: its listener is ${address}.
        To be reached, it must listen on another address, such as 0.0.0.0:${toString (listen.port address)}.''
    ) addressOf
  );
  addressOf = {
    mqtt = settings.mqtt.listen;
    mqttTls = settings.mqtt.tls.listen;
    mqttWebSocket = settings.mqtt.websocket.listen;
    mqttWebSocketTls = settings.mqtt.websocket.tls_listen;
    ingest = settings.ingest.listen;
    ingestTls = settings.ingest.tls_listen;
    metrics = settings.metrics.listen;
  };

  enabled = lib.filterAttrs (_: app: app.enable) cfg.apps;

  # Two apps of one name: the second attribute is told.
  byName = lib.groupBy (key: enabled.${key}.name) (lib.attrNames enabled);
  sameNames = lib.mapAttrsToList (name: keys: {
    assertion = lib.length keys == 1;
    message = ''
      ${lib.concatMapStringsSep " and " (key: option "apps.${key}") keys} have the same name, "${name}".
      Set ${option "apps.${lib.last keys}.name"} to another, or take one of them out.'';
  }) byName;

  ofApp =
    key: app:
    let
      at = path: option "apps.${key}.${path}";

      source = [
        {
          assertion = app.package != null || app.component != null;
          message = ''
            ${option "apps.${key}"} has no component. Set ${at "package"} to a folder with
            manifest.toml and component, or ${at "component"} to a .wasm file.'';
        }
        {
          assertion = app.package == null || app.component == null;
          message = ''
            ${at "package"} and ${at "component"} are both set.
            Take out the one that is not to be used.'';
        }
        {
          assertion = !lib.isPath app.component || builtins.pathExists app.component;
          message = ''
            ${at "component"}: ${toString app.component} does not exist.
            Build the component, and if this is a flake, `git add` it.'';
        }
        {
          assertion = !lib.isPath app.package || builtins.pathExists (app.package + "/manifest.toml");
          message = ''
            ${at "package"}: there is no ${toString app.package}/manifest.toml.
            Give a folder with manifest and component.'';
        }
      ];

      manifest = [
        {
          assertion = app.version != null;
          message = ''${at "version"} is not set, which ${at "component"} needs. Write it as in "1.2.3".'';
        }
        {
          # Of those with devices, the compiler sees whether events come from them.
          assertion = app.subscribe != [ ] || app.gpio != [ ] || app.sensor != [ ];
          message = ''
            ${at "subscribe"} is empty: an app without a topic filter would never get an event.
            Name the topics it is to get.'';
        }
      ]
      ++ lib.concatMap filters [
        "subscribe"
        "publish"
      ];

      # A filter may be as long as a short book.
      shown =
        filter: "\"${lib.substring 0 80 filter}${lib.optionalString (lib.stringLength filter > 80) "…"}\"";

      filters =
        direction:
        [
          {
            assertion = lib.length app.${direction} <= 64;
            message = "${at direction} has ${
              toString (lib.length app.${direction})
            } topic filters, and at most 64 are allowed; put some together with + or #.";
          }
        ]
        ++ map (filter: {
          assertion = problemOf filter == null;
          message = "${at direction}: ${shown filter} is no topic filter: ${toString (problemOf filter)}.";
        }) app.${direction}
        ++ map (
          filter:
          if direction == "subscribe" then
            {
              assertion = !lib.hasPrefix "$share/" filter;
              message = "${at direction}: ${shown filter}: an app has no shared subscriptions; leave out the first two levels.";
            }
          else
            {
              assertion = !lib.hasPrefix "$" filter;
              message = "${at direction}: ${shown filter}: topics that start with $ are the gateway's own; choose another.";
            }
        ) app.${direction};

      # A package brings its own manifest.
      ignored =
        map
          (path: {
            assertion = false;
            message = ''
              ${at path} is set, but the manifest in ${at "package"} is the one that counts.
              Change it there, or set ${at "component"} to the package's component and describe the
              app here.'';
          })
          (
            lib.optional (app.version != null) "version"
            ++ lib.optional (app.description != null) "description"
            ++ lib.optional (app.subscribe != [ ]) "subscribe"
            ++ lib.optional (app.publish != [ ]) "publish"
            ++ lib.optional (app.config != { }) "config"
            ++ lib.optional (app.capabilities != [ ]) "capabilities"
            ++ lib.optional (app.gpio != [ ]) "gpio"
            ++ lib.optional (app.sensor != [ ]) "sensor"
            ++ lib.optional (lib.any (limit: limit != null) (lib.attrValues app.limits)) "limits"
          );

      secrets = map (name: {
        assertion = false;
        message = ''
          ${at "config.${name}"} holds a secret, which everybody could read in the Nix store.
          Take the app out of ${option "apps"} and install it on the gateway, with
          `headgate app install` and a manifest that lies there.'';
      }) (secretsIn app.config);
    in
    source ++ secrets ++ (if app.package != null then ignored else manifest);

  platform = [
    {
      assertion = enabled != { } -> cpus ? ${hostPlatform.system} && hostPlatform.isGnu;
      message = ''
        ${option "apps"}: apps can't be compiled for ${hostPlatform.config}, only for Linux with glibc
        on ${lib.concatStringsSep " and " (lib.attrNames cpus)}. Install them on the gateway instead.'';
    }
    {
      assertion = lib.elem cfg.cpu (cpus.${hostPlatform.system} or [ "generic" ]);
      message = ''
        ${option "cpu"}: "${cfg.cpu}" is no processor of ${hostPlatform.system}.
        Take one of: ${lib.concatStringsSep ", " (cpus.${hostPlatform.system} or [ "generic" ])}.'';
    }
    {
      assertion = enabled != { } -> cfg.buildPackage.version == cfg.package.version;
      message = ''
        ${option "package"} is of version ${cfg.package.version} and would refuse apps compiled by
        ${option "buildPackage"}, which is of version ${cfg.buildPackage.version}. Set both from the same source.'';
    }
  ];
in
{
  config = lib.mkIf cfg.enable {
    assertions =
      unknown
      ++ secretsInSettings
      ++ tls
      ++ auth
      ++ storedCredentials
      ++ credentialNames
      ++ ports
      ++ [ someListener ]
      ++ undeclaredCredentials
      ++ paths
      ++ clashes
      ++ firewall
      ++ sameNames
      ++ lib.concatLists (lib.mapAttrsToList ofApp enabled)
      ++ platform;
    warnings = unreachable;
  };
}
