"""Publishes the mean of the last readings of each topic, and how many readings there were, ever.

Takes {"value": 21.5} on a topic T, and publishes {"mean": 21.0, "of": 2, "ever": 17} to mean/T.
"""

import json
from collections import defaultdict, deque
from math import isfinite

import wit_world
from componentize_py_types import Err
from wit_world.imports import atomics, config, keyvalue, logging
from wit_world.imports.logging import Level
from wit_world.imports.types import Event

# Set by `configure`, which each new instance runs first.
last = defaultdict(deque)


class WitWorld(wit_world.WitWorld):
    def configure(self) -> None:
        global last
        text = config.get("of")
        if text is None or not text.isdecimal() or not 1 <= int(text) <= 1000:
            # What is raised as an `Err` stands in `headgate app inspect`.
            raise Err(f"config.of = {text!r}: give 1 to 1000")
        last = defaultdict(lambda: deque(maxlen=int(text)))

    def handle(self, batch: list[Event]) -> list[Event]:
        seen = keyvalue.open("seen")
        outputs = []
        for event in batch:
            try:
                value = float(json.loads(event.payload)["value"])
                if not isfinite(value):
                    raise ValueError(f"{value} is no reading")
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                # Any other exception would fail the batch, the good events in it too.
                logging.log(Level.WARN, "mean", f"{event.topic}: skipped: {error!r}")
                continue
            readings = last[event.topic]
            readings.append(value)
            mean = {
                "mean": sum(readings) / len(readings),
                "of": len(readings),
                "ever": atomics.increment(seen, event.topic, 1),
            }
            payload = json.dumps(mean).encode()
            outputs.append(Event(f"mean/{event.topic}", payload, event.timestamp))
        return outputs
