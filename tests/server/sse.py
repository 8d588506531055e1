"""Read the text of a server-sent event stream."""

import json
from typing import Any


def data_of(text: str) -> list[str]:
    """Return what follows `data: ` in each event, comments left out."""
    events = [event for event in text.split("\n\n") if event and not event.startswith(":")]
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event.removeprefix("data: ") for event in events]


def chunks_of(text: str) -> list[dict[str, Any]]:
    """Return the chunks of a stream that ended well."""
    data = data_of(text)
    assert data[-1] == "[DONE]"
    return [json.loads(each) for each in data[:-1]]
