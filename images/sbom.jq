# CycloneDX 1.6 from what Nix hands to a build: `closure` (exportReferencesGraph), `product` with its
# `roots`, `crates`, and `gateway`, the store path which the crates are part of.

# --- hashes: Nix writes them in base 32, base 16 or base 64, CycloneDX wants hexadecimal ---------

def hex: "0123456789abcdef" as $digits | map($digits[. / 16 | floor:][:1] + $digits[. % 16:][:1]) | add;

# Pairs of a digit and how many bits it carries, the least significant first, as bytes, the least
# significant first; what is no whole byte in the end is padding.
def bytes:
  reduce .[] as [$digit, $bits] ({value: 0, have: 0, bytes: []};
    .value += $digit * pow(2; .have) | .have += $bits
    | if .have >= 8
      then .bytes += [.value % 256] | .value = (.value / 256 | floor) | .have -= 8
      else . end)
  | .bytes;

def digits($alphabet): [split("")[] as $c | $alphabet | index($c)];

# Nix's own base 32: its last digit is the least significant, and so is the hash's first byte.
def from_base32:
  digits("0123456789abcdfghijklmnpqrsvwxyz") | reverse | map([., 5]) | bytes | hex;

# Here the hash's first byte is the most significant; the last digit carries two bits of padding.
def from_base64:
  rtrimstr("=")
  | digits("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/") | reverse
  | [[.[0] / 4 | floor, 4]] + (.[1:] | map([., 6]))
  | bytes | reverse | hex;

def sha256_hex:
  if startswith("sha256-") then .[7:] | from_base64
  elif startswith("sha256:") then
    .[7:] | if length == 64 then . elif length == 52 then from_base32
            else error("no SHA-256: \(.)") end
  else error("no SHA-256: \(.)") end;

# --- names ---------------------------------------------------------------------------------------

def base_name: ltrimstr("/nix/store/");

# As Nix splits them: the version begins at the first dash that no letter follows.
def name_and_version: base_name[33:] | capture("^(?<name>.+?)-(?<version>[^A-Za-z].*)$") // {name: .};

def nix_purl: name_and_version as $it
  | "pkg:nix/\($it.name | @uri)" + if $it.version then "@\($it.version | @uri)" else "" end;

def crate_ref: "pkg:cargo/\(.name | @uri)@\(.version | @uri)";
def crate_ref_of($identity): $identity | split("@") | {name: .[0], version: .[1]} | crate_ref;

# --- parts ---------------------------------------------------------------------------------------

def crate_component: {
    type: "library",
    "bom-ref": crate_ref,
    name, version,
    purl: crate_ref
  } + if .checksum then {hashes: [{alg: "SHA-256", content: .checksum}]} else {} end;

def store_component($gateway; $crates): .path as $path | (.path | name_and_version) as $it | {
    type: (if $path == $gateway then "application" elif $it.version then "library" else "file" end),
    "bom-ref": ($path | base_name),
    name: $it.name,
    purl: ($path | nix_purl),
    # Of the path's contents in Nix's archive format, as `nix path-info --json` shows it.
    hashes: [{alg: "SHA-256", content: (.narHash | sha256_hex)}],
    properties: [
      {name: "nix:path", value: $path},
      {name: "nix:nar-size", value: (.narSize | tostring)}
    ]
  }
  + if $it.version then {version: $it.version} else {} end
  + if $path == $gateway then {components: ($crates | map(crate_component))} else {} end;

.closure as $closure | .crates as $all_crates | .gateway as $gateway | .product as $product
# The first is the gateway itself, which the store path stands for.
| $all_crates[0] as $program | $all_crates[1:] as $crates
| {
    "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
    bomFormat: "CycloneDX",
    specVersion: "1.6",
    version: 1,
    metadata: {
      component: {
        type: "operating-system",
        "bom-ref": "image",
        name: $product.id,
        version: $product.version
      }
    },
    components: ($closure | sort_by(.path) | map(store_component($gateway; $crates))),
    dependencies: (
      [{ref: "image", dependsOn: ($product.roots | map(base_name) | unique)}]
      + ($closure | sort_by(.path) | map(.path as $path | {
          ref: (.path | base_name),
          dependsOn: (
            (.references | map(select(. != $path) | base_name))
            + if $path == $gateway then $program.dependencies | map(crate_ref_of(.)) else [] end
            | unique)
        }))
      + if any($closure[]; .path == $gateway)
        then $crates | map({ref: crate_ref, dependsOn: (.dependencies | map(crate_ref_of(.)) | unique)})
        else [] end)
  }
