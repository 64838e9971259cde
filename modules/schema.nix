# NixOS options from the JSON schema of the configuration file, which the gateway itself prints
# (`headgate config schema`): the two can't disagree.
{ lib }:

let
  inherit (lib) types;

  # A JSON pattern finds, where `builtins.match` wants the whole text.
  matching =
    pattern:
    types.addCheck types.str (text: builtins.match ".*(${pattern}).*" text != null)
    // {
      name = "matching";
      description = "string matching the pattern ${pattern}";
      descriptionClass = "noun";
    };

  typeOf =
    schema:
    if schema ? anyOf then
      types.oneOf (map typeOf schema.anyOf)
    else if schema ? enum then
      types.enum schema.enum
    else if schema ? pattern then
      matching schema.pattern
    else
      {
        array = types.listOf (typeOf schema.items);
        boolean = types.bool;
        integer = types.ints.between schema.minimum schema.maximum;
        inherit (types) number;
        string = if schema.minLength or 0 > 0 then types.nonEmptyStr else types.str;
      }
      .${schema.type};

  optionOf =
    schema:
    let
      type = typeOf schema;
    in
    lib.mkOption (
      {
        inherit (schema) description;
        type = if schema ? default then type else types.nullOr type;
        default = schema.default or null;
      }
      // lib.optionalAttrs (schema ? examples) { example = lib.head schema.examples; }
    );

  isTable = schema: schema.type or null == "object";
in
rec {
  optionsOf =
    table:
    lib.mapAttrs (_: schema: if isTable schema then optionsOf schema else optionOf schema) (
      table.properties or { }
    );

  # The keys in `settings` that the table does not have, as paths.
  unknownKeys =
    table: settings:
    lib.concatLists (
      lib.mapAttrsToList (
        key: value:
        let
          schema = table.properties.${key} or null;
        in
        if schema == null then
          [ [ key ] ]
        else if isTable schema && lib.isAttrs value then
          map (path: [ key ] ++ path) (unknownKeys schema value)
        else
          [ ]
      ) settings
    );
}
