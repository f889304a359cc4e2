"""The caller's own transactions: ``with app.transaction() as tx``, and its async form."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any

from duly.errors import ConfigurationError
from duly.message import Topic
from duly.publishing import IN_TRANSACTION
from duly.store import Session, Store, Transaction, end, flush, take_after_commit

log = logging.getLogger("duly")

Declare = Callable[[Iterable[Topic[Any]]], None]


@contextlib.contextmanager
def transaction(store: Store, source: str, declare: Declare | None) -> Iterator[Transaction[Any]]:
    """A transaction of the store around a block. ``declare``: see `flush`.

    Commits at the end of the block; rolls back if the block raises. Raises what
    `Session.commit` raises, and the `PublishFailed` of a message that was refused.
    """
    _refuse_nested(store, "app.transaction()")
    session = store.begin(None)
    with _entered(store):
        tx: Transaction[Any] = Transaction(session.connection, source)
        try:
            yield tx
            _commit(tx, session, declare)
        except BaseException:
            session.rollback()
            raise
        finally:
            end(tx)
    _after(tx)


@contextlib.asynccontextmanager
async def atransaction(
    store: Store,
    source: str,
    declare: Declare | None,
    in_thread: Callable[..., Awaitable[Any]],
) -> AsyncIterator[Transaction[Any]]:
    """The same for ``async with``: begins and commits by ``in_thread(function, *args)``."""
    _refuse_nested(store, "app.atransaction()")
    session: Session[Any] = await in_thread(store.begin, None)
    with _entered(store):
        tx: Transaction[Any] = Transaction(session.connection, source)
        try:
            yield tx
            await in_thread(_commit, tx, session, declare)
        except BaseException:
            session.rollback()
            raise
        finally:
            end(tx)
    _after(tx)


def _refuse_nested(store: Store, call: str) -> None:
    if IN_TRANSACTION.get() == store.capabilities.database:
        raise ConfigurationError(
            f"{call} inside a transaction on the same database "
            f"({store.capabilities.database}) would wait for it for ever; use the tx at hand"
        )


@contextlib.contextmanager
def _entered(store: Store) -> Iterator[None]:
    before = IN_TRANSACTION.get()
    IN_TRANSACTION.set(store.capabilities.database)
    try:
        yield
    finally:
        # Not reset(token): an async generator may be closed in another context.
        IN_TRANSACTION.set(before)


def _commit(tx: Transaction[Any], session: Session[Any], declare: Declare | None) -> None:
    flush(tx, session, declare)
    session.commit()


def _after(tx: Transaction[Any]) -> None:
    for call in take_after_commit(tx):
        try:
            call()
        except Exception:
            log.exception("a call after the commit failed; the transaction stands")
