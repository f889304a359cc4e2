"""Mistakes of brokers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace as with_fields
from typing import Any

from msgspec.structs import replace

from duly.broker import Delivery, LogPosition, Published, Receipt, RepeatDropped
from duly.errors import IdentityConflict, MessageTooLarge
from duly.guarantees import Dead, Done, Guarantee, Release, Retry, Settlement
from duly.message import Message
from tests.contract.broken.coats import NOBODY, Broken, Coat

# --- publishing


class StoresBackwards(Broken):
    def publish(self, messages: Sequence[Message[Any]]):
        return list(self.inner.publish(messages[::-1]))[::-1]


class ForgetsHeaders(Broken):
    def publish(self, messages: Sequence[Message[Any]]):
        return self.inner.publish([replace(message, headers={}) for message in messages])


class FencesNobodyOff(Broken):
    """Whoever publishes resumes by the way."""

    def entrance(self, outbox: str) -> Any:
        return ResumesAlways(self.inner.entrance(outbox))


class ResumesAlways(Coat):
    def publish(self, messages: Sequence[Message[Any]], note_of: Any):
        self.inner.resume()
        return self.inner.publish(messages, note_of)


class DropsByContent(Broken):
    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.seen: set[tuple[str, bytes]] = set()

    def publish(self, messages: Sequence[Message[Any]]):
        return [self.one(message) for message in messages]

    def one(self, message: Message[Any]):
        if (message.topic, message.body) in self.seen:
            return RepeatDropped(message.id)
        self.seen.add((message.topic, message.body))
        return self.inner.publish([message])[0]


class TakesConflictsForRepeats(Broken):
    def publish(self, messages: Sequence[Message[Any]]):
        return [
            RepeatDropped(outcome.message_id) if isinstance(outcome, IdentityConflict) else outcome
            for outcome in self.inner.publish(messages)
        ]


class DeliversAtOnce(Broken):
    def publish(self, messages: Sequence[Message[Any]]):
        return self.inner.publish([replace(message, due_ms=None) for message in messages])


class CountsFromPublishing(Broken):
    """Holds back what is due later, by a clock that nobody sets."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.waiting: list[tuple[float, Message[Any]]] = []

    def publish(self, messages: Sequence[Message[Any]]):
        return [self.one(message) for message in messages]

    def one(self, message: Message[Any]):
        if message.due_ms is None:
            return self.inner.publish([message])[0]
        wait_s = (message.due_ms - self.inner.claims.wall_ms()) / 1000
        self.waiting.append((self.inner.claims.clock() + wait_s, message))
        return Published(message.id)

    def subscribe(self, topics: Any, subscription: str, options: Any) -> Any:
        return LetsGo(self, self.inner.subscribe(topics, subscription, options))


class LetsGo(Coat):
    def __init__(self, broker: CountsFromPublishing, inner: Any) -> None:
        super().__init__(inner)
        self.broker = broker

    def claim(self, *how: Any):
        now, waiting = self.broker.inner.claims.clock(), self.broker.waiting
        due = [message for at, message in waiting if at <= now]
        self.broker.waiting = [(at, message) for at, message in waiting if at > now]
        self.broker.inner.publish([replace(message, due_ms=None) for message in due])
        return self.inner.claim(*how)


class ConfirmsWhatIsTooLarge(Broken):
    def publish(self, messages: Sequence[Message[Any]]):
        return [
            Published(outcome.message_id) if isinstance(outcome, MessageTooLarge) else outcome
            for outcome in self.inner.publish(messages)
        ]


class CutsLongIds(Broken):
    def publish(self, messages: Sequence[Message[Any]]):
        return self.inner.publish([replace(message, id=message.id[:64]) for message in messages])


class ConfirmsBeforeItStores(Broken):
    """What was published lately is written when the broker is closed, or used."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.buffer: list[Message[Any]] = []

    def publish(self, messages: Sequence[Message[Any]]):
        self.buffer += messages
        return [Published(message.id) for message in messages]

    def subscribe(self, topics: Any, subscription: str, options: Any) -> Any:
        self.flush()
        return super().subscribe(topics, subscription, options)

    def flush(self) -> None:
        self.inner.publish(self.buffer)
        self.buffer = []

    def close(self) -> None:
        # A process that is dead flushes nothing: only the suite closes what it abandoned.
        self.buffer = []
        self.inner.close()


class LooksBeforeItStores(Broken):
    """Repeats are looked for in one step and stored in another."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.known: set[str] = set()
        self.numbers = itertools.count()

    def publish(self, messages: Sequence[Message[Any]]):
        return [self.one(message) for message in messages]

    def one(self, message: Message[Any]):
        if message.id in self.known:
            return RepeatDropped(message.id)
        NOBODY.wait(0.001)
        self.known.add(message.id)
        # Under another id, so that the sound broker inside does not find the repeat.
        self.inner.publish([replace(message, id=f"{message.id}#{next(self.numbers)}")])
        return Published(message.id)


class NeverCloses(Broken):
    def close(self) -> None:
        """Open for good."""


# --- claiming and settling


