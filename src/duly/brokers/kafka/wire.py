"""A message as Kafka carries it, and back: the CloudEvents binding for Kafka, in binary mode.

====================  ===========================================================================
``ce_id``             the id
``ce_source``         the source
``ce_type``           the topic, unless the message's headers name a type
``ce_time``           when it was made
``ce_...``            further attributes
key                   the key, in UTF-8
timestamp             when it was published
``duly``              there where duly published it
====================  ===========================================================================

What others publish needs a ``ce_id`` and nothing else, or what their topic says that events are
named by.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from duly.errors import InvalidMessage
from duly.identity import ids
from duly.message import Message, Topic, now_ms
from duly.message.limits import check_headers, check_id, check_key, check_source, is_time_ms

PREFIX = "ce_"
SOURCE_OF_STRANGERS = "kafka"
MARK = "duly"
OF = "duly-topic"
CHARGED, REPEATED, REPLAYS = "duly-charged", "duly-repeated", "duly-replays"
DUE_MS, TOKEN, DELAY_MS = "duly-due-ms", "duly-token", "duly-delay-ms"

UNREADABLE = "duly-unreadable"
OF_NAMES = (SystemError, UnicodeDecodeError)
"""what the driver raises for headers of which one has a name that is no UTF-8"""

# It raises and returns that list at once, which only calls from C notice: Python's own, of a method
# that it has called often, go on with the list.
_headers_of: Callable[[Any], Sequence[tuple[str, bytes | None]] | None]
_headers_of = operator.methodcaller("headers")

Headers = list[tuple[str, bytes]]


def headers_of(message: Message[Any]) -> Headers:
    """The headers of a record."""
    headers: Headers = [
        _MARKED,
        _VERSION,
        ("ce_id", message.id.encode()),
        _source(message.source),
        _time(message.time_ms),
    ]
    if "type" not in message.headers:
        headers.append(_type(message.topic))
    if message.headers:
        headers += [(PREFIX + name, value.encode()) for name, value in message.headers.items()]
    return headers


_MARKED = (MARK, b"1")
_VERSION = ("ce_specversion", b"1.0")


# Of many messages these are the same.
@functools.lru_cache(128)
def _source(source: str) -> tuple[str, bytes]:
    return "ce_source", source.encode()


@functools.lru_cache(1024)
def _type(topic: str) -> tuple[str, bytes]:
    return "ce_type", topic.encode()


@functools.lru_cache(128)
def _time(ms: int) -> tuple[str, bytes]:
    # In whole numbers: a float holds no milliseconds of the centuries to come.
    seconds, rest = divmod(ms, 1000)
    time = datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest * 1000)
    text = time.isoformat(timespec="milliseconds")
    return "ce_time", f"{text[:-6]}Z".encode()


def headers_in(record: Any) -> Sequence[tuple[str, bytes | None]]:
    """The headers of a record, as the driver gives them, which asks for names in UTF-8. Kafka does
    not: with another name it raises (confluent-kafka 2.16), and has a list from then on that takes
    the process with it when it is looked at. `UNREADABLE` stands in its place.
    """
    try:
        return _headers_of(record) or ()
    except OF_NAMES:
        return hide_headers(record)


def hide_headers(record: Any) -> Headers:
    """Put what can be looked at in the place of headers that cannot."""
    hidden: Headers = [(UNREADABLE, f"{record.partition()}/{record.offset()}".encode())]
    record.set_headers(hidden)
    return hidden


def read_headers(given: Sequence[tuple[str, bytes | None]] | None) -> dict[str, str]:
    """The headers of a record as text; of one that stands there twice the last. Raises
    `InvalidMessage`.
    """
    if given and given[0][0] == UNREADABLE:
        raise InvalidMessage("a header whose name is no UTF-8: its headers cannot be read")
    try:
        return {name: "" if value is None else value.decode() for name, value in given or ()}
    except UnicodeDecodeError as error:
        raise InvalidMessage(f"a header that is no UTF-8: {error.reason}") from error


def message_in(
    declared: Topic[Any],
    headers: Mapping[str, str],
    key: bytes | None,
    body: bytes,
    stamped_ms: int,
) -> Message[Any]:
    """The message in a record. Raises `InvalidMessage` for one that has no identity, or whose
    parts are none that duly would carry.
    """
    topic = declared.name
    attributes = {
        name[len(PREFIX) :].lower(): value
        for name, value in headers.items()
        if name.startswith(PREFIX)
    }
    id: Any = attributes.pop("id", None)
    if declared.naming is not None and MARK not in headers:
        id = declared.naming.of_foreign(headers, body)
    if not id:
        id = _id_of_nameless(declared)
    check_id(topic, id)
    source = attributes.pop("source", None) or SOURCE_OF_STRANGERS
    check_source(topic, id, source)
    time_ms = _ms_in(attributes.pop("time", None), stamped_ms)
    for own in ("specversion", "data", "partitionkey"):
        attributes.pop(own, None)
    if attributes.get("type") == topic:
        del attributes["type"]
    checked = check_headers(topic, id, attributes) if attributes else attributes
    if key is None:
        return Message(topic, source, id, body, time_ms, None, checked)
    try:
        text = key.decode()
    except UnicodeDecodeError as error:
        raise InvalidMessage(f"topic {topic!r}, message {id!r}: a key that is no UTF-8") from error
    check_key(topic, id, text)
    return Message(topic, source, id, body, time_ms, text, checked)


def _id_of_nameless(topic: Topic[Any]) -> str:
    if topic.without_identity == "accept":
        return ids.one()
    needed = "the header ce_id"
    if topic.dedup_by is not None:
        needed = f"what dedup_by={topic.dedup_by!r} names"
    raise InvalidMessage(
        f"topic {topic.name!r}: a message without identity: its producer gives it {needed}"
    )


def _ms_in(text: str | None, stamped_ms: int) -> int:
    """When it was made: as it says, or else when it was published."""
    if text is not None:
        try:
            said_ms = round(datetime.fromisoformat(text).timestamp() * 1000)
        except (ValueError, OverflowError):
            said_ms = -1
        if is_time_ms(said_ms):
            return said_ms
    return stamped_ms if is_time_ms(stamped_ms) else now_ms()
