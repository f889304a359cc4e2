"""Planted bugs: what the checks of this folder must catch. Patched into a process under test."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from duly.guarantees import Guarantee
from duly.store import Transaction, flush
from duly.worker import lane, rounds, undone
from duly.worker.beforehand import settle_before


def _settle_before_the_handler(process: Any) -> None:
    lane.ROUNDS[Guarantee.AT_LEAST_ONCE] = rounds.at_most_once


def _settle_after_the_handler(process: Any) -> None:
    lane.ROUNDS[Guarantee.AT_MOST_ONCE] = rounds.at_least_once


def _settle_in_a_second_commit(process: Any) -> None:
    def exactly_once(self: lane.Lane) -> Generator[Any, None, None]:
        work = self.share_for_transaction((yield from self.take()))
        if not work:
            return
        session = self.begin()
        tx: Transaction[Any] = Transaction(session.connection, self.around.source)
        try:
            session.admit([delivery for delivery, _ in work])
            ended = yield from rounds.call_within(self, work, tx, session)
            flush(tx, session)
            session.commit()
        except BaseException as error:
            session.rollback()
            yield from undone.rolled_back(self, work, error)
            return
        self.subscription.settle(ended)

    lane.ROUNDS[Guarantee.EXACTLY_ONCE] = exactly_once


def _settle_before_the_effects_commit(process: Any) -> None:
    def exactly_once(self: lane.Lane) -> Generator[Any, None, None]:
        work = self.share_for_transaction((yield from self.take()))
        if not work:
            return
        settle_before(self, work)
        session = self.begin()
        tx: Transaction[Any] = Transaction(session.connection, self.around.source)
        try:
            yield from rounds.call_within(self, work, tx, session)
            flush(tx, session)
            session.commit()
        except Exception:
            session.rollback()

    lane.ROUNDS[Guarantee.EXACTLY_ONCE] = exactly_once


def _no_fence(process: Any) -> None:
    from duly.store import Admitted
    from duly.stores.sqlite.session import SQLiteSession

    def admit(self: SQLiteSession, deliveries: Sequence[Any]) -> Admitted:
        return Admitted(deliveries)

    def settle(self: SQLiteSession, settlements: Sequence[Any], deliveries: Sequence[Any]) -> None:
        from duly.message import now_ms
        from duly.sql import log

        self._run(log.settle(settlements, now_ms()))

    SQLiteSession.admit = admit  # type: ignore[method-assign]
    SQLiteSession.settle = settle  # type: ignore[method-assign]


def _publish_without_sync(process: Any) -> None:
    from duly.sql.sqlite.file import DatabaseFile

    def unsynced(self: DatabaseFile, items: Any, together: Any) -> Any:
        return self.write(lambda: together(items), durable=False)

    DatabaseFile.write_items = unsynced  # type: ignore[method-assign]


def _outputs_beside_the_transaction(process: Any) -> None:
    from duly.stores.sqlite.session import SQLiteSession

    late: list[Any] = []
    commit = SQLiteSession.commit

    def publish(self: SQLiteSession, messages: Sequence[Any]) -> Sequence[Any]:
        late.extend(messages)
        return ()

    def commit_then_publish(self: SQLiteSession) -> None:
        from duly.message import now_ms
        from duly.sql import log

        home: Any = self._home
        commit(self)
        messages = list(late)
        late.clear()
        process.points.at("planted: between the two")
        if messages:
            home.file.write(lambda: log.publish(home._catalog, messages, now_ms()))

    SQLiteSession.publish = publish  # type: ignore[method-assign]
    SQLiteSession.commit = commit_then_publish  # type: ignore[method-assign]


BUGS: dict[str, Callable[[Any], None]] = {
    "settle before the handler": _settle_before_the_handler,
    "settle after the handler": _settle_after_the_handler,
    "settle in a second commit": _settle_in_a_second_commit,
    "settle before the effects commit": _settle_before_the_effects_commit,
    "no fence": _no_fence,
    "publish without sync": _publish_without_sync,
    "outputs beside the transaction": _outputs_beside_the_transaction,
}
