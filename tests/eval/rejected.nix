# Values that the module system itself rejects: `value` can't be evaluated, and the error has `message`.
{ outputs }:

let
  inherit (import ./module.nix { inherit outputs; }) evaluate;

  rejected = message: headgate: {
    inherit message;
    value =
      builtins.toJSON
        (evaluate { } { services = { inherit headgate; }; }).services.headgate.settings;
  };
  rejectedApp = message: app: {
    inherit message;
    value =
      (evaluate { } { services.headgate.apps.thermostat = app; })
      .services.headgate.apps.thermostat.manifest;
  };
  rejectedRule = message: rule: {
    inherit message;
    value =
      builtins.toJSON
        (evaluate { } { services.headgate.rules = [ rule ]; }).services.headgate.rules;
  };
in
{
  "a number as text" =
    rejected
      "A definition for option `services.headgate.settings.mqtt.max_connections' is not of type `integer between 1 and 100000 (both inclusive)'"
      { settings.mqtt.max_connections = "many"; };

  "a number out of range" =
    rejected
      "A definition for option `services.headgate.settings.pipeline.batch.max_events' is not of type `integer between 1 and 4096 (both inclusive)'"
      { settings.pipeline.batch.max_events = 0; };

  "a mapping with a name that is none" = {
    message = "mappings";
    value =
      builtins.toJSON
        (evaluate { } { services.headgate.mappings."Pump 1" = ./rejected.nix; }).services.headgate.settings;
  };

  "a rule for a topic filter that is none" = rejectedRule ".topics" { topics = [ "a/#/b" ]; };

  "a rule for a lane that there is not" =
    rejectedRule "is not of type `one of \"realtime\", \"transactional\", \"batch\"'"
      {
        topics = [ "a" ];
        lane = "fast";
      };

  "an address without a port" =
    rejected
      "A definition for option `services.headgate.settings.mqtt.listen' is not of type `string matching the pattern ^(off)?$|:[0-9]+$'"
      { settings.mqtt.listen = "0.0.0.0"; };

  "an address that is neither off nor has a port" =
    rejected "A definition for option `services.headgate.settings.metrics.listen' is not of type"
      { settings.metrics.listen = "of"; };

  "a size without a known unit" =
    rejected "A definition for option `services.headgate.settings.store.max_bytes' is not of type"
      { settings.store.max_bytes = "1GB"; };

  "a word that is none of the choices" =
    rejected
      "A definition for option `services.headgate.settings.log.format' is not of type `one of \"text\", \"json\"'"
      { settings.log.format = "xml"; };

  "apps of one's own beside those in Nix" =
    rejected
      "The option `services.headgate.settings.apps.preinstalled' has conflicting definition values"
      {
        settings.apps.preinstalled = "/opt/apps";
        apps.thermostat = {
          component = "/var/empty/thermostat.wasm";
          version = "1.0.0";
          subscribe = [ "a" ];
        };
      };

  "a name that is none for an app" =
    rejectedApp
      "A definition for option `services.headgate.apps.thermostat.name' is not of type `string matching the pattern"
      { name = "Thermostat"; };

  "an app's version that is none" =
    rejectedApp "A definition for option `services.headgate.apps.thermostat.version' is not of type"
      { version = "1.0"; };

  "an app's memory out of range" =
    rejectedApp
      "A definition for option `services.headgate.apps.thermostat.limits.memory_pages' is not of type"
      { limits.memory_pages = 2000; };

  "an app's configuration that is a list" =
    rejectedApp "A definition for option `services.headgate.apps.thermostat.config.list' is not of type"
      { config.list = [ 1 ]; };
}
