"""The relay: brings what transactions published, through a store's outbox, to the broker.

One `Relay` works an outbox at a time. It publishes in the order of commits, and drops a message
from the outbox only once the broker has confirmed it: a crash in between publishes it again
under the same identity, which a broker that remembers ids drops.

A broker that is `PublishesOnce` stores a batch together with a note of what is in it. Whoever
takes over reads the note first, and drops from the outbox what it names: of no other batch can
it be in doubt whether it was published, because each is dropped before the next is begun.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import random
from threading import Event as Flag
from typing import Any, assert_never

import msgspec

from duly import events
from duly.broker import Broker, Entrance, Outcome, Published, PublishesOnce, RepeatDropped
from duly.errors import (
    BrokerError,
    BrokerUnusable,
    CommitUnknown,
    ConfigurationError,
    IdentityConflict,
    InvalidMessage,
    MessageTooLarge,
    PublishFailed,
    PublishUnknown,
    Superseded,
    TransactionFailed,
    TransactionInterrupted,
)
from duly.message import Message
from duly.store import Outbox, Outgoing, Refusal

log = logging.getLogger("duly.relay")

# About the message itself: no other attempt can end otherwise.
_HOPELESS: tuple[type[PublishFailed], ...] = (IdentityConflict, InvalidMessage, MessageTooLarge)

# How often in a row everything may be refused before what stands in front is set aside for the
# longest wait, and how many batches behind it are tried within that.
_PATIENCE = 3
_PROBES = 30


@dataclass(frozen=True, slots=True)
class RelayOptions:
    """How a relay works.

    - ``batch``, ``batch_bytes``: messages published together, and their bodies together.
    - ``lease_s``: another relay takes over when this one was not heard of for this long.
    - ``attempts``: refusals of one message while the broker takes others, before it is given up
      on and kept in the outbox, in sight.
    - ``first_s``, ``longest_s``: waiting after a failure, doubled each time, shortened by up to a
      fifth at random.
    """

    batch: int = 500
    batch_bytes: int = 4 * 1024 * 1024
    lease_s: float = 10.0
    attempts: int = 10
    first_s: float = 0.1
    longest_s: float = 30.0

    def __post_init__(self) -> None:
        least = min(self.batch, self.batch_bytes, self.attempts)
        if least < 1 or self.lease_s <= 0 or not 0 < self.first_s <= self.longest_s:
            raise ConfigurationError(
                f"{self}: batch, batch_bytes and attempts are at least 1, times more than 0, "
                "and longest_s at least first_s"
            )

    def delay_s(self, attempt: int, roll: float) -> float:
        """Seconds to wait after the failed ``attempt`` (1, 2, ...); ``roll`` is from [0, 1)."""
        # Capped: 2.0 ** 1100 overflows, and longest_s bounds it long before.
        grown = self.first_s * 2.0 ** min(attempt - 1, 64)
        return min(grown, self.longest_s) * (1 - 0.2 * roll)


@dataclass(slots=True)
class RelayCounts:
    """What a relay has done since it started. ``unknown`` counts answers that got lost: where
    the broker drops no repeats, each may have become a second message.
    """

    published: int = 0
    repeats: int = 0
    refused: int = 0
    given_up: int = 0
    unknown: int = 0


class Relay:
    """Moves one store's outbox to one broker, step by step.

    ``step`` does one batch and says how long to pause; a thread (`run`) or a simulation drives
    it. The topics must be declared at the broker. ``outbox_name`` is the outbox's for ever, and no
    other's: `StoreCapabilities.database`. Without it nothing is published as of `PublishesOnce`.
    """

    def __init__(
        self,
        outbox: Outbox,
        broker: Broker,
        options: RelayOptions | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        roll: Callable[[], float] = random,
        watchers: Sequence[events.Watcher] = (),
        wait_s: float = 0.25,
        outbox_name: str | None = None,
    ) -> None:
        self.counts = RelayCounts()
        self.name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._outbox = outbox
        self._broker = broker
        self._options = options or RelayOptions()
        self._clock = clock
        self._roll = roll
        self._watchers = watchers
        self._wait_s = wait_s
        self._held_until = float("-inf")
        self._failures = 0
        self._entrance: Entrance | None = None
        if outbox_name is not None and broker.capabilities.relays_once:
            assert isinstance(broker, PublishesOnce), "it says that it is"
            self._entrance = broker.entrance(outbox_name)
        # Whether nothing that the outbox holds was published, and nobody else publishes it.
        self._is_sure = False
        self._one_by_one = 0

    def step(self) -> float:
        """Publish one batch. Returns the seconds to pause before the next step."""
        try:
            if not self._hold():
                self._is_sure = False
                return self._options.lease_s / 3
            limit = 1 if self._one_by_one else self._options.batch
            batch = self._outbox.unsent(limit, self._options.batch_bytes, self._wait_s)
            if not batch:
                return 0.0 if self._wait_s else self._options.first_s
            if self._entrance is None:
                return self._publish(_without_overtaking(batch), self._broker.publish)
            if not self._is_sure:
                # What was looked at before may have been published since, by somebody else.
                self._make_sure(self._entrance)
                return 0.0
            return self._publish_once(self._entrance, _without_overtaking(batch))
        except (BrokerError, CommitUnknown, TransactionInterrupted, Superseded) as error:
            # Nothing is lost: what was published and not dropped is published again, or found by
            # its note. Whoever is fenced off asks the store whether it is still the one.
            if self._entrance is not None:
                self._held_until = float("-inf")
            return self._pause(error)

    def run(self, stop: Flag) -> None:
        """Step until told to stop, and let another relay take over then."""
        try:
            while not stop.is_set():
                try:
                    pause_s = self.step()
                except Exception:
                    # Without this thread nothing would come to the broker, and nobody would know.
                    log.exception("relaying the outbox failed; it is tried again")
                    pause_s = self._options.longest_s
                if pause_s:
                    stop.wait(pause_s)
        finally:
            self.close()

    def close(self) -> None:
        """Let another relay take over at once."""
        self._held_until = float("-inf")
        self._is_sure = False
        if self._entrance is not None:
            self._entrance.close()
        try:
            self._outbox.let_go(self.name)
        except (BrokerError, CommitUnknown) as error:
            log.info("the outbox stays held until its lease ends: %s", error)

    def _hold(self) -> bool:
        now = self._clock()
        # Renewed early, so that a slow publish does not outlast the lease.
        if now < self._held_until - self._options.lease_s * 2 / 3:
            return True
        if not self._outbox.hold(self.name, self._options.lease_s):
            return False
        self._held_until = now + self._options.lease_s
        return True

    def _make_sure(self, entrance: Entrance) -> None:
        """Drop what was published and not dropped, by whoever was the relay before."""
        note = entrance.resume()
        if note is not None:
            marks = _read(note)
            # A store that was restored gives positions out again: the message has to be the same.
            published = [
                outgoing
                for outgoing in self._outbox.left(list(marks))
                if _mark(outgoing.message) == marks[outgoing.position]
            ]
            if published:
                self._outbox.sent([outgoing.position for outgoing in published])
                self._count([Published(outgoing.message.id) for outgoing in published])
        self._is_sure = True

    def _publish_once(self, entrance: Entrance, batch: Sequence[Outgoing]) -> float:
        # Until the outbox knows, too, whatever ends this in the middle.
        self._is_sure = False

        def publish(messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
            return entrance.publish(messages, lambda at: _note([batch[place] for place in at]))

        self._one_by_one = max(0, self._one_by_one - 1)
        try:
            return self._publish(batch, publish)
        except TransactionInterrupted:
            raise
        except TransactionFailed as error:
            log.info("a batch of the outbox is published one by one: %s", error)
            self._one_by_one = len(batch)
            return 0.0

    def _publish(
        self,
        batch: Sequence[Outgoing],
        publish: Callable[[Sequence[Message[Any]]], Sequence[Outcome]],
    ) -> float:
        outcomes = publish([outgoing.message for outgoing in batch])
        sent: list[int] = []
        refused: list[tuple[Outgoing, PublishFailed]] = []
        unknown: list[PublishUnknown] = []
        for outgoing, outcome in zip(batch, outcomes, strict=True):
            match outcome:
                case Published() | RepeatDropped():
                    sent.append(outgoing.position)
                case PublishUnknown():
                    unknown.append(outcome)
                case PublishFailed():
                    refused.append((outgoing, outcome))
                case _:
                    assert_never(outcome)
        if sent:
            self._outbox.sent(sent)
            self._count(outcomes)
        self._is_sure = len(sent) == len(batch)
        return self._pause_after(refused, unknown, took_some=bool(sent))

    def _pause_after(
        self,
        refused: Sequence[tuple[Outgoing, PublishFailed]],
        unknown: Sequence[PublishUnknown],
        *,
        took_some: bool,
    ) -> float:
        """What is unknown stays first in the outbox and is sent again under its identity."""
        self.counts.unknown += len(unknown)
        trouble = self._refuse(refused, took_some=took_some)
        if unknown:
            return self._pause(unknown[0])
        if trouble is None:
            self._failures = 0
            return 0.0
        pause_s = self._pause(trouble)
        probing = self._failures > _PATIENCE
        return min(pause_s, self._options.longest_s / _PROBES) if probing else pause_s

    def _refuse(
        self, refused: Sequence[tuple[Outgoing, PublishFailed]], *, took_some: bool
    ) -> PublishFailed | None:
        """Note what is wrong with single messages; returns what is wrong with the broker.

        A broker that took nothing at all may be full or away: that charges no message. Yet what
        it goes on refusing is set aside for a while, for it may take those behind.
        """
        blame = [(o, e) for o, e in refused if took_some or isinstance(e, _HOPELESS)]
        others = [(o, e) for o, e in refused if not (took_some or isinstance(e, _HOPELESS))]
        refusals = [self._refusal(outgoing, error) for outgoing, error in blame]
        if self._failures >= _PATIENCE:
            wait_s = self._options.longest_s
            refusals += [Refusal(o.position, _text(e), wait_s, charged=False) for o, e in others]
        if refusals:
            self._outbox.refused(refusals)
        return others[0][1] if others else None

    def _refusal(self, outgoing: Outgoing, error: PublishFailed) -> Refusal:
        attempt = outgoing.attempts + 1
        retry_in_s: float | None = self._options.delay_s(attempt, self._roll())
        if isinstance(error, _HOPELESS) or attempt >= self._options.attempts:
            retry_in_s = None
            self.counts.given_up += 1
            log.error(
                "message %s of topic %s stays in the outbox, the broker refused it %d times: %s",
                outgoing.message.id,
                outgoing.message.topic,
                attempt,
                error,
            )
        self.counts.refused += 1
        self._tell(events.RelayRefused(outgoing.message, error, retry_in_s))
        return Refusal(outgoing.position, _text(error), retry_in_s)

    def _count(self, outcomes: Sequence[Outcome]) -> None:
        repeats = sum(isinstance(outcome, RepeatDropped) for outcome in outcomes)
        published = sum(isinstance(outcome, Published) for outcome in outcomes)
        self.counts.published += published
        self.counts.repeats += repeats
        self._tell(events.Relayed(published, repeats))

    def _pause(self, error: Exception) -> float:
        self._failures += 1
        pause_s = self._options.delay_s(self._failures, self._roll())
        log.warning("the outbox is not relayed for %.2f s: %s", pause_s, error)
        return pause_s

    def _tell(self, event: events.Event) -> None:
        if self._watchers:
            events.tell(self._watchers, event)


def _without_overtaking(batch: Sequence[Outgoing]) -> Sequence[Outgoing]:
    """Without those behind one of their key that was refused before: it may be again.

    A first refusal is the broker's to keep in order, which stores messages as they are given.
    """
    if not any(outgoing.attempts for outgoing in batch):
        return batch
    doubtful: set[tuple[str, str]] = set()
    kept: list[Outgoing] = []
    for outgoing in batch:
        message = outgoing.message
        line = None if message.key is None else (message.topic, message.key)
        if line in doubtful:
            continue
        kept.append(outgoing)
        if outgoing.attempts and line is not None:
            doubtful.add(line)
    return kept


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[int, dict[int, bytes]]).decode
_FORMAT = 1


def _note(batch: Sequence[Outgoing]) -> bytes:
    """What is stored with a batch: which messages of the outbox are in it."""
    return _encode((_FORMAT, {each.position: _mark(each.message) for each in batch}))


def _read(note: bytes) -> dict[int, bytes]:
    """The marks of the messages that a note names, by position. Raises `BrokerUnusable`."""
    try:
        format, marks = _decode(note)
    except msgspec.DecodeError as error:
        raise BrokerUnusable(f"a relay has left a note that cannot be read: {error}") from error
    if format != _FORMAT:
        raise BrokerUnusable(
            f"a newer relay has left a note of format {format}; this one reads {_FORMAT}"
        )
    return marks


def _mark(message: Message[Any]) -> bytes:
    """What tells a message from another that was given its position."""
    identity = f"{message.topic}\0{message.source}\0{message.id}"
    return hashlib.blake2b(identity.encode(), digest_size=8).digest()


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\0", "\\x00")
