//! The gateway as its users have it: the real program, real clients, real components.
//!
//! Each test starts gateways of its own, in folders of their own, on ports that the system chooses,
//! so that all can run side by side. Nothing here waits by the clock: a test waits for the thing
//! itself, and fails when that hasn't come after [`gateway::PATIENCE`].

mod apps;
mod gateway;
mod mosquitto;
mod nats;
mod neighbours;
mod nix;
mod wire;

mod access;
mod bad_apps;
mod bad_packets;
mod bad_starts;
mod boot;
mod bridge;
mod clients;
mod clock;
mod cluster;
mod dashboards;
mod dead_letters;
mod defects;
mod developing;
mod ingest;
mod journal;
mod kept_state;
mod lanes;
mod loss;
mod mappings;
mod operations;
mod ota;
mod ota_cache;
mod overload;
mod persistence;
mod preinstalled;
mod restarts;
mod site;
mod system_topics;
mod tls;
mod upgrades;
mod uplink;
mod websocket;
