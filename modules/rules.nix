# The rules of the pipeline: which lane the events of a topic take.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkOption types;

  cfg = config.services.headgate;
  toTOML = import ./toml.nix { inherit lib; };
  filterFlaw = import ./topic-filter.nix { inherit lib; };

  optional =
    type: description:
    mkOption {
      type = types.nullOr type;
      default = null;
      inherit description;
    };

  rule = types.submodule {
    options = {
      topics = mkOption {
        type = types.nonEmptyListOf (
          types.addCheck types.str (filter: filterFlaw filter == null)
          // {
            description = "MQTT topic filter";
          }
        );
        example = [ "alarms/#" ];
        description = "Topic filters of the events that the rule is about.";
      };
      lane = mkOption {
        type = types.enum [
          "realtime"
          "transactional"
          "batch"
        ];
        default = "transactional";
        description = "The lane that they take.";
      };
      durable = optional types.bool ''
        Whether they are in the journal, and acknowledged when they are on disk. Of the transactional lane
        they are, unless this is `false`.
      '';
      dedup = mkOption {
        type = types.enum [
          "off"
          "content"
          "id"
        ];
        default = "off";
        description = "What tells duplicates: topic and payload, or topic and an id.";
      };
      dedup_property = optional types.nonEmptyStr "The MQTT 5 user property with the id; `id`, if it is not set.";
      retries = optional (types.ints.between 0 20) ''
        How often a batch that an app fails with is tried again before it is halved; as the app's manifest
        says, if it is not set.
      '';
      window_events = optional (types.ints.between 1 4096) "Events with which a window of the batch lane closes.";
      window_bytes = optional (types.ints.between 1 16777216) "Bytes of payloads with which it closes.";
      window_age_ms = optional (types.ints.between 1 3600000) "Milliseconds after its first event with which it closes.";
    };
  };

  rendered = pkgs.writeText "headgate-rules.toml" (toTOML {
    rule = map (lib.filterAttrs (_: value: value != null)) cfg.rules;
  });

  # The gateway's own parser looks at them, so that a mistake fails the build and not the boot.
  checked =
    pkgs.runCommand "headgate-rules.toml"
      {
        nativeBuildInputs = [ cfg.buildPackage ];
        strictDeps = true;
        __structuredAttrs = true;
      }
      ''
        touch empty.toml
        HEADGATE_PIPELINE_RULES_FILE=${rendered} headgate --config empty.toml config check
        cp ${rendered} "$out"
      '';
in
{
  options.services.headgate.rules = mkOption {
    type = types.listOf rule;
    default = [ ];
    example = [
      {
        topics = [ "alarms/#" ];
        lane = "realtime";
      }
    ];
    description = ''
      Which lane the events of a topic take, whether they are in the journal, what tells their duplicates. The
      first rule that matches counts; {file}`docs/lanes.md` says more. The module sets
      `pipeline.rules_file`, unless you do.
    '';
  };

  config = lib.mkIf (cfg.enable && cfg.rules != [ ]) {
    services.headgate.settings.pipeline.rules_file = lib.mkDefault "/etc/headgate/rules.toml";
    environment.etc."headgate/rules.toml".source = checked;
    # A reload would refuse the first durable rule: the journal is opened at the start.
    systemd.services.headgate.restartTriggers = [ rendered ];
  };
}
