//! The `app` attribute of `headgate-sdk`. Read about it there.

#![forbid(unsafe_code)]

use proc_macro::{Delimiter, TokenStream, TokenTree};

/// Makes the type of this `impl App for …` the app of this component. Once in a crate.
#[proc_macro_attribute]
pub fn app(arguments: TokenStream, item: TokenStream) -> TokenStream {
    let exported = match arguments.is_empty() {
        true => implementing_type(&item).map(|app| format!("::headgate_sdk::export!({app});")),
        false => Err("`#[headgate_sdk::app]` takes no arguments"),
    };
    // Whatever is wrong, the item stays: else each use of it would be an error more.
    let more = exported.unwrap_or_else(|why| format!("::core::compile_error!({why:?});"));
    let more: TokenStream = more.parse().expect("types and texts are tokens");
    item.into_iter().chain(more).collect()
}

/// The type in `impl … for TYPE { … }`.
fn implementing_type(item: &TokenStream) -> Result<String, &'static str> {
    const NEEDED: &str = "put `#[headgate_sdk::app]` on an `impl App for …`";
    let tokens: Vec<TokenTree> = item.clone().into_iter().collect();
    let is_word = |token: &TokenTree, word: &str| matches!(token, TokenTree::Ident(name) if name.to_string() == word);
    let is_body = |token: &TokenTree| matches!(token, TokenTree::Group(group) if group.delimiter() == Delimiter::Brace);
    let begin = tokens.iter().position(|token| is_word(token, "impl"));
    // The first one, for a type can have one too: `for<'a>`.
    let from = tokens.iter().position(|token| is_word(token, "for"));
    let (Some(begin), Some(from)) = (begin, from) else {
        return Err(NEEDED);
    };
    let after = &tokens[from + 1..];
    let end = after
        .iter()
        .position(|token| is_body(token) || is_word(token, "where"));
    match end {
        Some(end) if end > 0 && begin < from => Ok(after[..end]
            .iter()
            .cloned()
            .collect::<TokenStream>()
            .to_string()),
        _ => Err(NEEDED),
    }
}
