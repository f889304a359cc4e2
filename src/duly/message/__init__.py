"""What travels: `Message`, the `Topic` it belongs to, and its identity.

A message is identified once, by its producer: ``source`` (the app's name) and ``id`` name one
event, as in CloudEvents 1.0, and everything that drops repeats goes by that pair and never by
content.
"""

from __future__ import annotations

from duly.message.limits import (
    DEFAULT_MAX_BODY_BYTES,
    MAX_DELAY_S,
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_ID_CHARS,
    MAX_KEY_CHARS,
    MAX_NAME_CHARS,
    check_headers,
    check_id,
    check_key,
    check_name,
    is_number,
    is_whole,
)
from duly.message.message import (
    NO_HEADERS,
    Alike,
    Message,
    body_hashes,
    due_ms,
    key_lane_of,
    largest_of,
    now_ms,
    partition_of,
    topics_of,
)
from duly.message.topic import Topic, checked_topic

__all__ = [
    "DEFAULT_MAX_BODY_BYTES",
    "MAX_DELAY_S",
    "MAX_HEADERS",
    "MAX_HEADER_BYTES",
    "MAX_ID_CHARS",
    "MAX_KEY_CHARS",
    "MAX_NAME_CHARS",
    "NO_HEADERS",
    "Alike",
    "Message",
    "Topic",
    "body_hashes",
    "check_headers",
    "check_id",
    "check_key",
    "check_name",
    "checked_topic",
    "due_ms",
    "is_number",
    "is_whole",
    "key_lane_of",
    "largest_of",
    "now_ms",
    "partition_of",
    "topics_of",
]
