"""What an author supplies: how to open a broker or a store on a place of a test's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from duly.broker import Broker, Subscription
from duly.guarantees import Admission
from duly.message import now_ms
from duly.store import Outbox, Parked, Store, outbox_of, parked_of


class Clock:
    """Time that passes only when told to: leases, retries and due times go by it.

    Called, it gives monotonic seconds. The two clocks pass together in `advance`; `step` sets
    the wall clock alone, as an operator or a time server does.
    """

    def __init__(self) -> None:
        self._passed_s = 0.0
        # Near the present: a store may go by the real clock.
        self._started_ms = now_ms()
        self._stepped_s = 0.0

    def __call__(self) -> float:
        return 1_000_000.0 + self._passed_s

    def wall_ms(self) -> int:
        """Milliseconds since 1970 UTC."""
        return self._started_ms + int((self._passed_s + self._stepped_s) * 1000)

    def boot_ms(self) -> int:
        """Milliseconds since the machine started: what no step of the wall clock moves."""
        return int(self() * 1000)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._passed_s += seconds

    def step(self, seconds: float) -> None:
        """Set the wall clock; no time passes."""
        self._stepped_s += seconds


@dataclass(frozen=True, slots=True)
class Site:
    """Where one test takes place.

    ``folder`` is empty at first; ``name`` is the test's own and fits where a server wants a
    name (a schema, a virtual host, a prefix): at most 40 of a-z, 0-9 and ``_``. ``clock`` is
    the time to go by; None: the real clocks. The same folder and name opened again is the same
    place, with what was left there.
    """

    folder: Path
    name: str
    clock: Clock | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerSubject:
    """A broker under test.

    - ``name``: in the ids of its tests, and its table in the page.
    - ``open``: opens the broker on a site, or opens again what was left there.
    - ``kill``: the worker that holds this lane dies, in a way the broker can notice at once.
      Where it is None workers die in silence only, until their lease ends.
    - ``clock``: makes the time of one test, for brokers that need to be told how it passes.
    - ``operations``: which more protocols the broker has: of `duly.inspection` `Steering`,
      `Tracing` (with `Following`), `Erasing`, `Counting`, `Buries` and `Surveys`, of
      `duly.schedules` `Ticking`, of `duly.broker` `Knows` and (of its subscriptions)
      `NotesRepeats`. Each adds an area.
    """

    name: str
    open: Callable[[Site], Broker]
    kill: Callable[[Broker, Subscription], None] | None = None
    clock: Callable[[], Clock] = Clock
    operations: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Effects:
    """A table of a store: ``insert(connection, key, value)`` adds a row, in the transaction of
    that connection, and fails where the key is there; ``rows`` reads what is committed.
    """

    insert: Callable[[Any, str, str], object]
    rows: Callable[[], Mapping[str, str]]


class OwnTransaction(Protocol):
    """An application's own open transaction on the store's database."""

    @property
    def connection(self) -> Any:
        """What the application would pass as ``within=``."""
        ...

    def commit(self) -> None:
        """Commit it."""
        ...

    def rollback(self) -> None:
        """Roll it back."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSubject:
    """A store under test.

    - ``open``: opens the store on a site, beside a broker. Its `Store.begin` should give up on
      a busy database within half a second: longer than a commit takes on a machine that is
      busy too, for tests wait that long to see one refused.
    - ``effects``: makes the table ``effects`` (key, value), the key unique, where it is not there
      yet, and says how to use it.
    - ``own``: begins a transaction of the application's own, beside the store.
    - ``broker``: the broker in the same database, on the same site: then admission by claim is
      tested. By cursor and by inbox are tested beside the brokers in memory.
    - ``outbox``: the store's outbox under the site's clock, where `outbox_of` gives another.
    - ``parked``: likewise what the store has parked, where `parked_of` gives another.
    - ``operations``: which more protocols of `duly.inspection` the store has: `Remembering`,
      `Forgetting`, and `Graveyard` (its ``graveyard``). Each adds an area.
    """

    name: str
    open: Callable[[Site, Broker], Store]
    effects: Callable[[Site, Store], Effects]
    own: Callable[[Site, Store], AbstractContextManager[OwnTransaction]]
    broker: BrokerSubject | None = None
    outbox: Callable[[Site, Store], Outbox] | None = None
    parked: Callable[[Site, Store], Parked] | None = None
    operations: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Pairing:
    """A store beside a broker, with one way of admission."""

    broker: BrokerSubject
    store: StoreSubject
    admission: Admission

    @property
    def name(self) -> str:
        """In the ids of the tests."""
        return self.admission.value.replace(" ", "-")


def opened_outbox(subject: StoreSubject, site: Site, store: Store) -> Outbox:
    """The outbox of an open store."""
    if subject.outbox is not None:
        return subject.outbox(site, store)
    outbox = outbox_of(store)
    assert outbox is not None, "the page says that this store has an outbox"
    return outbox


def opened_parked(subject: StoreSubject, site: Site, store: Store) -> Parked | None:
    """What an open store has parked, of one that can."""
    if subject.parked is not None and store.capabilities.parks:
        return subject.parked(site, store)
    return parked_of(store)
