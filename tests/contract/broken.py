"""Brokers and stores with one mistake each, as people make them; the suite has to find each.

A mistake is a coat around a sound broker or store that changes one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import replace as with_fields
from typing import Any

from msgspec.structs import replace

from duly.broker import Delivery, Published, Receipt, RepeatDropped
from duly.errors import IdentityConflict, MessageTooLarge
from duly.guarantees import Dead, Done, Guarantee, Release, Retry, Settlement
from duly.message import Message
from duly.store import Admitted, Outgoing, Refusal, outbox_of
from duly.testing.conformance import BrokerSubject, StoreSubject
from duly.testing.conformance.memory import DATABASE, LOG, STORE_APART
from tests.contract.subjects import SQLITE


class Coat:
    """Passes on whatever it does not change."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Broken(Coat):
    """A broker; its lanes are coats too."""

    lane: type[Coat] = Coat

    def subscribe(self, topics: Any, subscription: str, options: Any) -> Any:
        return self.lane(self.inner.subscribe(topics, subscription, options))


# --- publishing


class StoresBackwards(Broken):
    def publish(self, messages: Sequence[Message[Any]]):
        return list(self.inner.publish(messages[::-1]))[::-1]


class ForgetsHeaders(Broken):
    def publish(self, messages: Sequence[Message[Any]]):
        return self.inner.publish([replace(message, headers={}) for message in messages])


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


class IgnoresTheStart(Broken):
    def subscribe(self, topics: Any, subscription: str, options: Any) -> Any:
        return self.inner.subscribe(topics, subscription, with_fields(options, start="earliest"))


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


# --- stores


class BrokenStore(Coat):
    """A store; its sessions are coats too."""

    session: type[Coat] = Coat

    def begin(self, scope: Any) -> Any:
        return self.session(self.inner.begin(scope))


class RemembersOutsideTheTransaction(BrokenStore):
    """The inbox row is committed by itself, before the handler."""

    def begin(self, scope: Any) -> Any:
        outer = self.inner

        class Divided(Coat):
            def admit(self, deliveries: Sequence[Delivery]):
                self.inner.rollback()
                first = outer.begin(scope)
                admitted = first.admit(deliveries)
                first.settle([Done(d.receipt) for d in admitted.fresh], admitted.fresh)
                first.commit()
                self.inner = outer.begin(None)
                return admitted

            def settle(self, *_: Any) -> None:
                """Done already."""

        return Divided(outer.begin(scope))


class AdmitsEverything(BrokenStore):
    class session(Coat):  # noqa: N801
        def admit(self, deliveries: Sequence[Delivery]):
            self.inner.admit(deliveries)
            return Admitted(list(deliveries))

        def settle(self, settlements: Any, deliveries: Any) -> None:
            with suppress(Exception):
                self.inner.settle(settlements, deliveries)


class CommitsOnlyInWords(BrokenStore):
    class session(Coat):  # noqa: N801
        def commit(self) -> None:
            self.inner.rollback()


class PublishesAtOnce(BrokenStore):
    """What a transaction publishes is sent whether it commits or not."""

    def begin(self, scope: Any) -> Any:
        outer = self.inner
        messages: list[Any] = []

        class Eager(Coat):
            def publish(self, given: Any) -> Any:
                messages.extend(given)
                return [Published(message.id) for message in given]

            def send(self, end: Callable[[], None]) -> None:
                end()
                if messages:
                    own = outer.begin(None)
                    own.publish(messages)
                    own.commit()
                    messages.clear()

            def commit(self) -> None:
                self.send(self.inner.commit)

            def rollback(self) -> None:
                self.send(self.inner.rollback)

        return Eager(outer.begin(scope))


class SavepointsAreDecoration(BrokenStore):
    class session(Coat):  # noqa: N801
        def rollback_to_savepoint(self) -> None:
            self.inner.release_savepoint()


class LeavesItsTransactionOpen(BrokenStore):
    """A commit that failed is never rolled back."""

    class session(Coat):  # noqa: N801
        def rollback(self) -> None:
            """Forgotten."""


