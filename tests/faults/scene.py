"""A scene: one folder with a database file, the processes on it, and what the file holds."""

from __future__ import annotations

import signal
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duly import App, Message
from duly.testing.chaos.processes import DEADLINE_S, KILLED, Child, Nursery
from tests.faults.program import EFFECTS, UNREADABLE, inputs

__all__ = ["DEADLINE_S", "KILLED", "ROOT", "Child", "Nursery", "Scene", "State"]

ROOT = Path(__file__).parent.parent.parent

SLOWEST = "select stream, min(next_seq) from duly_cursors group by stream"


@dataclass
class State:
    """What the database holds, counted by number."""

    published: Counter[int] = field(default_factory=Counter)
    effects: Counter[int] = field(default_factory=Counter)
    ledger: Counter[int] = field(default_factory=Counter)
    outputs: Counter[int] = field(default_factory=Counter)
    on_their_way: Counter[int] = field(default_factory=Counter)
    dead: Counter[int] = field(default_factory=Counter)
    why_dead: dict[int, str] = field(default_factory=dict)
    unsettled: Counter[int] = field(default_factory=Counter)
    order: list[int] = field(default_factory=list)

    def taken(self, n: int) -> tuple[int, int, int, int]:
        """How often a message took effect: both tables, the output, the dead letters."""
        return self.effects[n], self.ledger[n], self.outputs[n], self.dead[n]


class Scene:
    """One database file and the processes on it."""

    def __init__(self, nursery: Nursery, folder: Path, **orders: Any) -> None:
        self.nursery = nursery
        self.folder = folder
        self.path = Path(orders.get("database", folder / "duly.db"))
        self.orders = {"guarantee": "exactly-once", **orders}
        self.children: list[Child] = []
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def store(self) -> Path:
        """Where the effects are."""
        return self.folder / self.orders["store"] if "store" in self.orders else self.path

    def told(self, **orders: Any) -> dict[str, Any]:
        """The orders of a process of this scene."""
        log = self.folder / f"log-{len(self.children)}"
        return {**self.orders, "folder": str(self.folder), "log": str(log), **orders}

    def start(self, role: str = "worker", **orders: Any) -> Child:
        """Start a process of this scene."""
        child = self.nursery.start(self.told(role=role, **orders))
        self.children.append(child)
        return child

    def run(self, role: str = "worker", **orders: Any) -> Child:
        """Run a process to its end, which must be a good one."""
        child = self.start(role, **orders)
        status = child.wait()
        assert status == 0, f"{role} ended with {status}:\n{self.describe()}"
        return child

    def end(self) -> None:
        """Kill whoever is left."""
        for child in self.children:
            if not child.ended.is_set():
                child.signal(signal.SIGCONT)
                child.kill()

    # --- what is in it

    def prepare(self, numbers: Iterable[int], *, damaged: bool = False) -> None:
        """Make tables and topics, and publish these numbers."""
        broker_url = f"sqlite:///{self.path}"
        topic = inputs(self.orders["guarantee"], partitions=self.orders.get("partitions", 0))
        with App("faults", broker_url) as app:
            connection = sqlite3.connect(self.store)
            connection.executescript(EFFECTS)
            connection.close()
            broker, _ = app.backends()
            broker.declare([topic])
            messages: list[Message[Any]] = [
                topic.message(n, source="faults", id=str(n)) for n in numbers
            ]
            if damaged:
                messages = [
                    Message(m.topic, m.source, m.id, b"no number", m.time_ms, m.key)
                    if m.id == str(UNREADABLE)
                    else m
                    for m in messages
                ]
            for outcome in broker.publish(messages):
                assert not isinstance(outcome, Exception), outcome

    def journal(self) -> list[list[str]]:
        """The journal's lines, in words."""
        path = self.folder / "journal"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def noted(self, what: str) -> Counter[int]:
        """How often each number was noted so."""
        return Counter(int(words[1]) for words in self.journal() if words[0] == what)

    def state(self) -> State:
        """Everything that counts, read from the database alone."""
        state = State()
        with self.reading() as connection:
            made = "select 1 from sqlite_master where name = 'duly_messages'"
            if connection.execute(made).fetchone() is None:
                return state
            self._read_log(connection, state)
        if self.store.exists():
            with reading(self.store) as connection:
                self._read_effects(connection, state)
        return state

    def _read_log(self, connection: sqlite3.Connection, state: State) -> None:
        of_topic = (
            "select m.position, cast(m.id as text) from duly_messages m"
            " join duly_streams s on s.stream = (m.position >> 40)"
            " join duly_topics t using (topic_no) where t.name = ?"
        )
        positions = dict(connection.execute(of_topic, ("inputs",)).fetchall())
        state.published.update(int(id) for id in positions.values())
        made = connection.execute(of_topic, ("outputs",)).fetchall()
        state.outputs.update(int(id.removeprefix("out-")) for _, id in made)
        for id, why in connection.execute("select cast(id as text), error from duly_dead"):
            state.dead[int(id)] += 1
            state.why_dead[int(id)] = why
        claims = connection.execute("select first, last from duly_claims").fetchall()
        parked = {p for (p,) in connection.execute("select position from duly_parked")}
        cursors = dict(connection.execute(SLOWEST))
        for position, id in positions.items():
            ahead = position & ((1 << 40) - 1) >= cursors.get(position >> 40, 0)
            held = any(first <= position <= last for first, last in claims)
            if ahead or held or position in parked:
                state.unsettled[int(id)] += 1

    def _read_effects(self, connection: sqlite3.Connection, state: State) -> None:
        rows = connection.execute
        if rows("select 1 from sqlite_master where name = 'ledger'").fetchone() is None:
            return
        state.order = [n for (n,) in rows("select n from ledger order by rowid")]
        state.effects.update(n for (n,) in rows("select n from effects"))
        state.ledger.update(state.order)
        if rows("select 1 from sqlite_master where name = 'duly_outbox'").fetchone():
            state.on_their_way.update(
                int(id.removeprefix("out-")) for (id,) in rows("select id from duly_outbox")
            )

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        with reading(self.path) as connection:
            yield connection

    def describe(self) -> str:
        """Everything a person needs to see what happened."""
        logs = "\n".join(f"--- {child.log.name}\n{child.said()}" for child in self.children)
        journal = "\n".join(" ".join(words) for words in self.journal())
        return f"{self.folder}\n{logs}\n--- journal\n{journal}"


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that sees one moment and changes nothing, not even when it is closed."""
    if path.with_name(f"{path.name}-journal").exists():
        # Whoever made the file died within its first write, which has to be undone to be read.
        sqlite3.connect(path).execute("select count(*) from sqlite_master").connection.close()
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)
    try:
        connection.execute("begin")
        yield connection
    finally:
        connection.close()
