"""Group commit: the writes of many threads become one transaction with one fsync."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from duly.errors import CommitUnknown, ConfigurationError
from duly.sql.sqlite.driver import (
    StatementRunner,
    broker_error,
    commit,
    connect,
    error_code,
    roll_back,
)
from duly.sql.sqlite.gate import Gate
from duly.sql.sqlite.place import Place
from duly.sql.sqlite.schema import Tables
from duly.sql.sqlite.turn import Turn, forked
from duly.sql.steps import Steps

R = TypeVar("R")

Together = Callable[[Sequence[Any]], Steps[Sequence[Any]]]
"""The steps for items of several callers at once; they give one result for each item."""

# A group takes no further write after this long, so that others' turns come soon.
_GROUP_S = 0.05
# And runs so many items of several callers at once, between two looks at the clock.
_ITEMS = 1000
# So many who wait for a group are woken singly: one to lead it, one to wake all the others.
_ALONE = 2


class _Write(Generic[R]):
    """One caller's write and how it ended. ``items`` may be written with those of others that
    have the same ``together``.
    """

    __slots__ = (
        *("durable", "ended", "error", "gate", "items", "leads", "make_steps", "opener", "opens"),
        *("result", "together", "woken"),
    )

    def __init__(
        self,
        make_steps: Callable[[], Steps[R]],
        durable: bool,
        items: Sequence[Any] = (),
        together: Together | None = None,
    ) -> None:
        self.make_steps = make_steps
        self.durable = durable
        self.items = items
        self.together = together
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = False
        self.leads = False
        # Where its caller waits: alone, or at a gate that the caller of another opens.
        self.woken: threading.Lock | None = None
        self.gate: Gate | None = None
        self.opener: _Write[Any] | None = None
        # The gate that its own caller opens when it wakes.
        self.opens: Gate | None = None

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        self.result = result
        self.error = error
        self.ended = True

    def will_wait_alone(self) -> threading.Lock:
        """A lock for its caller to wait on, unless it has ``ended`` or ``leads`` after this."""
        woken = threading.Lock()
        woken.acquire()
        self.woken = woken
        return woken

    def outcome(self) -> R:
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[no-any-return]


class GroupWriter:
    """The one writer of a database file in this process.

    A caller that finds nobody writing leads: on its own thread, it runs what is queued in one
    transaction and then hands the lead to the first who came meanwhile. That one wakes those
    whose writes were just stored, once it has run its own statements and has nothing left but to
    sync: who is awake contends with it for the interpreter, and the sync is when that is free.
    It wakes them before it waits for anything else. The first two that come while another leads
    wait each on a lock: one to lead next, one to open the gate at which all further ones wait
    (see `Gate`). A gate may be opened at any time: whose write has not ended then waits alone.

    ``committed`` is called after each commit with whether it was synced; ``before_release`` while
    the turn is still held, with what to call before something that takes long.
    """

    def __init__(
        self,
        path: Path,
        turn: Turn,
        tables: Tables,
        *,
        busy_s: float,
        committed: Callable[[bool], None],
        before_release: Callable[[Callable[[], None]], None],
    ) -> None:
        self._path = path
        self._place = Place(path)
        self._turn = turn
        self._tables = tables
        self._busy_s = busy_s
        self._committed = committed
        self._before_release = before_release
        self._pid = os.getpid()
        self._mutex = threading.Lock()
        self._queue: list[_Write[Any]] = []
        self._led = False
        self._leader = 0  # the thread that led last
        self._closed = False
        self._let_go = threading.Event()
        self._connection: sqlite3.Connection | None = None
        self._runner: StatementRunner | None = None
        self._synced = True
        self._sent: list[_Write[Any]] = []
        # The last group, as long as it has not been woken.
        self._asleep: Sequence[_Write[Any]] = ()
        # The first of the next group, which wait alone; and gates that are shut.
        self._alone: list[_Write[Any]] = []
        self._gates: list[Gate] = []

    def write(self, make_steps: Callable[[], Steps[R]], durable: bool) -> R:
        """Run the steps in a transaction, stored on return.

        ``make_steps`` is called again when the transaction has to be tried again. Raises
        `BrokerUnavailable` or `BrokerUnusable` when nothing was changed, `CommitUnknown`, or
        what the steps raise (rolled back).
        """
        return self._write(_Write(make_steps, durable))

    def write_items(self, items: Sequence[Any], together: Together) -> Sequence[Any]:
        """Run ``together`` for these items and those that others write by it just now, durably;
        returns the results of these. Raises as `write`.
        """
        return self._write(_Write(lambda: together(items), True, items, together))

    def _write(self, write: _Write[R]) -> R:
        if os.getpid() != self._pid:
            raise ConfigurationError(forked(self._path))
        try:
            with self._mutex:
                if self._closed:
                    raise ConfigurationError(f"{self._path}: already closed")
                self._queue.append(write)
                self._place_in_line(write)
            if not write.leads:
                self._wait(write)
            if write.leads:
                self._lead(write)
        except BaseException:  # interrupted, mostly
            self._leave(write)
            raise
        return write.outcome()

    def close(self) -> None:
        """Refuse what comes later, and close the connection when what came before has ended.

        Closed in the middle of another thread's statement it would take the process with it.
        Who leads ends within its patience; whoever ends last closes where that is not waited for,
        as by a signal handler that interrupted the leader itself.
        """
        with self._mutex:
            self._closed = True
            if not self._led:
                self._close()
        if self._leader != threading.get_ident():
            self._let_go.wait(self._busy_s)

    def _close(self) -> None:
        """Nobody leads and nobody will; the mutex is held."""
        self._discard()
        self._gates.clear()
        self._turn.close()
        self._let_go.set()

    def _place_in_line(self, write: _Write[Any]) -> None:
        """Let it lead at once, or else wait somewhere; the mutex is held."""
        if not self._led:
            self._led = write.leads = True
        elif len(self._alone) < _ALONE:
            self._alone.append(write)
            write.will_wait_alone()
        elif (gate := self._gate_of(self._alone[-1])) is not None:
            gate.join()
            write.gate, write.opener = gate, self._alone[-1]
        else:
            write.will_wait_alone()

    def _gate_of(self, opener: _Write[Any]) -> Gate | None:
        """The gate that it opens when it wakes; none for one that is to lead instead, and where
        there are no descriptors left: it is only the quicker way.
        """
        if opener.opens is None and not opener.leads:
            with contextlib.suppress(OSError):
                opener.opens = self._gates.pop() if self._gates else Gate.made()
        return opener.opens

    def _wait(self, write: _Write[Any]) -> None:
        if (woken := write.woken) is not None:
            woken.acquire()
        elif (gate := write.gate) is not None:
            self._wait_at_gate(write, gate)
        if write.opens is not None and not write.leads:
            write.opens.open()

    def _leave(self, write: _Write[Any]) -> None:
        """Leave the queue, and pass on what its caller was to do."""
        with self._mutex:
            if write in self._queue:
                self._queue.remove(write)
            self._break_open(write)
            if write.leads:
                self._hand_on(write)

    def _wait_at_gate(self, write: _Write[Any], gate: Gate) -> None:
        is_last = gate.wait()
        write.gate = None  # before it can be another group's
        if is_last and not self._closed:
            gate.shut()
            self._gates.append(gate)
        if not write.ended:  # broken open
            woken = write.will_wait_alone()
            if not (write.ended or write.leads):
                woken.acquire()

    def _break_open(self, opener: _Write[Any]) -> None:
        """Open the gate of one that will not; the mutex is held."""
        gate, opener.opens = opener.opens, None  # nobody comes to it any more
        if gate is not None:
            gate.break_open()

    def _lead(self, own: _Write[Any]) -> None:
        group: list[_Write[Any]] = []
        self._leader = threading.get_ident()
        try:
            try:
                self._turn.acquire(self._busy_s, before_waiting=self._wake_last)
            except Exception as error:  # noqa: BLE001 - each caller gets it
                self._take_queue(group)
                _fail(group, error)
                return
            try:
                self._take_queue(group)
                self._store(group)
            except BaseException:  # interrupted: nothing stays open that others would wait for
                self._undo()
                raise
            finally:
                self._turn.release()
        finally:
            try:
                self._end_lead(own, group)
            except BaseException:  # interrupted: nobody else could lead any more
                self._end_lead(own, group)
                raise

    def _end_lead(self, own: _Write[Any], group: list[_Write[Any]]) -> None:
        """Give the lead away. May be called again, where it did not come to its end."""
        # Interrupted (a KeyboardInterrupt) around COMMIT: to run these again would be blind.
        _fail([w for w in self._sent if not w.ended], CommitUnknown(f"{self._path}: interrupted"))
        self._sent = []
        with self._mutex:
            # The others left over, where the group was cut short or the leader interrupted.
            self._queue[:0] = [w for w in group if not (w.ended or w in self._queue)]
            if own in self._queue:
                self._queue.remove(own)
            self._wake_last()
            self._asleep = [w for w in group if w.ended]
            self._hand_on(own)

    def _take_queue(self, group: list[_Write[Any]]) -> None:
        with self._mutex:
            group += self._queue
            self._queue.clear()
            self._alone = []

    def _hand_on(self, own: _Write[Any]) -> None:
        """Let the first in the queue lead in place of this one; the mutex is held."""
        self._led = bool(self._queue)
        if self._queue:
            first = self._queue[0]
            first.leads = True
            self._break_open(first)
            _wake_one(first)
        else:
            self._wake_last()
            if self._closed:
                self._close()
        own.leads = False

    def _wake_last(self) -> None:
        """Wake those whose writes the last group ended. By who leads, or with the mutex held."""
        asleep, self._asleep = self._asleep, ()
        _wake(asleep)

    def _store(self, group: list[_Write[Any]]) -> None:
        try:
            runner = self._begin(any(write.durable for write in group))
        except Exception as error:  # noqa: BLE001 - each caller gets it
            self._undo()
            _fail(group, self._meaning(error))
            return
        try:
            ran = self._run_together(runner, group)
        except Exception as error:  # noqa: BLE001 - its own caller gets it
            self._wake_last()
            self._undo()
            if len(group) == 1:
                group[0].end(error=self._meaning(error))
            else:
                self._store_each_alone(group)
            return
        self._commit(ran)

    def _run_together(
        self, runner: StatementRunner, group: list[_Write[Any]]
    ) -> list[tuple[_Write[Any], Any]]:
        until = time.monotonic() + _GROUP_S
        ran: list[tuple[_Write[Any], Any]] = []
        for writes in _shared(group):
            if len(writes) == 1:
                ran.append((writes[0], runner.run(writes[0].make_steps())))
            else:
                ran += _run_as_one(runner, writes)
            self._wake_last()
            if time.monotonic() > until:
                break
        return ran

    def _store_each_alone(self, group: list[_Write[Any]]) -> None:
        """One caller's failure is its own: the others are stored without it."""
        for write in group:
            if not write.ended:
                self._store([write])
                _wake((write,))

    def _commit(self, ran: list[tuple[_Write[Any], Any]]) -> None:
        assert self._connection is not None
        writes = self._sent = [write for write, _ in ran]
        try:
            commit(self._connection, self._path)
        except sqlite3.Error as error:  # certainly not stored
            self._sent = []
            if len(writes) == 1:
                writes[0].end(error=self._meaning(error))
            else:
                self._store_each_alone(writes)
            return
        except CommitUnknown as error:  # nobody may try again
            self._discard()
            _fail(writes, error)
            return
        for write, result in ran:
            write.end(result)
        self._committed(self._synced)
        self._before_release(lambda: _wake(writes))

    def _begin(self, durable: bool) -> StatementRunner:
        self._place.check()
        if self._connection is None or self._runner is None:
            self._connection = connect(self._path, sqlite3.Connection, busy_s=self._busy_s)
            self._connection.execute("pragma busy_timeout = 0")  # `_begin_immediate` waits
            self._runner = self._tables.runner(self._connection)
            self._synced = True
        if durable != self._synced:
            # A script, because a pragma acts when it is prepared and a cached one never again.
            # One connection for both, because each commit empties the caches of the others.
            self._connection.executescript(
                f"pragma synchronous = {'full' if durable else 'normal'}"
            )
            self._synced = durable
        self._begin_immediate(self._connection)
        self._tables.check(self._runner)
        return self._runner

    def _begin_immediate(self, connection: sqlite3.Connection) -> None:
        try:
            connection.execute("begin immediate")
        except sqlite3.OperationalError as error:
            if error_code(error) != sqlite3.SQLITE_BUSY:
                raise
            self._wake_last()
            # A foreign program is writing.
            connection.execute(f"pragma busy_timeout = {int(self._busy_s * 1000)}")
            try:
                connection.execute("begin immediate")
            finally:
                connection.execute("pragma busy_timeout = 0")

    def _undo(self) -> None:
        if self._connection is not None and not roll_back(self._connection):
            self._discard()

    def _discard(self) -> None:
        # The runner too: SQLite keeps the file open for as long as a statement is there.
        connection, self._connection, self._runner = self._connection, None, None
        if connection is not None:
            connection.close()

    def _meaning(self, error: Exception) -> Exception:
        if isinstance(error, sqlite3.Error):
            return broker_error(error, self._path)
        return error


