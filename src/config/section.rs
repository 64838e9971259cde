//! The `sections!` macro: a section of the configuration, declared once.
//!
//! From one declaration come the struct that rooms read and the [`Key`](super::key::Key)s that the
//! resolver, the schema and the documentation read, so that they can't disagree. A field's doc
//! comment is its description everywhere.

/// Declares a struct for the table `$table` of the configuration file. Each field says its type,
/// how a value is checked, and the default as one would write it in an environment variable.
/// Sections inside it come last, after `..`.
macro_rules! section {
    (
        $(#[doc = $about:literal])+
        $name:ident = $table:literal {
            $(
                $(#[doc = $doc:literal])+
                $field:ident: $type:ty = $kind:expr, $preset:expr;
            )*
            $(.. $inner:ident: $Inner:ident;)*
        }
    ) => {
        $(#[doc = $about])+
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $name {
            $($(#[doc = $doc])+ pub $field: $type,)*
            $(pub $inner: $Inner,)*
        }

        impl $name {
            pub(super) const SECTION: $crate::config::key::Section = $crate::config::key::Section {
                table: $table,
                about: concat!($($about),+),
                keys: &[$($crate::config::key::Key {
                    name: concat!($table, ".", stringify!($field)),
                    description: concat!($($doc),+),
                    kind: $kind,
                    preset: $preset,
                },)*],
                inner: &[$(&$Inner::SECTION),*],
            };

            pub(super) fn read(values: &impl $crate::config::value::Lookup) -> Self {
                $name {
                    $($field: $crate::config::value::field(
                        values,
                        concat!($table, ".", stringify!($field)),
                    ),)*
                    $($inner: $Inner::read(values),)*
                }
            }
        }
    };
}

pub(super) use section;
