//! What the MQTT edge of the running gateway does: clients, subscriptions, topics.

use std::fmt::Display;

use clap::Subcommand;
use serde::Serialize;

use super::output::{Output, printable};
use super::{Global, small_runtime};
use crate::admin::Client;
use crate::broker::{ClientInfo, Listed, RetainedInfo, SubscriptionInfo, TopicInfo};

#[derive(Subcommand)]
pub(super) enum MqttCommand {
    /// List the MQTT clients, connected or away with their session kept
    Clients {
        /// Show at most N
        #[arg(long, value_name = "N", default_value_t = 1000)]
        max: usize,
    },
    /// Act on an MQTT client
    #[command(subcommand)]
    Client(ClientCommand),
    /// List the subscriptions of MQTT clients
    Subscriptions {
        /// Only those of this client
        #[arg(long, value_name = "ID")]
        client: Option<String>,
        /// Show at most N
        #[arg(long, value_name = "N", default_value_t = 1000)]
        max: usize,
    },
    /// List retained messages
    Retained {
        /// Only topics that this topic filter matches
        #[arg(default_value = "#")]
        filter: String,
        /// Show at most N
        #[arg(long, value_name = "N", default_value_t = 1000)]
        max: usize,
    },
    /// List the topics that are published to, the busiest first
    Topics {
        /// Only topics that this topic filter matches
        #[arg(default_value = "#")]
        filter: String,
        /// Show at most N
        #[arg(long, value_name = "N", default_value_t = 100)]
        max: usize,
    },
}

#[derive(Subcommand)]
pub(super) enum ClientCommand {
    /// End a client's connection; its session stays, if it is kept
    Disconnect {
        #[arg(value_name = "ID")]
        client: String,
    },
    /// End a client's connection and its session, with all that waits for it
    Forget {
        #[arg(value_name = "ID")]
        client: String,
    },
}

pub(super) fn run(command: MqttCommand, global: &Global, output: &Output) -> anyhow::Result<()> {
    let client = global.client()?;
    small_runtime()?.block_on(ask(command, &client, output))
}

async fn ask(command: MqttCommand, client: &Client, output: &Output) -> anyhow::Result<()> {
    match command {
        MqttCommand::Clients { max } => {
            let max = max.to_string();
            let listed = client.mqtt_list("clients", &[("max", &max)]).await?;
            let header = [
                "CLIENT",
                "STATE",
                "ADDRESS",
                "MQTT",
                "SUBSCRIPTIONS",
                "IN FLIGHT",
                "QUEUED",
            ];
            show(&listed, header, output, |client: &ClientInfo| {
                let state = if client.connected {
                    "connected"
                } else {
                    "away"
                };
                [
                    printable(&client.client_id),
                    state.to_owned(),
                    client.address.clone().unwrap_or_else(nothing),
                    client.version.clone(),
                    client.subscriptions.to_string(),
                    client.inflight_messages.to_string(),
                    client.queued_messages.to_string(),
                ]
            })
        }
        MqttCommand::Client(ClientCommand::Disconnect { client: id }) => {
            client.disconnect(&id).await?;
            if output.json {
                output.value(&serde_json::json!({ "disconnected": id }))
            } else {
                output.text(format!("{} disconnected", printable(&id)))
            }
        }
        MqttCommand::Client(ClientCommand::Forget { client: id }) => {
            client.forget(&id).await?;
            if output.json {
                output.value(&serde_json::json!({ "forgotten": id }))
            } else {
                output.text(format!("{} forgotten", printable(&id)))
            }
        }
        MqttCommand::Subscriptions { client: id, max } => {
            let max = max.to_string();
            let mut query = vec![("max", max.as_str())];
            query.extend(id.as_deref().map(|id| ("client", id)));
            let listed = client.mqtt_list("subscriptions", &query).await?;
            let header = ["CLIENT", "FILTER", "GROUP", "QOS"];
            show(
                &listed,
                header,
                output,
                |subscription: &SubscriptionInfo| {
                    [
                        printable(&subscription.client_id),
                        printable(&subscription.filter),
                        subscription
                            .group
                            .as_deref()
                            .map_or_else(nothing, printable),
                        subscription.qos.to_string(),
                    ]
                },
            )
        }
        MqttCommand::Retained { filter, max } => {
            let max = max.to_string();
            let query = [("filter", filter.as_str()), ("max", &max)];
            let listed = client.mqtt_list("retained", &query).await?;
            let header = ["TOPIC", "QOS", "BYTES", "PAYLOAD"];
            show(&listed, header, output, |message: &RetainedInfo| {
                [
                    printable(&message.topic),
                    message.qos.to_string(),
                    message.payload_bytes.to_string(),
                    message.payload.as_deref().map_or_else(nothing, printable),
                ]
            })
        }
        MqttCommand::Topics { filter, max } => {
            let max = max.to_string();
            let query = [("filter", filter.as_str()), ("max", &max)];
            let listed = client.mqtt_list("topics", &query).await?;
            show(
                &listed,
                ["TOPIC", "MESSAGES", "BYTES"],
                output,
                |topic: &TopicInfo| {
                    [
                        printable(&topic.topic),
                        topic.messages.to_string(),
                        topic.payload_bytes.to_string(),
                    ]
                },
            )
        }
    }
}

fn nothing() -> String {
    "-".to_owned()
}

fn show<T: Serialize, const N: usize>(
    listed: &Listed<T>,
    header: [&str; N],
    output: &Output,
    row: impl Fn(&T) -> [String; N],
) -> anyhow::Result<()> {
    if output.json {
        return output.value(listed);
    }
    let rows: Vec<_> = listed.items.iter().map(row).collect();
    output.table(header, &rows)?;
    if listed.truncated {
        output.text(more(listed.items.len()))?;
    }
    Ok(())
}

fn more(shown: impl Display) -> String {
    format!("… and more: these are the first {shown}; --max N shows more")
}
