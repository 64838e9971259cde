//! What the store has when the gateway starts.

use std::ops::ControlFlow;

use rustc_hash::FxHashMap;

use super::{Restored, State};
use crate::broker::stored::{self, Clock};
use crate::dead_letters::DeadLetters;
use crate::store::{Counter, MqttSnapshot, Queue, Store, StoreError, queued_cost};

/// Bits of a session's number that count the sessions of one run of the gateway.
const RUN_BITS: u32 = 40;

/// Reads all but what is queued. What is over by now is to be removed.
pub(super) fn restore(
    store: &Store,
    dead_letters: &DeadLetters,
    clock: Clock,
) -> Result<(State, Restored, u64), StoreError> {
    let snapshot = store.read_mqtt()?;
    let mut state = State::default();
    let mut restored = Restored::default();
    let mut damaged = 0;
    let mut all_sessions_known = true;

    snapshot.each_session(|client_id, record| {
        let session = std::str::from_utf8(client_id)
            .map_err(|error| error.to_string())
            .and_then(|client_id| {
                let session = stored::decode_session(record, clock);
                session
                    .map(|session| (client_id, session))
                    .map_err(|error| error.to_string())
            });
        match session {
            Err(error) => {
                damaged += 1;
                all_sessions_known = false;
                tracing::error!(
                    client_id = %String::from_utf8_lossy(client_id),
                    error,
                    "a session in the store can't be read: its client begins anew",
                );
            }
            Ok((client_id, session)) if session.expires_at(clock.now) <= clock.now => {
                state.waiting.sessions.insert(client_id.into(), None);
                state.waiting.gone.insert(session.number);
                restored.wills.extend(session.will);
            }
            Ok((client_id, session)) => {
                state.numbers.insert(client_id.into(), session.number);
                restored.sessions.push((client_id.to_owned(), session));
            }
        }
    })?;
    let mut without_topic = 0;
    snapshot.each_retained(|record| match stored::decode_message(record, clock) {
        Ok(message) if message.is_expired(clock.now) => {
            state.waiting.retained.insert(message.topic, None);
        }
        Ok(message) => restored.retained.push(message),
        Err(error) => {
            without_topic += 1;
            tracing::error!(%error, "a retained message in the store can't be read");
        }
    })?;
    damaged += without_topic;
    let mut letters = Vec::new();
    let mut unreadable_letters = 0;
    snapshot.each_dead_letter(
        |sequence, record| match stored::decode_dead_letter(record) {
            Ok(letter) => letters.push((sequence, letter)),
            Err(error) => {
                unreadable_letters += 1;
                tracing::error!(sequence, %error, "a dead letter in the store can't be read");
            }
        },
    )?;
    damaged += unreadable_letters;
    let next = counter(&snapshot, Counter::NextDeadLetter).unwrap_or(0);
    dead_letters.restore(letters, next);

    let known: FxHashMap<u64, usize> = restored
        .sessions
        .iter()
        .enumerate()
        .map(|(index, (_, session))| (session.number, index))
        .collect();
    let mut last_number = known.keys().copied().max().unwrap_or(0);
    for Queue {
        number,
        first,
        last,
    } in snapshot.queues()?
    {
        last_number = last_number.max(number);
        match known.get(&number) {
            Some(&index) => {
                let session = &mut restored.sessions[index].1;
                session.next_sequence = session.next_sequence.max(last.saturating_add(1));
                let mut bytes = 0;
                snapshot.each_queued(number, first, |_, value| {
                    bytes += queued_cost(value.len()) as usize;
                    ControlFlow::Continue(())
                })?;
                restored.queued.insert(number, (first..last + 1, bytes));
            }
            None if all_sessions_known => {
                state.waiting.gone.insert(number);
            }
            // It may belong to a session that can't be read, and may be of use to whoever can.
            None => tracing::warn!(
                number,
                "messages are kept in the store for a session that is not known"
            ),
        }
    }
    let run = counter(&snapshot, Counter::Runs).unwrap_or(0) + 1;
    state.waiting.run = Some(run);
    restored.first_number = (run << RUN_BITS).max(last_number + 1);
    state.committed_bytes = match counter(&snapshot, Counter::QueuedBytes) {
        Some(bytes) => bytes,
        None => snapshot.sum_up_queued()?,
    };
    Ok((state, restored, damaged))
}

/// One that can't be read counts as one that was never written.
fn counter(snapshot: &MqttSnapshot, counter: Counter) -> Option<u64> {
    snapshot.counter(counter).unwrap_or_else(|error| {
        tracing::warn!(%error, ?counter, "a counter in the store can't be read; it begins anew");
        None
    })
}
