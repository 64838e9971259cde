//! What the API says of the MQTT edge.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Json;
use serde::Deserialize;
use serde_json::{Value, json};

use super::api::{Answer, Api, Refusal, blocking};
use crate::broker::{ClientInfo, Listed, RetainedInfo, SubscriptionInfo, TopicInfo};
use crate::event::TopicFilter;

/// Items in an answer, if nothing else is asked for.
const DEFAULT_ITEMS: usize = 1000;

/// What a list can be narrowed to.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListQuery {
    max: Option<usize>,
    client: Option<String>,
    filter: Option<String>,
}

pub(super) type QueryResult<T> = Result<Query<T>, QueryRejection>;

pub(super) fn parse<T>(query: QueryResult<T>, takes: &str) -> Result<T, Refusal> {
    query.map(|Query(query)| query).map_err(|rejection| {
        let error = format!("this path takes {takes}: {}", rejection.body_text());
        Refusal::new(StatusCode::BAD_REQUEST, error)
    })
}

impl ListQuery {
    fn max(&self) -> usize {
        self.max.unwrap_or(DEFAULT_ITEMS)
    }

    fn filter(&self) -> Result<TopicFilter, Refusal> {
        let text = self.filter.clone().unwrap_or_else(|| "#".into());
        TopicFilter::new(text.clone()).map_err(|error| {
            let error = format!("?filter={text}: {error}");
            Refusal::new(StatusCode::BAD_REQUEST, error)
        })
    }
}

pub(super) async fn clients(
    State(api): State<Api>,
    query: QueryResult<ListQuery>,
) -> Answer<Listed<ClientInfo>> {
    let max = parse(query, "?max=N")?.max();
    blocking(move || Ok(api.state.broker.clients(max)))
        .await
        .map(Json)
}

pub(super) async fn subscriptions(
    State(api): State<Api>,
    query: QueryResult<ListQuery>,
) -> Answer<Listed<SubscriptionInfo>> {
    let query = parse(query, "?client=ID and ?max=N")?;
    blocking(move || {
        let client = query.client.as_deref();
        Ok(api.state.broker.subscriptions(client, query.max()))
    })
    .await
    .map(Json)
}

pub(super) async fn retained(
    State(api): State<Api>,
    query: QueryResult<ListQuery>,
) -> Answer<Listed<RetainedInfo>> {
    let query = parse(query, "?filter=FILTER and ?max=N")?;
    let filter = query.filter()?;
    blocking(move || Ok(api.state.broker.retained(&filter, query.max())))
        .await
        .map(Json)
}

pub(super) async fn topics(
    State(api): State<Api>,
    query: QueryResult<ListQuery>,
) -> Answer<Listed<TopicInfo>> {
    let query = parse(query, "?filter=FILTER and ?max=N")?;
    let filter = query.filter()?;
    blocking(move || Ok(api.state.broker.topics(&filter, query.max())))
        .await
        .map(Json)
}

#[derive(Deserialize)]
pub(super) struct ClientQuery {
    client: String,
}

pub(super) async fn disconnect(
    State(api): State<Api>,
    query: QueryResult<ClientQuery>,
) -> Answer<Value> {
    let ClientQuery { client } = parse(query, "?client=ID")?;
    if api.state.broker.disconnect(&client) {
        return Ok(Json(json!({ "disconnected": client })));
    }
    let error =
        format!("no client {client:?} is connected; `headgate clients` lists those that are");
    Err(Refusal::new(StatusCode::NOT_FOUND, error))
}

pub(super) async fn forget(
    State(api): State<Api>,
    query: QueryResult<ClientQuery>,
) -> Answer<Value> {
    let ClientQuery { client } = parse(query, "?client=ID")?;
    if api.state.broker.forget(&client).await {
        return Ok(Json(json!({ "forgotten": client })));
    }
    let error = format!(
        "no client {client:?} is connected or has a session; `headgate clients` lists those that do"
    );
    Err(Refusal::new(StatusCode::NOT_FOUND, error))
}
