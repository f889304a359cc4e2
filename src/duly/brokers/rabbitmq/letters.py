"""Dead letters on their way: from what the server carries to `DeadLetter`, and back.

=======================  ========================================================================
``duly-error``           why it was given up on
``duly-attempts``        how many starts were charged to it
``duly-dead-ms``         when it was given up on
``duly-replays``         how often people brought it back; stays with it wherever it is moved
``duly-consumer``        whose dead letter it is, in the stream of those
=======================  ========================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from duly.brokers.rabbitmq.topology import DELAYS
from duly.brokers.rabbitmq.wire import (
    ATTEMPTS,
    DEAD_MS,
    ERROR,
    REPLAYS,
    History,
    history_in,
    message_in,
    moved,
    properties_of,
    replays_in,
)
from duly.errors import InvalidMessage
from duly.inspection import DeadLetter
from duly.message import Message, Topic, now_ms
from duly.message.limits import check_id

CONSUMER = "duly-consumer"
MAX_ERROR_CHARS = 4000

# Why a server gives up on what is in a queue, by the word that it writes in ``x-death``.
_BY_THE_SERVER = {
    "delivery_limit": "it was taken back from consumers that were gone more often than its queue "
    "allows (x-delivery-limit)",
    "expired": "it waited in {queue!r} for longer than a policy (message-ttl) or its producer "
    "(expiration) allows",
    "maxlen": "{queue!r} was full (max-length)",
    "rejected": "another program that consumes {queue!r} rejected it",
}


def letter_of(
    topic: Topic[Any],
    subscription: str,
    body: bytes,
    properties: Mapping[str, Any],
    error: str,
    attempts: int,
    dead_ms: int | None = None,
) -> DeadLetter:
    """The dead letter that a delivered message becomes, whoever published it."""
    try:
        message = message_in(topic, body, properties)
    except InvalidMessage:
        message = _as_it_came(topic.name, body, properties)
        error = f"{error}. It came with {_plain(properties)}"
    return DeadLetter(
        subscription,
        message,
        _text(error),
        attempts,
        now_ms() if dead_ms is None else dead_ms,
        replays=replays_in(properties),
    )


def letter_in(
    topic: Topic[Any], subscription: str, body: bytes, properties: Mapping[str, Any]
) -> DeadLetter:
    """What lies in the queue of dead letters, or in their stream."""
    headers = properties.get("application_headers") or {}
    error, attempts, dead_ms = headers.get(ERROR), headers.get(ATTEMPTS), headers.get(DEAD_MS)
    return letter_of(
        topic,
        subscription,
        body,
        properties,
        error if isinstance(error, str) else _by_the_server(headers),
        attempts if isinstance(attempts, int) else history_in(properties).charged,
        dead_ms if isinstance(dead_ms, int) else None,
    )


def _by_the_server(headers: Mapping[str, Any]) -> str:
    """Why the server moved it to the dead letters, by the newest of its records of that. What
    waited for a delay was moved by the server as well, and is none.
    """
    deaths = headers.get("x-death")
    for death in deaths if isinstance(deaths, list) else ():
        queue = str(death.get("queue")) if isinstance(death, dict) else DELAYS
        if DELAYS not in queue:
            reason = str(death.get("reason"))
            told = _BY_THE_SERVER.get(reason, "{queue!r} gave it up: " + reason)
            return f"the server gave up on it: {told.format(queue=queue)}"
    return "it was put where the server moves what it gives up on, and nothing says why"


def unknown(topic: str) -> Topic[Any]:
    """A topic of which nothing is known but its name: its messages are named by themselves."""
    return Topic(topic, bytes, guarantee="at-least-once")


def stored(letter: DeadLetter) -> dict[str, Any]:
    """The properties of a dead letter in the stream of those."""
    return _with(
        properties_of(letter.message),
        {
            CONSUMER: letter.subscription,
            ERROR: letter.error,
            ATTEMPTS: letter.attempts,
            DEAD_MS: letter.dead_ms,
            REPLAYS: letter.replays,
        },
    )


def replayed(letter: DeadLetter) -> dict[str, Any]:
    """The properties with which it is delivered again."""
    return _with(properties_of(letter.message), {REPLAYS: letter.replays + 1})


def _with(properties: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    headers = {**properties["application_headers"], **more}
    return {**properties, "application_headers": headers}


def _as_it_came(topic: str, body: bytes, properties: Mapping[str, Any]) -> Message[Any]:
    """A message that duly would not carry, as far as it can be shown; the same each time."""
    id = properties.get("message_id")
    try:
        check_id(topic, id)
    except InvalidMessage:
        told = repr(sorted(_plain(properties).items())).encode("utf-8", "backslashreplace")
        id = f"unidentified-{hashlib.blake2b(told + body, digest_size=12).hexdigest()}"
    source = properties.get("app_id")
    return Message(topic, _text(source) if source else "amqp", str(id), body, now_ms())


def _plain(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the server or duly adds on the way."""
    plain = moved(properties, History())
    headers = plain.pop("application_headers")
    kept = {name: value for name, value in headers.items() if not str(name).startswith("duly-")}
    return plain | {"headers": kept}


def _text(text: Any) -> str:
    """What every database can store."""
    clean = str(text).encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
    return clean[:MAX_ERROR_CHARS]
