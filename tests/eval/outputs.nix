# The outputs of the flake, with the nixpkgs in the folder $NIXPKGS. Unlike `nix flake check`, this
# neither copies nixpkgs into the store nor needs a network.
{
  nixpkgs ? builtins.getEnv "NIXPKGS",
}:

let
  root = ../..;
  folder = /. + nixpkgs;

  inputs.nixpkgs = (import (folder + "/flake.nix")).outputs { self = inputs.nixpkgs; } // {
    outPath = folder;
  };
  self = (import (root + "/flake.nix")).outputs (inputs // { inherit self; }) // {
    inherit inputs;
    outPath = root;
  };
in
self
