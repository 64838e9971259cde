#!/bin/sh
# needs: jq:jq
# images/sbom.jq, on a closure as Nix tells it: by the Nix at hand, else as one told it before.
. "$(dirname -- "$0")/expect.sh"

closure=$here/fixture/closure.json
if command -v nix-build > /dev/null; then
    # Nothing but a shell is needed for it: no substitutes, and no users to build as.
    if told=$(nix-build --no-out-link --option substitute false --option sandbox false \
        --option build-users-group "" "$here/closure.nix" 2> nix.log); then
        closure=$told
    else
        echo "  Nix could not build a closure, so the one in fixture/ is taken: $(tail -n 1 nix.log)"
    fi
fi

sbom() { jq --sort-keys --from-file "$images/sbom.jq" "$@"; }
sbom "$closure" > sbom.json

# has FILTER: it holds for the SBOM.
has() { jq --exit-status "$1" sbom.json > /dev/null || failed "not so: $1 in $(cat sbom.json)"; }

begin "it is CycloneDX 1.6 about the image"
has '.bomFormat == "CycloneDX" and .specVersion == "1.6"'
has '.metadata.component | .name == "headgate" and .version == "0.1.0" and .type == "operating-system"'

begin "every store path is a component with name, version and package URL"
has '[.components[].name] | sort == ["headgate", "library-with-a-long-name", "nixos-system-test"]'
has 'any(.components[]; .version == "1.2.3-lib" and .purl == "pkg:nix/library-with-a-long-name@1.2.3-lib" and .type == "library")'
has 'any(.components[]; .name == "nixos-system-test" and (has("version") | not) and .type == "file")'

begin "its hash is that of its archive, in hexadecimal"
if [ "$closure" = "$here/fixture/closure.json" ]; then
    expected=$(sed -n 's/^headgate //p' "$here/fixture/nar-sha256")
else
    expected=$(nix-hash --type sha256 "$(jq -r .gateway "$closure")")
fi
equal "$expected" "$(jq -r '.components[] | select(.name == "headgate").hashes[0].content' sbom.json)" "SHA-256"

begin "every way in which Nix writes a hash comes to the same"
for hash in sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824 \
    sha256:094qif9n4cq4fdg459qzbhg1c6wywawwaaivx0k0x8xhbyx4vwic \
    sha256-LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ=; do
    jq --arg hash "$hash" '.closure[].narHash = $hash' "$closure" | sbom |
        jq -r '.components[].hashes[].content' | sort -u > hashes
    equal 2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824 "$(cat hashes)" "$hash"
done

begin "the crates are parts of the gateway, with package URL and checksum"
has '.components[] | select(.name == "headgate") | .type == "application" and (.components | length) == 1
    and .components[0].purl == "pkg:cargo/toml@1.2.1%2Bspec-1.1.0" and (.components[0].hashes[0].content | length) == 64'
has 'all(.components[]; .name == "headgate" or (has("components") | not))'

begin "what depends on what is told, from the image to the crates"
has '.dependencies[] | select(.ref == "image").dependsOn | length == 1 and (.[0] | endswith("-nixos-system-test"))'
has '.dependencies[] | select(.ref | endswith("-headgate-0.1.0")).dependsOn | any(endswith("-lib")) and any(. == "pkg:cargo/toml@1.2.1%2Bspec-1.1.0")'
has '[.metadata.component, .components[], .components[].components[]?] | map(."bom-ref") as $refs
    | ($refs | length) == ($refs | unique | length)'
has '([.metadata.component, .components[], .components[].components[]?] | map(."bom-ref")) as $refs
    | all(.dependencies[]; ([.ref] + .dependsOn) - $refs == [])'

begin "without a gateway there are no crates"
jq '.gateway = "/nix/store/none"' "$closure" | sbom > sbom.json
has 'all(.components[]; has("components") | not) and all(.dependencies[]; .ref | startswith("pkg:") | not)'

begin "what is no hash is refused, and named"
jq '.closure[0].narHash = "md5:abc"' "$closure" > wrong.json
refuses sbom wrong.json
says "no SHA-256: md5:abc"

begin "it fits CycloneDX's schema"
sbom "$closure" > sbom.json
if python3 -c 'import cyclonedx.validation.json, jsonschema' 2> /dev/null; then
    python3 - sbom.json <<'END'
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1]).read())
sys.exit(f"{error}" if error else 0)
END
else
    echo "    not checked: Python lacks cyclonedx-python-lib[json-validation]"
fi
