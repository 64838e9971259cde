//! `headgate why`: what became of the last events on a topic.

use clap::Args;

use super::app::utc;
use super::output::{Output, one_line, printable};
use super::{Global, mapping, small_runtime};
use crate::event::Topic;
use crate::pipeline::Step;
use crate::why::{Explanation, meaning};

/// Say what became of the last events on a topic, and why nothing came out
///
/// The running gateway remembers the last steps of the topics that it has seen lately. Of many events at once it
/// notes only some.
///
/// mapping/NAME/VIRTUAL.PATH, mapping/NAME and mapping/VIRTUAL.PATH say it of the outputs of mappings.
#[derive(Args)]
pub(super) struct WhyArgs {
    /// Topic, without wildcards
    #[arg(value_parser = |text: &str| Topic::new(text.to_owned()))]
    topic: Topic,
}

pub(super) fn run(args: WhyArgs, global: &Global, output: &Output) -> anyhow::Result<()> {
    let client = global.client()?;
    let runtime = small_runtime()?;
    if let Some(path) = args.topic.as_str().strip_prefix("mapping/") {
        return mapping::explain(&runtime.block_on(client.why_mapping(path))?, output);
    }
    let explanation = runtime.block_on(client.why(args.topic.as_str()))?;
    if output.json {
        return output.value(&explanation);
    }
    facts(&explanation, output)?;
    if !explanation.steps.is_empty() {
        output.text("")?;
        let rows: Vec<_> = explanation
            .steps
            .iter()
            .map(|traced| [utc(traced.time_ms), one_line(&text(&traced.step))])
            .collect();
        output.table(["TIME", "WHAT HAPPENED"], &rows)?;
    }
    output.text("")?;
    for sentence in &explanation.because {
        output.text(format!("- {}", one_line(sentence)))?;
    }
    Ok(())
}

fn facts(explanation: &Explanation, output: &Output) -> anyhow::Result<()> {
    let rule = match explanation.rule {
        Some(number) => format!("rule {number} of pipeline.rules_file"),
        None => "no rule".to_owned(),
    };
    let durable = match explanation.durable {
        true => "in the journal",
        false => "not in the journal",
    };
    let dedup = match explanation.dedup.as_deref() {
        None => "duplicates are not looked for".to_owned(),
        Some("content") => "duplicates are told by their content".to_owned(),
        Some(name) => format!("duplicates are told by {name}"),
    };
    let listed = |names: Vec<String>| match names.is_empty() {
        true => "none".to_owned(),
        false => names.join(", "),
    };
    let apps = explanation
        .apps
        .iter()
        .map(|app| format!("{} ({}, by {})", app.app, app.state, app.filter));
    let mut subscribers: Vec<_> = explanation
        .some_subscribers
        .iter()
        .map(|subscription| subscription.client_id.clone())
        .collect();
    let more = explanation.subscribers - subscribers.len();
    subscribers.extend((more > 0).then(|| format!("{more} more")));
    for (name, value) in [
        ("topic", explanation.topic.clone()),
        (
            "lane",
            format!("{} ({rule}); {durable}; {dedup}", explanation.lane.as_str()),
        ),
        ("apps", listed(apps.collect())),
        ("mappings", listed(explanation.mappings.clone())),
        ("clients", listed(subscribers)),
        ("published by", listed(explanation.publishers.clone())),
    ] {
        output.text(format!("{name:<13} {}", printable(&value)))?;
    }
    Ok(())
}

fn text(step: &Step) -> String {
    match step {
        Step::Taken => "taken in for the apps that want it".to_owned(),
        Step::Unwanted => "taken in; no app wants it".to_owned(),
        Step::Duplicate => "a duplicate: it goes to no app".to_owned(),
        Step::Dropped { by, reason } => format!("dropped ({by}): {}", meaning(*reason)),
        Step::Handled {
            app,
            events,
            published,
            refused,
        } => {
            let refused = match refused {
                0 => String::new(),
                refused => format!(", {refused} calls refused"),
            };
            format!("{app} handled it: {events} events in the call, {published} published{refused}")
        }
        Step::Failed { app, error } => format!("{app} failed: {error}"),
        Step::Published { app } => format!("{app} published it"),
    }
}
