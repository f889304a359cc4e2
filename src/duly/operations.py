"""`Operations`: what people do to an app that runs, from Python. Part of `App`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Protocol

from duly.broker import Broker
from duly.consumer import Consumer
from duly.inspection import DeadLetter, Selection
from duly.mending import Mender
from duly.operating.erasing import erasers, whose_messages
from duly.operating.steering import Steerer
from duly.operating.tracing import Life, Tracer
from duly.publishing import refuse_on_loop
from duly.store import Store


class Operated(Protocol):
    """What `Operations` needs of an app."""

    name: str

    @property
    def consumers(self) -> Sequence[Consumer]:
        """Its consumers."""
        ...

    def backends(self) -> tuple[Broker, Store | None]:
        """Its broker and store, open."""
        ...


class Operations:
    """Dead letters and subscriptions: what was given up on, and where everybody stands."""

    def dead_letters(
        self: Operated,
        consumer: str | None = None,
        *,
        topic: str | None = None,
        id: str | None = None,
        error: str | None = None,
        since: datetime | None = None,
        before: datetime | None = None,
        limit: int = 100,
    ) -> Sequence[DeadLetter]:
        """What consumers gave up on, the latest first; the options narrow.

        ``error`` is a part of its text; ``since`` and ``before`` say when it was given up on.
        Raises `ConfigurationError` where the broker keeps none.
        """
        which = Selection(consumer, topic, id, error, _ms(since), _ms(before))
        return Mender.of(self.backends(), self.consumers).select(which, limit)

    def replay(self: Operated, letters: Iterable[DeadLetter]) -> int:
        """Deliver dead letters again, each to the consumer that gave it up and to no other.

        A message keeps its identity and has all its attempts before it. It comes before the
        later ones of its key; where a store keeps the letters of a broker that keeps none
        (RabbitMQ, Kafka), behind what waits already. An exactly-once consumer kept no effect
        of it, so that now it commits once; where it took effect after all, admission drops it
        as a repeat. Returns how many were still dead letters: others have been replayed or
        discarded meanwhile, and a repeated call does no harm. Raises `ConfigurationError`
        where a replay can have no effect: admission by cursor, in order by key, has passed it.
        """
        refuse_on_loop("app.replay", "await asyncio.to_thread(app.replay, letters)")
        return Mender.of(self.backends(), self.consumers).replay(list(letters))

    def discard(self: Operated, letters: Iterable[DeadLetter]) -> int:
        """Remove dead letters for good; a key that one of them held goes on.

        Returns how many were still there. Each is noted as an incident.
        """
        refuse_on_loop("app.discard", "await asyncio.to_thread(app.discard, letters)")
        return Mender.of(self.backends(), self.consumers).discard(list(letters))

    # --- subscriptions

    def pause(self: Operated, consumer: str) -> bool:
        """Let no worker claim for this consumer until `resume`, whatever is restarted.

        What is claimed goes on to its end. Whether it was not paused before. Raises
        `ConfigurationError` where there is no such subscription, as all of these do.
        """
        refuse_on_loop("app.pause", "await asyncio.to_thread(app.pause, consumer)")
        return Steerer.of(self.backends(), self.consumers).pause(consumer)

    def resume(self: Operated, consumer: str) -> bool:
        """Let it be worked again; whether it was paused."""
        refuse_on_loop("app.resume", "await asyncio.to_thread(app.resume, consumer)")
        return Steerer.of(self.backends(), self.consumers).resume(consumer)

    def rewind(
        self: Operated, consumer: str, to: datetime | int | None, *, new_epoch: str | None = None
    ) -> int:
        """Take a consumer back: what is kept from ``to`` on comes again, to it and to nobody else.

        ``to`` is the time a message was made, a position as `trace` shows it, or None: the
        oldest that is kept. Returns how many messages come again. For exactly-once they take
        effect again, which ``new_epoch`` declares; each name begins one life of a consumer, and
        a second call with it does nothing and returns 0. Who works on one of them now can
        neither settle nor commit it any more. Interrupted, the consumer waits until the same
        call was made again; that one does not count what the first had taken back.
        """
        refuse_on_loop("app.rewind", "await asyncio.to_thread(app.rewind, consumer, to)")
        steerer = Steerer.of(self.backends(), self.consumers)
        plan = steerer.plan(consumer, to, new_epoch)
        return plan.messages if steerer.rewind(plan) else 0

    def drop(self: Operated, consumer: str) -> bool:
        """Remove a consumer's subscription: its place, its claims, what waits, its dead letters.

        Whether there was anything to remove. A worker that still runs it claims nothing any
        more and says why; one that is started makes the subscription anew.
        """
        refuse_on_loop("app.drop", "await asyncio.to_thread(app.drop, consumer)")
        return Steerer.of(self.backends(), self.consumers).drop(consumer)

    # --- messages

    def trace(
        self: Operated, id: str, *, source: str | None = None, topic: str | None = None
    ) -> Sequence[Life]:
        """What is kept of the life of a message, one for each topic that has one of this id.

        ``source`` is the app that published it, this one unless given. Raises
        `ConfigurationError` where the broker cannot tell.
        """
        return Tracer.of(self.backends()).lives(id, source or self.name, topic)

    def erase(
        self: Operated,
        *,
        key: str | None = None,
        id: str | None = None,
        source: str | None = None,
        topic: str | None = None,
    ) -> int:
        """Remove a person's messages from log, dead letters, what waits and the outbox; returns
        how many copies were removed. Incidents keep neither their identity nor what they said.

        ``key`` or ``id`` (of ``source``, this app unless given) say which. A repeat of what
        was published exactly-once is dropped as before. Again is harmless. A broker that cannot
        remove what waits in its queues keeps it until it was handled.
        """
        refuse_on_loop("app.erase", "await asyncio.to_thread(app.erase, ...)")
        whose = whose_messages(key, id, source or self.name, topic)
        return sum(sum(each.erase(whose)) for each in erasers(self.backends()))


def _ms(time: datetime | None) -> int | None:
    return None if time is None else int(time.timestamp() * 1000)
