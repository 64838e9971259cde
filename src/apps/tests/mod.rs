//! Apps as their operator and the pipeline see them, with guests that do their worst.

mod columns;
mod devices;
pub(crate) mod house;
mod install;
mod keeping;
mod lifecycle;
mod limits;
mod measuring;
mod misbehaviour;
mod preinstalled;
mod scheduling;
mod seats;
mod speed;
mod timing;
mod upgrading;
