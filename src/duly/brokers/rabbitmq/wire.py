"""A message as RabbitMQ carries it, and back: properties, and the CloudEvents binding for AMQP.

====================  ===========================================================================
``message-id``        the id; one of over 255 bytes is in the header ``cloudEvents:id``
``app-id``            the source; one of over 255 bytes is in ``cloudEvents:source``
``type``              the topic
``cloudEvents:...``   headers: further attributes, and the key as ``cloudEvents:partitionkey``
``duly-time-ms``      when it was made; ``timestamp`` has the same in whole seconds
``duly-due-ms``       when it is due, where it has a due time
====================  ===========================================================================

What others publish needs an id and nothing else: ``message-id``, or ``cloudEvents:id``; or what
their topic says that events are named by.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any

import msgspec

from duly.brokers.rabbitmq.transport import UNREADABLE
from duly.errors import InvalidMessage
from duly.identity import ids
from duly.message import Message, Topic, now_ms
from duly.message.limits import check_headers, check_id, check_key, check_source, is_time_ms

# One of the two prefixes of the binding; the other is for clients that cannot write a colon.
PREFIX, _OTHER_PREFIX = "cloudEvents:", "cloudEvents_"
KEY = f"{PREFIX}partitionkey"
SHORT = 255  # bytes of a property

CHARGED, REPEATED = "duly-charged", "duly-repeated"
ERROR, ATTEMPTS, DEAD_MS = "duly-error", "duly-attempts", "duly-dead-ms"
REPLAYS = "duly-replays"
TIME_MS, DUE_MS = "duly-time-ms", "duly-due-ms"
_DELIVERIES = "x-delivery-count"
# What the server writes there, or would send copies by.
_OF_THE_SERVER = (_DELIVERIES, "x-death", "CC")
# Properties that are about one sending: the server refuses another user's name, and lets what is
# over go.
_OF_ITS_SENDING = ("delivery_mode", "user_id", "expiration")
# What told the way of a message until it came here.
_OF_THE_WAY = ("x-first-death-", "x-last-death-", "duly-wait-", "duly-to", "duly-if-unheard")


class History(msgspec.Struct, frozen=True, gc=False):
    """What travels with a message that was moved: how many starts are charged to it, and whether
    it may have been started before.
    """

    charged: int = 0
    repeated: bool = False


def properties_of(message: Message[Any], history: History | None = None) -> dict[str, Any]:
    """The AMQP properties of a message."""
    headers: dict[str, Any] = {TIME_MS: message.time_ms}
    for name, value in message.headers.items():
        headers[PREFIX + name] = value
    if message.due_ms is not None:
        headers[DUE_MS] = message.due_ms
    if message.key is not None:
        headers[KEY] = message.key
    properties = {
        "type": message.topic,
        "timestamp": message.time_ms // 1000,
        "application_headers": headers,
    }
    for short, long, text in (
        ("message_id", "id", message.id),
        ("app_id", "source", message.source),
    ):
        if len(text.encode()) <= SHORT:
            properties[short] = text
        else:
            headers[PREFIX + long] = text
    if history is not None:
        headers |= {CHARGED: history.charged, REPEATED: history.repeated}
    return properties


def moved(
    properties: Mapping[str, Any], history: History, more: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """The properties of a message that is moved as it is, whoever published it."""
    headers = {
        name: value
        for name, value in (properties.get("application_headers") or {}).items()
        if name not in _OF_THE_SERVER and not str(name).startswith(_OF_THE_WAY)
    }
    headers |= {CHARGED: history.charged, REPEATED: history.repeated, **more}
    kept = {name: value for name, value in properties.items() if name not in _OF_ITS_SENDING}
    return kept | {"application_headers": headers}


def history_in(properties: Mapping[str, Any]) -> History:
    """What travels with a message; nothing, where a stranger wrote something else there."""
    headers = properties.get("application_headers") or {}
    charged = headers.get(CHARGED, 0)
    return History(
        charged if isinstance(charged, int) and charged >= 0 else 0,
        headers.get(REPEATED) is True,
    )


def replays_in(properties: Mapping[str, Any]) -> int:
    """How often people brought it back from the dead letters."""
    replays = (properties.get("application_headers") or {}).get(REPLAYS, 0)
    return replays if isinstance(replays, int) and replays >= 0 else 0


def deliveries_in(properties: Mapping[str, Any]) -> int:
    """How often the server took it back from somebody who was gone."""
    deliveries = (properties.get("application_headers") or {}).get(_DELIVERIES, 0)
    return deliveries if isinstance(deliveries, int) and deliveries >= 0 else 0


def body_of(message: Any) -> bytes:
    """The body as it was sent; of a message without one the driver makes text."""
    body = message.body
    return body if isinstance(body, bytes) else str(body).encode()


def message_in(declared: Topic[Any], raw: bytes, properties: Mapping[str, Any]) -> Message[Any]:
    """The message that was delivered. Raises `InvalidMessage` for one that has no identity, or
    whose parts are none that duly would carry.
    """
    topic = declared.name
    headers = properties.get("application_headers") or {}
    if UNREADABLE in headers:
        why = headers[UNREADABLE]
        raise InvalidMessage(f"topic {topic!r}: properties that cannot be read: {why}")
    if len(headers) == 1 and (plain := _plain(topic, raw, properties, headers)) is not None:
        return plain
    attributes = _attributes(headers)
    id = attributes.pop("id", None) or properties.get("message_id")
    if declared.naming is not None and TIME_MS not in headers:
        id = declared.naming.of_foreign(headers, raw)
    if not id:
        id = _id_of_nameless(declared)
    check_id(topic, id)
    source = attributes.pop("source", None) or properties.get("app_id") or "amqp"
    check_source(topic, id, source)
    key = attributes.pop("partitionkey", None)
    if key is not None:
        check_key(topic, id, key)
    time_ms = _time_ms(headers, attributes.pop("time", None), properties.get("timestamp"))
    for own in ("specversion", "data"):
        attributes.pop(own, None)
    if attributes.get("type") == topic:
        del attributes["type"]
    due_ms = headers.get(DUE_MS)
    if not isinstance(due_ms, int):
        due_ms = None
    checked = check_headers(topic, id, attributes)
    return Message(topic, source, id, raw, time_ms, key, checked, due_ms)


def _plain(
    topic: str, raw: bytes, properties: Mapping[str, Any], headers: Mapping[str, Any]
) -> Message[Any] | None:
    """What duly published without key, attributes and due time, as most messages are: to the same
    effect as the long way, at a quarter of its cost.
    """
    time_ms, id = headers.get(TIME_MS), properties.get("message_id")
    if not isinstance(time_ms, int) or not is_time_ms(time_ms) or not id:
        return None
    check_id(topic, id)
    source = properties.get("app_id") or "amqp"
    check_source(topic, id, source)
    return Message(topic, source, id, raw, time_ms)


def _id_of_nameless(topic: Topic[Any]) -> str:
    if topic.without_identity == "accept":
        return ids.one()
    needed = "a message-id, or the header cloudEvents:id"
    if topic.dedup_by is not None:
        needed = f"what dedup_by={topic.dedup_by!r} names"
    raise InvalidMessage(
        f"topic {topic.name!r}: a message without identity: its producer gives it {needed}"
    )


def named(properties: Mapping[str, Any], message: Message[Any] | None) -> Mapping[str, Any]:
    """A header for a message that is moved: the id that was given to one that had none."""
    headers = properties.get("application_headers") or {}
    if message is None or properties.get("message_id") or TIME_MS in headers:
        return {}
    return {} if _attributes(headers).get("id") else {f"{PREFIX}id": message.id}


def _attributes(headers: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name, value in headers.items():
        if isinstance(name, str) and name.startswith((PREFIX, _OTHER_PREFIX)):
            found[name[len(PREFIX) :].lower()] = value
    return found


def _time_ms(headers: Mapping[str, Any], said: Any, seconds: Any) -> int:
    """When it was made: as it says, or else when it was published."""
    found = headers.get(TIME_MS)
    if not isinstance(found, int) and isinstance(said, str):
        try:
            found = int(datetime.fromisoformat(said).timestamp() * 1000)
        except (ValueError, OverflowError):
            found = None
    if isinstance(found, int) and is_time_ms(found):
        return found
    return seconds * 1000 if isinstance(seconds, int) and is_time_ms(seconds * 1000) else now_ms()
