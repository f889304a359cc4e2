"""The caller's own transactions: ``with app.transaction() as tx``, and its async form."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, cast

from duly.errors import ConfigurationError
from duly.publishing import IN_TRANSACTION
from duly.publishing.threads import Threads
from duly.stamps import Stamp
from duly.store import (
    BeginsOnLoop,
    Declare,
    Session,
    Store,
    Transaction,
    end,
    flush,
    take_after_commit,
)

log = logging.getLogger("duly")


@contextlib.contextmanager
def transaction(
    store: Store, source: str, declare: Declare | None, stamps: Sequence[Stamp] = ()
) -> Iterator[Transaction[Any]]:
    """A transaction of the store around a block. ``declare``: see `flush`.

    Commits at the end of the block; rolls back if the block raises. Raises what
    `Session.commit` raises, and the `PublishFailed` of a message that was refused.
    """
    _refuse_nested(store, "app.transaction()")
    # All in one place, with no context manager of Python's around it: what a signal raises in the
    # middle of one would leave the rest undone.
    before, session = IN_TRANSACTION.get(), None
    try:
        session = store.begin(None)
        IN_TRANSACTION.set(store.capabilities.database)
        tx: Transaction[Any] = Transaction(session.connection, source, stamps)
        try:
            yield tx
            _commit(tx, session, declare)
        finally:
            end(tx)
    except BaseException:
        if session is not None:
            session.rollback()
        raise
    finally:
        # Not reset(token): a generator may be closed in another context.
        IN_TRANSACTION.set(before)
    _after(tx)


@contextlib.asynccontextmanager
async def atransaction(
    store: Store,
    source: str,
    declare: Declare | None,
    threads: Threads,
    stamps: Sequence[Stamp] = (),
) -> AsyncIterator[Transaction[Any]]:
    """The same for ``async with``: begins on one of ``threads``, and ends on another.

    Where the store has async connections it is one of the running loop's. Cancelled while it waits
    for its turn, it takes none. Cancelled while it commits, it waits for the answer, for the thread
    cannot be called back; where the transaction stands then, the calls after the commit are made
    before `asyncio.CancelledError` goes on.
    """
    import asyncio

    _refuse_nested(store, "app.atransaction()")
    beginning = _Beginning(_beginning(store))
    try:
        session = await threads.run("begin", beginning.begin)
    except BaseException:
        if (late := beginning.abandon()) is not None:
            await asyncio.shield(asyncio.ensure_future(threads.run("end", late.rollback)))
        raise
    cancelled: BaseException | None = None
    before = IN_TRANSACTION.get()
    try:
        IN_TRANSACTION.set(store.capabilities.database)
        tx: Transaction[Any] = Transaction(session.connection, source, stamps)
        try:
            yield tx
            cancelled = await _to_its_end(threads.run("end", _commit, tx, session, declare))
        except BaseException:
            # Shielded: whatever cancels this must not leave a transaction open.
            await asyncio.shield(asyncio.ensure_future(threads.run("end", session.rollback)))
            raise
        finally:
            end(tx)
    finally:
        IN_TRANSACTION.set(before)
    _after(tx)
    if cancelled is not None:
        raise cancelled


class _Beginning:
    """A transaction that is begun on a thread, for somebody who may be gone when it is."""

    def __init__(self, begin: Callable[[], Session[Any]]) -> None:
        self._begin = begin
        self._lock = threading.Lock()
        self._session: Session[Any] | None = None
        self._abandoned = False

    def begin(self) -> Session[Any]:
        """Begin, and roll back at once where nobody waits for it any more."""
        session = self._begin()
        with self._lock:
            self._session = session
            if self._abandoned:
                session.rollback()
        return session

    def abandon(self) -> Session[Any] | None:
        """Nobody will use what will be begun, or was: that is to be rolled back, on a thread."""
        with self._lock:
            self._abandoned = True
            return self._session


async def _to_its_end(call: Awaitable[None]) -> BaseException | None:
    """Await what goes on on its thread even when cancelled, and raise what it raises.

    Returns the last cancellation that came meanwhile. To roll back beside a commit that still
    runs would give its connection to another transaction.
    """
    import asyncio

    cancelled: BaseException | None = None
    running = asyncio.ensure_future(call)
    while not running.done():
        try:
            await asyncio.wait((running,))
        except asyncio.CancelledError as error:
            cancelled = error
    running.result()
    return cancelled


def _beginning(store: Store) -> Callable[[], Session[Any]]:
    """The call that begins, for a thread beside the running loop."""
    if not store.capabilities.async_connections:
        return lambda: store.begin(None)
    import asyncio

    loop = asyncio.get_running_loop()

    async def result_of(call: Awaitable[Any]) -> Any:
        return await call

    def on_loop(call: Awaitable[Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(result_of(call), loop).result()

    return lambda: cast(BeginsOnLoop, store).begin_on_loop(None, on_loop)


def _refuse_nested(store: Store, call: str) -> None:
    if IN_TRANSACTION.get() == store.capabilities.database:
        raise ConfigurationError(
            f"{call} inside a transaction on the same database "
            f"({store.capabilities.database}) would wait for it for ever; use the tx at hand"
        )


def _commit(tx: Transaction[Any], session: Session[Any], declare: Declare | None) -> None:
    flush(tx, session, declare)
    session.commit()


def _after(tx: Transaction[Any]) -> None:
    for call in take_after_commit(tx):
        try:
            call()
        except Exception:
            log.exception("a call after the commit failed; the transaction stands")