class SettlesById(Broken):
    """The latest claim on a message is settled, whatever receipt is shown."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.latest: dict[str, Receipt] = {}
        self.ids: dict[Receipt, str] = {}

    def subscribe(self, topics: Any, subscription: str, options: Any) -> Any:
        broker = self

        class ById(Coat):
            def claim(self, limit: int, max_bytes: int, wait_s: float):
                deliveries = self.inner.claim(limit, max_bytes, wait_s)
                for delivery in deliveries:
                    broker.latest[delivery.message_id] = delivery.receipt
                    broker.ids[delivery.receipt] = delivery.message_id
                return deliveries

            def settle(self, settlements: Sequence[Settlement]):
                shown = [each.receipt for each in settlements]
                meant = [replace(each, receipt=broker.meant(each.receipt)) for each in settlements]
                refused = set(self.inner.settle(meant))
                return [r for r, each in zip(shown, meant, strict=True) if each.receipt in refused]

        return ById(self.inner.subscribe(topics, subscription, options))

    def meant(self, receipt: Receipt) -> Receipt:
        return self.latest.get(self.ids.get(receipt, ""), receipt)


class AcceptsWhatIsStale(Broken):
    class lane(Coat):  # noqa: N801
        def settle(self, settlements: Sequence[Settlement]):
            self.inner.settle(settlements)
            return []


class SettlesAtTheNextClaim(Broken):
    """What was claimed before counts as handled: acknowledged before it ran."""

    class lane(Coat):  # noqa: N801
        def claim(self, limit: int, max_bytes: int, wait_s: float):
            deliveries = self.inner.claim(limit, max_bytes, wait_s)
            self.inner.settle([Done(delivery.receipt) for delivery in deliveries])
            return deliveries

        def settle(self, settlements: Sequence[Settlement]):
            return []

        def extend(self, receipts: Iterable[Receipt], lease_s: float):
            return []


class ExtendsNothing(Broken):
    class lane(Coat):  # noqa: N801
        def extend(self, receipts: Iterable[Receipt], lease_s: float):
            return []


class ForgetsWhatIsRepeated(Broken):
    class lane(Coat):  # noqa: N801
        def claim(self, limit: int, max_bytes: int, wait_s: float):
            found = self.inner.claim(limit, max_bytes, wait_s)
            return [replace(delivery, repeated=False) for delivery in found]


class MakesPositionsUp(Broken):
    class lane(Coat):  # noqa: N801
        def claim(self, limit: int, max_bytes: int, wait_s: float):
            found = self.inner.claim(limit, max_bytes, wait_s)
            return [
                replace(delivery, position=LogPosition("a log", number))
                for number, delivery in enumerate(found)
            ]


class ShowsNoDeadLetters(Broken):
    def dead_letters(self, subscription: str | None = None, limit: int = 100):
        return []


class CountsNoAttempts(Broken):
    class lane(Coat):  # noqa: N801
        def claim(self, limit: int, max_bytes: int, wait_s: float):
            found = self.inner.claim(limit, max_bytes, wait_s)
            return [replace(delivery, attempt=1) for delivery in found]


class RunsSuspectsTogether(Broken):
    class lane(Coat):  # noqa: N801
        def claim(self, limit: int, max_bytes: int, wait_s: float):
            found = list(self.inner.claim(limit, max_bytes, wait_s))
            while found and found[-1].alone and len(found) < limit:
                more = self.inner.claim(limit, max_bytes, 0.0)
                if not more:
                    break
                found += more
            return [replace(delivery, alone=False) for delivery in found]


class RetriesAtOnce(Broken):
    class lane(Coat):  # noqa: N801
        def settle(self, settlements: Sequence[Settlement]):
            return self.inner.settle(
                [
                    replace(each, delay_s=0.0) if isinstance(each, Retry) else each
                    for each in settlements
                ]
            )


class BuriesWithoutAGrave(Broken):
    class lane(Coat):  # noqa: N801
        def settle(self, settlements: Sequence[Settlement]):
            return self.inner.settle(
                [Done(each.receipt) if isinstance(each, Dead) else each for each in settlements]
            )


class LosesEveryTenthRelease(Broken):
    class lane(Coat):  # noqa: N801
        count = 0

        def settle(self, settlements: Sequence[Settlement]):
            return self.inner.settle([self.one(each) for each in settlements])

        def one(self, settlement: Settlement) -> Settlement:
            self.count += isinstance(settlement, Release)
            lost = isinstance(settlement, Release) and self.count % 10 == 0
            return Done(settlement.receipt) if lost else settlement


class LosesSettlements(Broken):
    class lane(Coat):  # noqa: N801
        count = 0

        def settle(self, settlements: Sequence[Settlement]):
            self.count += 1
            return [] if self.count % 4 == 0 else self.inner.settle(settlements)


class ClosingSettles(Broken):
    class lane(Coat):  # noqa: N801
        held: tuple[Any, ...] = ()

        def claim(self, limit: int, max_bytes: int, wait_s: float):
            found = self.inner.claim(limit, max_bytes, wait_s)
            self.held = (*self.held, *(delivery.receipt for delivery in found))
            return found

        def close(self) -> None:
            with suppress(Exception):
                self.inner.settle([Done(receipt) for receipt in self.held])
            self.inner.close()


class NeverWaits(Broken):
    class lane(Coat):  # noqa: N801
        def claim(self, limit: int, max_bytes: int, wait_s: float):
            return self.inner.claim(limit, max_bytes, 0.0)


class IgnoresBytes(Broken):
    class lane(Coat):  # noqa: N801
        def claim(self, limit: int, max_bytes: int, wait_s: float):
            return self.inner.claim(limit, 1 << 30, wait_s)


class KeepsForADay(Broken):
    """Retention by age alone: who is slow finds nothing."""

    class lane(Coat):  # noqa: N801
        def claim(self, limit: int, max_bytes: int, wait_s: float):
            found = self.inner.claim(limit, max_bytes, wait_s)
            old_ms = self.inner._broker.wall_ms() - 80_000_000
            old = [delivery for delivery in found if delivery.message.time_ms < old_ms]
            self.inner.settle([Done(delivery.receipt) for delivery in old])
            return [delivery for delivery in found if delivery not in old]


# --- subscribing


class IgnoresOrder(Broken):
    def subscribe(self, topics: Any, subscription: str, options: Any) -> Any:
        return self.inner.subscribe(topics, subscription, with_fields(options, order_by_key=False))


class LetsKeysGoOn(Broken):
    def subscribe(self, topics: Any, subscription: str, options: Any) -> Any:
        options = with_fields(options, hold_key_on_dead=False)
        return self.inner.subscribe(topics, subscription, options)


class IgnoresTheStart(Broken):
    def subscribe(self, topics: Any, subscription: str, options: Any) -> Any:
        return self.inner.subscribe(topics, subscription, with_fields(options, start="earliest"))


class TakesWhatNobodyReads(Broken):
    """Says that it keeps nothing for later, and tells nobody who publishes to nobody."""

    @property
    def capabilities(self) -> Any:
        return with_fields(self.inner.capabilities, replays=False)

    def prepare(self, topics: Any, subscription: str, *, order_by_key: bool = False) -> None:
        """Somebody else's work."""


