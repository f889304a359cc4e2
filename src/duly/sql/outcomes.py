"""How publishing ends where it was not the log that said so: failed, unknown, or too large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from duly.broker import Outcome
from duly.errors import BrokerError, CommitUnknown, MessageTooLarge, PublishFailed, PublishUnknown
from duly.message import Message, largest_of

Messages = Sequence[Message[Any]]


def told(messages: Messages, publish: Callable[[], Sequence[Outcome]]) -> Sequence[Outcome]:
    """The outcomes of a publish, where what it raises is one for each message."""
    try:
        return publish()
    except BrokerError as error:
        return [_failed(message, error) for message in messages]
    except CommitUnknown as error:
        return [_unknown(message, error) for message in messages]


def fitting(
    messages: Messages, most_bytes: int, name: str, publish: Callable[[Messages], Sequence[Outcome]]
) -> Sequence[Outcome]:
    """Publish those whose bodies are no larger than the broker of this name carries."""
    if largest_of(messages) <= most_bytes:
        return publish(messages)
    small = [message for message in messages if len(message.body) <= most_bytes]
    stored = iter(publish(small) if small else [])
    return [
        next(stored) if len(message.body) <= most_bytes else _too_large(message, most_bytes, name)
        for message in messages
    ]


def _failed(message: Message[Any], error: BrokerError) -> PublishFailed:
    return PublishFailed(
        f"topic {message.topic!r}, message {message.id!r}: certainly not stored: {error}",
        message_id=message.id,
    )


def _unknown(message: Message[Any], error: CommitUnknown) -> PublishUnknown:
    return PublishUnknown(
        f"topic {message.topic!r}, message {message.id!r}: nobody can say whether it is "
        f"stored: {error} Publish it again under the same id.",
        message_id=message.id,
    )


def _too_large(message: Message[Any], most_bytes: int, name: str) -> MessageTooLarge:
    return MessageTooLarge(
        f"topic {message.topic!r}, message {message.id!r}: the body has {len(message.body):,} "
        f"bytes, the {name} broker carries {most_bytes:,}. Nothing was sent. Publish a "
        "reference to the data instead.",
        message_id=message.id,
    )
