"""What every durable publish goes through: where it may be called, and what its outcome means."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from operator import attrgetter
from typing import Any, cast

from duly.broker import Broker, Outcome, Published, RepeatDropped
from duly.errors import (
    BrokerError,
    ConfigurationError,
    PublishError,
    PublishFailed,
    PublishIncomplete,
    PublishUnknown,
)
from duly.message import Alike, Message

IN_TRANSACTION: ContextVar[str | None] = ContextVar("IN_TRANSACTION", default=None)
"""The database (as in ``capabilities.database``) that has a transaction of duly's open around
the running code: set around exactly-once handlers by the worker, and by ``app.transaction()``."""

# One portion is one transaction of the broker: large enough that a commit costs a message
# nothing, small enough that others get their turn.
PORTION_MESSAGES = 1000
PORTION_BYTES = 4 * 1024 * 1024

_body = attrgetter("body")


def refuse_on_loop(call: str, instead: str) -> None:
    """Raise `ConfigurationError` on a thread whose event loop runs: the call would stop it."""
    # Where nobody imported asyncio, none of its loops runs; importing it takes 30 ms.
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and asyncio._get_running_loop() is not None:
        raise ConfigurationError(
            f"{call} waits for the disk or the network, and this is an event loop's thread. Use "
            f"{instead}."
        )


def refuse_in_transaction(broker: Broker, call: str) -> None:
    """Raise `ConfigurationError` inside a transaction on the broker's own database."""
    database = IN_TRANSACTION.get()
    if database is not None and database == broker.capabilities.database:
        raise ConfigurationError(
            f"{call} inside a transaction on the same database ({database}) would be no part of "
            "it, and may wait for it for ever. Use tx.publish: the message is seen when the "
            "transaction commits, and never if it does not."
        )


def attempt(broker: Broker, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
    """Publish; one outcome each. Only `ConfigurationError` is raised.

    A `BrokerError` says that nothing was changed. Whatever else a broker raises leaves it open
    whether the messages are stored.
    """
    try:
        return broker.publish(messages)
    except ConfigurationError:
        raise
    except BrokerError as error:
        return [
            _because(
                error,
                PublishFailed(
                    f"topic {message.topic!r}, message {message.id!r} is not stored: {error}",
                    message_id=message.id,
                ),
            )
            for message in messages
        ]
    except Exception as error:  # noqa: BLE001 - turned into an outcome of each message
        return [
            _because(
                error,
                PublishUnknown(
                    f"topic {message.topic!r}, message {message.id!r} may or may not be stored: "
                    f"{error!r}. Publish it again with id={message.id!r}.",
                    message_id=message.id,
                ),
            )
            for message in messages
        ]


def _because(cause: Exception, outcome: PublishFailed | PublishUnknown) -> Outcome:
    outcome.__cause__ = cause
    return outcome


def in_portions(messages: Sequence[Message[Any]]) -> Iterator[Sequence[Message[Any]]]:
    """The messages in order, in portions that a broker stores at once."""
    count = len(messages)
    alike = isinstance(messages, Alike) and messages.largest * count <= PORTION_BYTES
    if count <= PORTION_MESSAGES and (
        alike or sum(map(len, map(_body, messages))) <= PORTION_BYTES
    ):
        if messages:
            yield messages
        return
    start = size = 0
    for at, message in enumerate(messages):
        size += message.size
        if at > start and (at - start >= PORTION_MESSAGES or size > PORTION_BYTES):
            yield messages[start:at]
            start, size = at, message.size
    if start < len(messages):
        yield messages[start:]


def accepted(outcome: Outcome) -> Published | RepeatDropped:
    """The outcome of one message. Raises the `PublishFailed` or `PublishUnknown` it is."""
    if isinstance(outcome, PublishError):
        raise outcome
    return outcome


def all_accepted(outcomes: Sequence[Outcome]) -> Sequence[Published | RepeatDropped]:
    """The outcomes of many messages. Raises `PublishIncomplete` where one did not succeed."""
    if set(map(type, outcomes)) <= {Published, RepeatDropped}:
        return cast("Sequence[Published | RepeatDropped]", outcomes)
    bad = [outcome for outcome in outcomes if isinstance(outcome, PublishError)]
    unknown = sum(isinstance(outcome, PublishUnknown) for outcome in bad)
    raise PublishIncomplete(
        f"{len(bad):,} of {len(outcomes):,} messages were not plainly published ({unknown:,} may "
        f"or may not be stored); error.outcomes has one entry each. The first: {bad[0]}",
        outcomes,
    ) from bad[0]
