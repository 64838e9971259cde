# The processors that `headgate app compile --cpu` knows, by the architecture that Nix calls them.
{
  aarch64-linux = [
    "generic"
    "cortex-a53"
    "cortex-a72"
    "cortex-a76"
    "neoverse-n1"
  ];
  x86_64-linux = [
    "generic"
    "x86-64-v2"
    "x86-64-v3"
  ];
}
