//! What the API says of the mappings, and does with them.

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Json;
use serde::Deserialize;
use serde_json::{Value, json};

use super::api::{Answer, Api, Refusal, blocking, read_body};
use super::mqtt::{QueryResult, parse};
use crate::mappings::{MAX_CONFIG_BYTES, MappingError, MappingInfo, OutputStatus};

impl From<MappingError> for Refusal {
    fn from(error: MappingError) -> Refusal {
        let status = match &error {
            MappingError::NotFound(_) | MappingError::NoOutput(_) => StatusCode::NOT_FOUND,
            MappingError::Name(_) | MappingError::Config(_) => StatusCode::UNPROCESSABLE_ENTITY,
            MappingError::Preinstalled(_) | MappingError::DoesNotRun { .. } => StatusCode::CONFLICT,
            MappingError::Busy => StatusCode::SERVICE_UNAVAILABLE,
            MappingError::Folder { .. } | MappingError::Thread(_) | MappingError::Store(_) => {
                tracing::error!(%error, "an admin request failed");
                StatusCode::INTERNAL_SERVER_ERROR
            }
        };
        Refusal::new(status, error.to_string())
    }
}

pub(super) async fn list(State(api): State<Api>) -> Answer<Value> {
    let mappings = api.state.mappings;
    blocking(move || Ok(json!({ "mappings": mappings.list()? })))
        .await
        .map(Json)
}

pub(super) async fn inspect(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Answer<MappingInfo> {
    let mappings = api.state.mappings;
    blocking(move || Ok(mappings.inspect(&name)?))
        .await
        .map(Json)
}

pub(super) async fn install(
    State(api): State<Api>,
    Path(name): Path<String>,
    body: Body,
) -> Result<(StatusCode, Json<MappingInfo>), Refusal> {
    let config = read_body(body, MAX_CONFIG_BYTES, "configuration").await?;
    let mappings = api.state.mappings;
    let installed = blocking(move || {
        let config = std::str::from_utf8(&config).map_err(|error| {
            let error = format!("the configuration is not UTF-8: {error}");
            Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, error)
        })?;
        Ok(mappings.install(&name, config)?)
    });
    Ok((StatusCode::CREATED, Json(installed.await?)))
}

pub(super) async fn remove(State(api): State<Api>, Path(name): Path<String>) -> Answer<Value> {
    let mappings = api.state.mappings;
    blocking(move || {
        mappings.remove(&name)?;
        Ok(json!({ "removed": name }))
    })
    .await
    .map(Json)
}

/// As [`install`] takes it.
pub(super) async fn config(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<String, Refusal> {
    let mappings = api.state.mappings;
    blocking(move || Ok(mappings.config(&name)?)).await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WhyQuery {
    path: String,
}

pub(super) async fn why(
    State(api): State<Api>,
    query: QueryResult<WhyQuery>,
) -> Answer<Vec<OutputStatus>> {
    let WhyQuery { path } = parse(query, "?path=NAME/VIRTUAL.PATH")?;
    let mappings = api.state.mappings;
    blocking(move || Ok(mappings.why(&path)?)).await.map(Json)
}
