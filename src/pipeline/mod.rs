//! From the edge to the apps: ring, batches, routing, accounting.
//!
//! Takes events in through [`Ingress`], hands batches to [`Outlet`]s. Does not know what an outlet
//! is (an app, a mapping): it never calls back into where events come from.

mod outlet;

pub use outlet::{Offer, Outlet, Progress, Route, RouteTable, Routes, Sink};