def _shared(group: Sequence[_Write[Any]]) -> Iterable[Sequence[_Write[Any]]]:
    """The writes of a group, those side by side whose items can be written at once."""
    if len(group) == 1:
        return (group,)
    shared: list[list[_Write[Any]]] = []
    room: dict[Together, int] = {}
    at: dict[Together, list[_Write[Any]]] = {}
    for write in group:
        if write.together is None:
            shared.append([write])
        elif len(write.items) > room.get(write.together, 0):
            at[write.together] = [write]
            room[write.together] = _ITEMS - len(write.items)
            shared.append(at[write.together])
        else:
            at[write.together].append(write)
            room[write.together] -= len(write.items)
    return shared


def _run_as_one(
    runner: StatementRunner, writes: Sequence[_Write[Any]]
) -> Iterable[tuple[_Write[Any], Sequence[Any]]]:
    together = writes[0].together
    assert together is not None, "only such writes share"
    results = iter(runner.run(together([item for write in writes for item in write.items])))
    return [(write, [*islice(results, len(write.items))]) for write in writes]


def _fail(group: list[_Write[Any]], error: Exception) -> None:
    for write in group:
        write.end(error=error)


def _wake(group: Iterable[_Write[Any]]) -> None:
    for write in group:
        if not write.ended:
            continue
        if write.opener is None or not write.opener.ended or write.gate is None:
            _wake_one(write)


def _wake_one(write: _Write[Any]) -> None:
    if (woken := write.woken) is not None:
        with contextlib.suppress(RuntimeError):  # before an interrupt it was woken already
            woken.release()
        write.woken = None
    elif (gate := write.gate) is not None:
        gate.break_open()
