# What is wrong with a topic filter (MQTT 5.0, 4.7.1), or null. The same rules, in the same words, as
# the gateway's own (src/event/topic.rs).
{ lib }:

filter:
let
  levels = lib.splitString "/" filter;
in
if filter == "" then
  "a topic filter can't be empty"
else if lib.stringLength filter > 65535 then
  "a topic filter has at most 65535 bytes"
else if lib.length levels > 200 then
  "a topic filter has at most 200 levels"
else if
  lib.any (level: lib.hasInfix "#" level && level != "#") levels || lib.elem "#" (lib.init levels)
then
  "`#` must be the last level and stand alone in it"
else if lib.any (level: lib.hasInfix "+" level && level != "+") levels then
  "`+` must stand alone between two slashes"
else
  null
