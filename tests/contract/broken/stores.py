"""Mistakes of stores and of outboxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace as with_fields
from typing import Any

from duly.broker import Delivery, Published
from duly.errors import DulyError, IdentityConflict, Superseded
from duly.guarantees import Done, Release, Retry
from duly.store import Admitted, Outgoing, Refusal
from tests.contract.broken.coats import BrokenStore, Coat


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


class ParksOutsideTheTransaction(BrokenStore):
    """The cursor passes a failed message, and keeps it, whether its transaction commits or not."""

    def begin(self, scope: Any) -> Any:
        outer = self.inner

        class Divided(Coat):
            def settle(self, settlements: Any, deliveries: Sequence[Delivery]) -> None:
                if not any(isinstance(each, Retry) for each in settlements):
                    self.inner.settle(settlements, deliveries)
                    return
                self.inner.rollback()
                own = outer.begin(scope)
                own.admit(deliveries)
                own.settle(settlements, deliveries)
                own.commit()
                self.inner = outer.begin(None)

        return Divided(outer.begin(scope))


class ParksNothing(BrokenStore):
    """What failed stays in its place, whatever the scope says."""

    def begin(self, scope: Any) -> Any:
        return self.inner.begin(scope and with_fields(scope, parks=False))


class TakesForFenced(BrokenStore):
    """A parked message is admitted whatever its token says."""

    class session(Coat):  # noqa: N801
        def admit(self, deliveries: Sequence[Delivery]):
            with suppress(Superseded):
                return self.inner.admit(deliveries)
            return Admitted(list(deliveries))


class TakesWithoutALease(Coat):
    """What has been taken is free again at once, under its old receipt."""

    def take(self, *args: Any) -> Any:
        taken = self.inner.take(*args)
        self.inner.give_back([Release(delivery.receipt) for delivery in taken])
        return taken


class CommitsOnlyInWords(BrokenStore):
    class session(Coat):  # noqa: N801
        def commit(self) -> None:
            self.inner.rollback()


class CommitsAgain(BrokenStore):
    """A session that has ended commits as often as it is asked to."""

    class session(Coat):  # noqa: N801
        def commit(self) -> None:
            with suppress(DulyError):
                self.inner.commit()


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


class AdmitsByAnything(BrokenStore):
    """Asked to admit by claims that it does not have, it takes everything for claimed."""

    def begin(self, scope: Any) -> Any:
        session = Coat(self.inner.begin(None))
        session.admit = lambda deliveries: Admitted(list(deliveries))  # type: ignore[attr-defined]
        return session


class IsAnotherDatabase(BrokenStore):
    @property
    def capabilities(self) -> Any:
        return with_fields(self.inner.capabilities, database="another", tx_s=60.0)


class PublishesWithinInWords(BrokenStore):
    def publish_within(self, connection: Any, messages: Any, topics: Any = ()):
        return [Published(message.id) for message in messages]


class OverlooksConflicts(BrokenStore):
    class session(Coat):  # noqa: N801
        def publish(self, messages: Any):
            return [
                Published(outcome.message_id) if isinstance(outcome, IdentityConflict) else outcome
                for outcome in self.inner.publish(messages)
            ]


class SavepointsAreDecoration(BrokenStore):
    class session(Coat):  # noqa: N801
        def rollback_to_savepoint(self) -> None:
            self.inner.release_savepoint()


class LeavesItsTransactionOpen(BrokenStore):
    """A commit that failed is never rolled back."""

    class session(Coat):  # noqa: N801
        def rollback(self) -> None:
            """Forgotten."""


class SendsUpTo(Coat):
    """Drops everything before what was sent, sent or not."""

    def sent(self, positions: Sequence[int]) -> None:
        unsent = self.inner.unsent(10_000, 1 << 30, 0.0)
        self.inner.sent([o.position for o in unsent if o.position <= max(positions)])


class SendsInWords(Coat):
    """What was sent stays, to be sent again."""

    def sent(self, positions: Sequence[int]) -> None:
        """Forgotten."""


class OvertakesInAKey(Coat):
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


class ManyRelays(Coat):
    def hold(self, relay: str, lease_s: float) -> bool:
        return True