class BrokenOutbox(Coat):
    """An outbox, in the store's place."""


class SendsUpTo(BrokenOutbox):
    """Drops everything before what was sent, sent or not."""

    def sent(self, positions: Sequence[int]) -> None:
        unsent = self.inner.unsent(10_000, 1 << 30, 0.0)
        self.inner.sent([o.position for o in unsent if o.position <= max(positions)])


class OvertakesInAKey(BrokenOutbox):
    """What was refused waits, and what is behind it does not."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.waiting: dict[int, Outgoing] = {}

    def refused(self, refusals: Sequence[Refusal]) -> None:
        unsent = {o.position: o for o in self.inner.unsent(10_000, 1 << 30, 0.0)}
        self.inner.sent([refusal.position for refusal in refusals])
        self.waiting |= {r.position: unsent[r.position] for r in refusals if r.position in unsent}

    def unsent(self, limit: int, max_bytes: int, wait_s: float):
        return self.inner.unsent(limit, max_bytes, 0.0)


class ManyRelays(BrokenOutbox):
    def hold(self, relay: str, lease_s: float) -> bool:
        return True


# --- what is wrong with each, and which tests have to say so


@dataclass(frozen=True)
class Mistake:
    """``fails`` are tests, one of each area that the mistake has to be found in."""

    coat: Callable[[Any], Any]
    fails: tuple[str, ...]
    around: BrokerSubject | StoreSubject = DATABASE
    page: str = "memory.md"


def names(mistake: Mistake) -> str:
    return getattr(mistake.coat, "__name__", str(mistake.coat))


BROKERS = (
    Mistake(ClaimsMore, ("Page::test_capabilities_are_as_the_page_says",)),
    Mistake(StoresBackwards, ("Publishing::test_messages_of_a_topic_stay_in_order",)),
    Mistake(ForgetsHeaders, ("Publishing::test_what_is_published_is_delivered_unchanged",)),
    Mistake(DropsByContent, ("Identity::test_equal_messages_under_two_ids_are_two_events",)),
    Mistake(TakesConflictsForRepeats, ("Identity::test_one_id_with_another_body_is_a_conflict",)),
    Mistake(DeliversAtOnce, ("Delays::test_a_due_time_is_kept",)),
    Mistake(ConfirmsWhatIsTooLarge, ("Limits::test_a_body_over_the_limit_is_refused",)),
    Mistake(CutsLongIds, ("Limits::test_the_longest_id_and_key_arrive_whole[x]",)),
    Mistake(
        ConfirmsBeforeItStores,
        ("Durable::test_what_was_published_is_there[crash]",),
        SQLITE,
        "sqlite.md",
    ),
    Mistake(IgnoresBytes, ("Claims::test_a_claim_is_limited_in_bytes",)),
    Mistake(SharesSubscriptions, ("Claims::test_every_subscription_sees_every_message",)),
    Mistake(
        SettlesById,
        (
            "Receipts::test_the_receipt_of_an_earlier_claim_is_refused",
            "Leases::test_a_paused_worker_is_refused_when_it_wakes[settle]",
        ),
    ),
    Mistake(
        AcceptsWhatIsStale,
        (
            "Receipts::test_a_settlement_is_accepted_once",
            "Crowds::test_settling_from_many_threads",
        ),
    ),
    Mistake(
        SettlesAtTheNextClaim,
        (
            "Leases::test_a_lease_that_ended_gives_the_message_to_another",
            "Faults::test_a_claim_whose_answer_was_lost_comes_again",
        ),
    ),
    Mistake(ExtendsNothing, ("Leases::test_extending_holds_the_claim",)),
    Mistake(
        CountsNoAttempts,
        ("Settling::test_a_retry_waits_and_counts", "Deaths::test_a_death_alone_is_charged"),
    ),
    Mistake(
        RunsSuspectsTogether,
        (
            "Deaths::test_the_first_death_of_a_batch_charges_nobody",
            "Kills::test_a_killed_worker_makes_its_claims_suspect",
        ),
    ),
    Mistake(RetriesAtOnce, ("Settling::test_a_retry_waits_and_counts",)),
    Mistake(BuriesWithoutAGrave, ("Inside::test_a_dead_letter_is_kept_with_its_history",)),
    Mistake(
        LosesEveryTenthRelease,
        (
            "Settling::test_released_messages_come_again_uncharged",
            "Histories::test_random_histories_agree_with_the_model[0]",
            "Order::test_order_holds_whatever_happens[0]",
        ),
    ),
    Mistake(
        LosesSettlements,
        (
            "Confirmed::test_not_after_its_worker_fell_silent",
            "Faults::test_at_least_once_under_random_faults[0]",
        ),
    ),
    Mistake(ClosingSettles, ("Leases::test_closing_gives_everything_back_uncharged",)),
    Mistake(NeverWaits, ("Waiting::test_publishing_wakes_a_waiting_claim",)),
    Mistake(KeepsForADay, ("Retention::test_messages_are_kept_for_those_who_are_not_done",)),
    Mistake(IgnoresOrder, ("Order::test_a_key_that_is_claimed_is_not_claimed_again",)),
    Mistake(IgnoresTheStart, ("Subscriptions::test_or_after_the_newest",)),
    Mistake(
        RecordsNoGuarantee,
        ("Subscriptions::test_another_guarantee_is_refused[at-most-once]",),
    ),
    Mistake(CountsOffsetsAnew, ("Positions::test_a_message_keeps_its_position",), LOG),
)

STORES = (
    Mistake(
        RemembersOutsideTheTransaction,
        ("ExactlyOnce::test_a_crash_at_any_step_leaves_effects_and_outputs_once",),
        STORE_APART,
    ),
    Mistake(
        AdmitsEverything,
        ("ExactlyOnce::test_a_superseded_claim_does_not_commit", "ByInbox::test_a_repeated"),
        STORE_APART,
    ),
    Mistake(
        CommitsOnlyInWords,
        ("Publications::test_a_transaction_of_its_own", "FaultsInTransactions::test_a_fault"),
        STORE_APART,
    ),
    Mistake(
        PublishesAtOnce,
        (
            "Publications::test_a_transaction_of_its_own",
            "FaultsInTransactions::test_a_worker_that_is_ended",
        ),
        STORE_APART,
    ),
    Mistake(
        SavepointsAreDecoration,
        ("Savepoints::test_a_savepoint_undoes_one_message_and_no_more",),
        STORE_APART,
    ),
    Mistake(
        LeavesItsTransactionOpen,
        ("ExactlyOnce::test_a_crash_at_any_step", "OneWriter::test_one_writer_at_a_time"),
        STORE_APART,
    ),
)

OUTBOXES = (
    Mistake(SendsUpTo, ("Outboxes::test_what_is_sent_is_gone",), STORE_APART),
    Mistake(OvertakesInAKey, ("Outboxes::test_a_key_waits_behind",), STORE_APART),
    Mistake(
        ManyRelays,
        ("Outboxes::test_one_relay_at_a_time", "Relaying::test_a_second_relay_takes_over"),
        STORE_APART,
    ),
)

MISTAKES = {names(mistake): mistake for mistake in (*BROKERS, *STORES, *OUTBOXES)}


def subject_with(name: str) -> BrokerSubject | StoreSubject:
    """The subject with this mistake in it."""
    mistake = MISTAKES[name]
    around = mistake.around
    if isinstance(around, BrokerSubject):
        return with_fields(
            around,
            open=lambda site: mistake.coat(around.open(site)),
            kill=around.kill and killed(around.kill),
        )
    if mistake in OUTBOXES:
        return with_fields(around, outbox=lambda _, store: mistake.coat(outbox_of(store)))
    return with_fields(around, open=lambda site, broker: mistake.coat(around.open(site, broker)))


def killed(kill: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    return lambda broker, lane: kill(broker.inner, lane.inner)