class RecordsNoGuarantee(Broken):
    def subscribe(self, topics: Any, subscription: str, options: Any) -> Any:
        options = with_fields(options, guarantee=Guarantee.AT_LEAST_ONCE)
        return self.inner.subscribe(topics, subscription, options)


class SharesSubscriptions(Broken):
    """Every subscription is one and the same."""

    def subscribe(self, topics: Any, subscription: str, options: Any) -> Any:
        return self.inner.subscribe(topics, "everybody", options)


class ClaimsMore(Broken):
    """Says of itself what it cannot."""

    @property
    def capabilities(self) -> Any:
        return with_fields(self.inner.capabilities, max_message_bytes=1 << 40)


class CountsOffsetsAnew(Broken):
    """Positions of a lane's own making."""

    class lane(Coat):  # noqa: N801
        count = 0

        def claim(self, limit: int, max_bytes: int, wait_s: float):
            return [self.one(delivery) for delivery in self.inner.claim(limit, max_bytes, wait_s)]

        def one(self, delivery: Delivery) -> Delivery:
            assert delivery.position is not None
            self.count += 1
            return replace(delivery, position=replace(delivery.position, offset=self.count - 1))


# --- what people do


class PausesInWords(Broken):
    said = False

    def pause(self, subscription: str) -> bool:
        said, self.said = self.said, True
        return not said


class RewindsWhatIsSettledOnly(Broken):
    """What is claimed stays with its worker."""

    class lane(Coat):  # noqa: N801
        def settle(self, settlements: Sequence[Settlement]):
            self.inner.settle(settlements)
            return []


class FollowsInCircles(Broken):
    def follow(self, topic: str, mark: Any, limit: int):
        return with_fields(self.inner.follow(topic, mark, limit), mark=mark)


class TellsNoErrors(Broken):
    def trace(self, id: str, source: str, topic: str | None = None):
        return [
            with_fields(
                trace, standings=[with_fields(each, error=None) for each in trace.standings]
            )
            for trace in self.inner.trace(id, source, topic)
        ]


class TakesErasedIdsAgain(Broken):
    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.erased: set[str] = set()

    def erase(self, whose: Any):
        self.erased.add(whose.id)
        return self.inner.erase(whose)

    def publish(self, messages: Sequence[Message[Any]]):
        return self.inner.publish(
            [
                replace(message, id=f"{message.id}#2") if message.id in self.erased else message
                for message in messages
            ]
        )


class ErasesTheLogOnly(Broken):
    """Dead letters keep their copies."""

    def dead_letters(self, subscription: str | None = None, limit: int = 100):
        return [*self.inner.dead_letters(subscription, limit), *self.kept]

    kept: tuple[Any, ...] = ()

    def erase(self, whose: Any):
        self.kept = (*self.kept, *self.inner.dead_letters())
        return self.inner.erase(whose)
