# Apps that are part of the system: compiled while it is built, for the gateway's processor.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib)
    literalExpression
    mkOption
    types
    ;

  cfg = config.services.headgate;
  toTOML = import ./toml.nix { inherit lib; };

  # What is wrong in them is said when the app is compiled.
  devices =
    with types;
    listOf (
      attrsOf (oneOf [
        str
        int
        bool
      ])
    );

  limit =
    {
      from,
      to,
      default,
      description,
    }:
    mkOption {
      type = types.nullOr (types.ints.between from to);
      default = null;
      description = "${description} If it is `null`: ${default}.";
    };

  app =
    { name, ... }:
    {
      options = {
        enable = mkOption {
          type = types.bool;
          default = true;
          description = "Whether the app is part of the system.";
        };

        name = mkOption {
          type = types.strMatching "[a-z0-9][a-z0-9_.-]{0,63}";
          default = name;
          defaultText = literalExpression "<name>";
          description = "The app's name. With {option}`package`, it must be the one in the manifest.";
        };

        package = mkOption {
          type = types.nullOr types.path;
          default = null;
          example = literalExpression ''"''${pkgs.headgate-apps}/overheat-alarm"'';
          description = ''
            A folder with {file}`manifest.toml` and the component. Either this or {option}`component`
            must be set.
          '';
        };

        component = mkOption {
          type = types.nullOr types.path;
          default = null;
          example = literalExpression "./thermostat.wasm";
          description = "The WebAssembly component; the options below make its manifest.";
        };

        version = mkOption {
          type = types.nullOr (types.strMatching "[0-9]+\\.[0-9]+\\.[0-9]+([-+][0-9A-Za-z.+-]+)?");
          default = null;
          example = "1.0.0";
          description = "The app's version; see <https://semver.org>. Needed with {option}`component`.";
        };

        description = mkOption {
          type = types.nullOr types.str;
          default = null;
          description = "What the app does.";
        };

        subscribe = mkOption {
          type = types.listOf types.str;
          default = [ ];
          example = [ "plant/+/temperature" ];
          description = "Topic filters: events on these topics go to the app. Needed with {option}`component`.";
        };

        publish = mkOption {
          type = types.listOf types.str;
          default = [ ];
          example = [ "alarms/#" ];
          description = "Topic filters: the app may publish on these topics.";
        };

        config = mkOption {
          type =
            with types;
            attrsOf (oneOf [
              str
              int
              float
              bool
            ]);
          default = { };
          example = {
            threshold = 90;
          };
          description = "What the app is configured with. Everybody on the gateway can read it.";
        };

        capabilities = mkOption {
          type = types.listOf (
            types.enum [
              "gpio"
              "sensors"
            ]
          );
          default = [ ];
          example = [ "gpio" ];
          description = ''
            What the app asks for. {option}`services.headgate.settings.apps.gpio` and
            {option}`services.headgate.settings.apps.sensors` must name the app, too.
          '';
        };

        gpio = mkOption {
          type = devices;
          default = [ ];
          example = [
            {
              name = "door";
              chip = "gpiochip0";
              line = 17;
              direction = "input";
              bias = "pull-up";
            }
          ];
          description = "The app's GPIO lines; docs/writing-apps.md has the keys.";
        };

        sensor = mkOption {
          type = devices;
          default = [ ];
          example = [
            {
              name = "cpu";
              device = "cpu_thermal";
              channel = "temp1_input";
            }
          ];
          description = "The app's sensors; docs/writing-apps.md has the keys.";
        };

        limits = {
          memory_pages = limit {
            from = 1;
            to = 1024;
            default = "256, which is 16 MiB";
            description = "Memory, in pages of 64 KiB.";
          };
          batch_deadline_ms = limit {
            from = 1;
            to = 60000;
            default = "100";
            description = "CPU time of one call, in milliseconds.";
          };
          queue_events = limit {
            from = 1;
            to = 1000000;
            default = "{option}`services.headgate.settings.apps.queue_events`";
            description = "Events that may wait.";
          };
          publish_per_batch = limit {
            from = 0;
            to = 1000000;
            default = "4096";
            description = "Events that one call may publish.";
          };
          log_per_batch = limit {
            from = 0;
            to = 10000;
            default = "64";
            description = "Lines that one call may log.";
          };
          kv_bytes = limit {
            from = 0;
            to = 67108864;
            default = "1048576, which is 1 MiB";
            description = "What the app may keep, in bytes: keys, values, and 64 for each key.";
          };
          kv_per_batch = limit {
            from = 0;
            to = 1000000;
            default = "1000";
            description = "Calls about what it keeps that one call may make.";
          };
          timers = limit {
            from = 0;
            to = 1024;
            default = "8";
            description = "Timers that may be set at a time.";
          };
          table_elements = limit {
            from = 0;
            to = 1000000;
            default = "100000";
            description = "Elements of all tables together, 8 bytes each.";
          };
          instances = limit {
            from = 1;
            to = 1000;
            default = "64";
            description = "Core instances that the component consists of.";
          };
          weight = limit {
            from = 1;
            to = 10000;
            default = "100";
            description = "Share of the workers' time, by that of the others, where there is not enough for all.";
          };
          queue_full = mkOption {
            type = types.nullOr (
              types.enum [
                "wait"
                "drop-newest"
                "drop-oldest"
              ]
            );
            default = null;
            description = ''
              What becomes of events for which the queue has no room. `wait`: whoever brings them
              waits, as long as the app runs and its calls are short. If it is `null`: `wait`.
            '';
          };
        };

        restart = {
          retries = limit {
            from = 0;
            to = 10;
            default = "1";
            description = "How often a batch that the app fails with is tried again before it is halved.";
          };
          first_pause_ms = limit {
            from = 1;
            to = 3600000;
            default = "100";
            description = "Milliseconds before the first restart after a failure; each further pause is longer.";
          };
          longest_pause_ms = limit {
            from = 1;
            to = 3600000;
            default = "30000";
            description = "Milliseconds that a pause takes at most.";
          };
          most_failures = limit {
            from = 1;
            to = 1000;
            default = "10";
            description = "Failures within `window_s` that put the app in quarantine.";
          };
          window_s = limit {
            from = 1;
            to = 86400;
            default = "60";
            description = "Seconds in which failures are counted.";
          };
        };

        recycle = {
          max_uses = limit {
            from = 1;
            to = 1000000000;
            default = "{option}`services.headgate.settings.apps.max_uses`";
            description = "Batches after which a fresh instance takes the place of the old one.";
          };
          max_failures = limit {
            from = 1;
            to = 1000000000;
            default = "never";
            description = "Batches that one instance answers with an error, after which a fresh one takes its place.";
          };
        };

        upgrade.trial_batches = limit {
          from = 0;
          to = 1000000;
          default = "10";
          description = "Batches that must go well after an upgrade to this version.";
        };

        state_version = limit {
          from = 1;
          to = 4294967295;
          default = "1";
          description = "Version of the format of what the app keeps.";
        };

        placement = mkOption {
          type = types.nullOr (
            types.enum [
              "everywhere"
              "singleton"
              "partition"
            ]
          );
          default = null;
          defaultText = lib.literalExpression ''"everywhere"'';
          description = ''
            Which gateways of a site run the app, where a link has a `cluster`: each with its own events, one with those of
            all, or each with those of its shards of the topics.
          '';
        };

        manifest = mkOption {
          type = types.str;
          readOnly = true;
          internal = true;
          description = "The manifest that the options make, as TOML.";
        };
      };
    };

  manifestOf =
    app:
    toTOML (
      {
        inherit (app)
          name
          version
          description
          subscribe
          config
          limits
          placement
          recycle
          restart
          state_version
          upgrade
          ;
      }
      // lib.filterAttrs (_: list: list != [ ]) {
        inherit (app)
          capabilities
          gpio
          publish
          sensor
          ;
      }
    );

  sourceOf = app: if app.package != null then app.package else app.component;

  # What there is nothing to compile of, assertions.nix complains about.
  exists = path: path != null && (lib.isPath path -> builtins.pathExists path);

  enabled = lib.filter (app: app.enable && exists (sourceOf app)) (lib.attrValues cfg.apps);

  compile =
    app:
    lib.escapeShellArgs (
      [
        "headgate"
        "app"
        "compile"
        "${sourceOf app}"
      ]
      ++ lib.optionals (app.package == null) [
        "--manifest"
        "${pkgs.writeText "headgate-${app.name}-manifest.toml" app.manifest}"
      ]
      ++ [
        "--name"
        app.name
        "--target"
        pkgs.stdenv.hostPlatform.rust.rustcTargetSpec
        "--cpu"
        cfg.cpu
        "--output"
      ]
    )
    + " \"$out\"/${app.name}";

  # One folder of files, not of links to others: the gateway wants to see who may write to it.
  compiled =
    pkgs.runCommand "headgate-apps-${cfg.cpu}"
      {
        nativeBuildInputs = [ cfg.buildPackage ];
        strictDeps = true;
        __structuredAttrs = true;
      }
      ''
        mkdir "$out"
        ${lib.concatMapStringsSep "\n" compile enabled}
      '';
