"""Which topics a broker in memory knows, what it refuses, and which ids it remembers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from duly.broker import Capabilities, RepeatDropped
from duly.errors import (
    ConfigurationError,
    IdentityConflict,
    InvalidMessage,
    MessageTooLarge,
    PublishFailed,
)
from duly.guarantees import Guarantee
from duly.message import Message, Topic

Identity = tuple[str, str, str]
"""Topic, source and id: what names one published event."""


class Registry:
    """The declared topics of one broker. Its owner's lock guards it."""

    def __init__(self, capabilities: Capabilities) -> None:
        self._capabilities = capabilities
        self._topics: dict[str, Topic[Any]] = {}

    def declare(self, topics: Iterable[Topic[Any]]) -> Sequence[Topic[Any]]:
        """Make topics known and return the new ones; all of them, or none."""
        asked = list(topics)
        for topic in asked:
            _check_same(self._topics.get(topic.name, topic), topic)
        new = [topic for topic in asked if topic.name not in self._topics]
        self._topics.update((topic.name, topic) for topic in new)
        return new

    def topic(self, name: str) -> Topic[Any]:
        """A declared topic. Raises `ConfigurationError` for one that was not."""
        found = self._topics.get(name)
        if found is None:
            raise ConfigurationError(f"topic {name!r} was not declared: call broker.declare first")
        return found

    def names(self) -> Sequence[str]:
        """The names of the declared topics."""
        return list(self._topics)

    def forget(self, name: str) -> None:
        """Undo a declaration, as deleting the topic does."""
        del self._topics[name]

    def refusal(self, message: Message[Any]) -> PublishFailed | None:
        """Why this message cannot be stored, or None."""
        can = self._capabilities
        where = f"topic {message.topic!r}, message {message.id!r}"
        if message.topic not in self._topics:
            return PublishFailed(f"{where}: the topic was not declared", message_id=message.id)
        if message.size > can.max_message_bytes:
            return MessageTooLarge(
                f"{where}: the body has {message.size:,} bytes, {can.name} carries "
                f"{can.max_message_bytes:,}. Nothing was sent.",
                message_id=message.id,
            )
        if message.due_ms is not None and not can.delays:
            return InvalidMessage(
                f"{where}: it has a due time, and {can.name} cannot delay messages",
                message_id=message.id,
            )
        return None


def _check_same(known: Topic[Any], asked: Topic[Any]) -> None:
    for fixed in ("partitions", "guarantee"):
        was, now = getattr(known, fixed), getattr(asked, fixed)
        if was != now:
            raise ConfigurationError(
                f"topic {asked.name!r} exists with {fixed}={was!r} and is declared with "
                f"{fixed}={now!r}; that is fixed when a topic is first declared"
            )


class Identities:
    """The ids that exactly-once topics remember, so that a repeated publish is dropped."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        # One dict a topic: its retention is one, so that the oldest are always in front.
        self._known: dict[str, dict[Identity, tuple[bytes, int]]] = {}

    def check(
        self, message: Message[Any], at_ms: int, pending: dict[Identity, bytes] | None = None
    ) -> RepeatDropped | IdentityConflict | None:
        """What became of this id before; ``pending`` are the ids of an open transaction."""
        topic = self._registry.topic(message.topic)
        if topic.promise is not Guarantee.EXACTLY_ONCE:
            return None
        known = self._known.setdefault(topic.name, {})
        _drop_older(known, at_ms - int(topic.identity_retention_s * 1000))
        identity = (message.topic, message.source, message.id)
        body_hash = message.body_hash()
        earlier = known[identity][0] if identity in known else None
        if earlier is None and pending is not None:
            earlier = pending.get(identity)
            if earlier is None:
                pending[identity] = body_hash
        if earlier is None:
            return None
        if earlier == body_hash:
            return RepeatDropped(message.id)
        return IdentityConflict(
            f"topic {message.topic!r}, message {message.id!r}: this id was published before with "
            "another body. One id names one event; give the new event an id of its own.",
            message_id=message.id,
        )

    def remember(self, message: Message[Any], at_ms: int) -> None:
        """Note that the message is stored."""
        if self._registry.topic(message.topic).promise is Guarantee.EXACTLY_ONCE:
            known = self._known.setdefault(message.topic, {})
            known[message.topic, message.source, message.id] = (message.body_hash(), at_ms)


def _drop_older(known: dict[Identity, tuple[bytes, int]], than_ms: int) -> None:
    while known:
        identity = next(iter(known))
        if known[identity][1] >= than_ms:
            return
        del known[identity]
