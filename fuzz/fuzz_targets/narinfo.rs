//! Any bytes are a narinfo that is believed only as far as it is signed, or an error.
#![no_main]

use headgate::ota::cache::{PublicKey, narinfo};
use libfuzzer_sys::fuzz_target;
use nix_derivation::StorePath;

/// One that Nix has signed.
const SOUND: &str = "\
StorePath: /nix/store/0yl6dl210jlwrlr44lx7hdynhbdkcgp5-pkg0
URL: nar/12icwhk1b53jx7w40gc1bd0gd1plpivqy7110xxdgfajn0yh7x7r.nar.zst
Compression: zstd
FileHash: sha256:12icwhk1b53jx7w40gc1bd0gd1plpivqy7110xxdgfajn0yh7x7r
FileSize: 722
NarHash: sha256:1r9x84zlbsns86100fkmkxa1k57rj0lq5c5vq7jiyz363mszpczc
NarSize: 2928
References: 
Sig: b-1:zPFAxR6GT/GcFlo8nd0lUuKPOgx525tuMOfknSKJbipv1pWWwu1D3opP7JqIRM53Pz3FzUq1VNogWFrGl02PBw==
";
const KEY: &str = "b-1:S16rt2YVbbukbw5HgpthR4lI2tcZZsFmQ1Y5IHZWI/0=";
const PATH: &str = "/nix/store/0yl6dl210jlwrlr44lx7hdynhbdkcgp5-pkg0";

/// The bytes as they are, or as changes of the sound one: three bytes say where and what.
fn narinfo(bytes: &[u8]) -> Vec<u8> {
    let Some((0, changes)) = bytes.split_first().map(|(first, rest)| (first % 2, rest)) else {
        return bytes.to_vec();
    };
    let mut text = SOUND.as_bytes().to_vec();
    for change in changes.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]]));
        match at % 3 {
            0 => text.insert(at / 3 % (text.len() + 1), change[2]),
            1 if !text.is_empty() => drop(text.remove(at / 3 % text.len())),
            _ if !text.is_empty() => {
                let at = at / 3 % text.len();
                text[at] = change[2];
            }
            _ => {}
        }
    }
    text
}

fuzz_target!(|bytes: &[u8]| {
    thread_local! {
        static KEYS: [PublicKey; 1] = [KEY.parse().unwrap()];
        static ASKED: StorePath = PATH.parse().unwrap();
    }
    let text = narinfo(bytes);
    KEYS.with(|keys| {
        ASKED.with(|path| match narinfo::verify(&text, path, keys) {
            Ok(info) => {
                let sound = narinfo::verify(SOUND.as_bytes(), path, keys).unwrap();
                assert_eq!(info.store_path(), path);
                assert_eq!(info.nar_hash(), sound.nar_hash());
                assert_eq!(info.nar_size(), sound.nar_size());
                assert_eq!(info.references(), sound.references());
            }
            Err(fault) => assert!(!fault.to_string().is_empty()),
        });
    });
});