in
{
  options.services.headgate = {
    apps = mkOption {
      type = types.attrsOf (
        types.submodule [
          app
          (
            { config, ... }:
            {
              manifest = manifestOf config;
            }
          )
        ]
      );
      default = { };
      example = literalExpression ''
        {
          overheat-alarm.package = "''${pkgs.headgate-apps}/overheat-alarm";
          thermostat = {
            component = ./thermostat.wasm;
            version = "1.0.0";
            subscribe = [ "plant/+/temperature" ];
            publish = [ "plant/+/valve" ];
            config.target = 21.5;
          };
        }
      '';
      description = ''
        Apps that are part of the system. They can be stopped and started on the gateway, but not
        removed or replaced. Others can be installed beside them.
      '';
    };

    cpu = mkOption {
      type = types.enum (lib.unique (lib.concatLists (lib.attrValues (import ./cpus.nix))));
      default = "generic";
      example = "cortex-a72";
      description = ''
        The processor that apps are compiled for. A gateway with another one, of the same
        architecture, runs them if it can do all that this one can. `generic` is every one of the
        architecture.
      '';
    };

    compiledApps = mkOption {
      type = types.package;
      default = compiled;
      readOnly = true;
      internal = true;
      description = "The folder of the apps, compiled.";
    };
  };

  config.services.headgate.settings.apps.preinstalled = lib.mkIf (
    cfg.enable && enabled != [ ]
  ) "${cfg.compiledApps}";
}
