// Publishes a reading only when it has changed by enough, and counts what it has held back.
//
// Takes {"value": 21.5} on a topic T, and publishes the event as it came to changed/T.

import { get } from "wasi:config/store@0.2.0-draft";
import { log } from "wasi:logging/logging@0.1.0-draft";
import { counterAdd } from "headgate:app/metrics@0.1.0";

let least;
const last = new Map();

export function configure() {
  const text = get("least_change");
  least = Number(text);
  if (text === undefined || !(least > 0)) {
    // What is thrown stands in `headgate app inspect`.
    throw `config.least_change = ${text}: give a number above 0`;
  }
}

// There is no TextDecoder.
function text(bytes) {
  const escaped = Array.from(bytes, (byte) => "%" + byte.toString(16).padStart(2, "0"));
  return decodeURIComponent(escaped.join(""));
}

function reading(event) {
  const value = JSON.parse(text(event.payload)).value;
  if (typeof value !== "number") throw new Error("no number as `value`");
  return value;
}

export function handle(batch) {
  const outputs = [];
  let heldBack = 0;
  for (const event of batch) {
    let value;
    try {
      value = reading(event);
    } catch (error) {
      // Uncaught, it would fail the batch, the good events in it too.
      log("warn", "changed", `${event.topic}: skipped: ${error.message}`);
      continue;
    }
    const before = last.get(event.topic);
    if (before !== undefined && Math.abs(value - before) < least) {
      heldBack += 1;
      continue;
    }
    last.set(event.topic, value);
    outputs.push({ ...event, topic: `changed/${event.topic}` });
  }
  if (heldBack > 0) counterAdd("held_back", heldBack);
  return outputs;
}
