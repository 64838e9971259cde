//! Shipping what is in the journal to other machines.

pub mod window;
