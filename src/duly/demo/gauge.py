"""`Gauge`: reads from the shop's database how far the consumers are, and who holds what."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duly.demo.evidence import DATABASE
from duly.demo.shop import app
from duly.sql.sqlite.place import lock_folder

_PROGRESS = """
select u.name, s.next_seq - 1, c.next_seq - 1 - coalesce((
    select sum(f.last - f.first + 1) from duly_claims f
    where f.subscription_no = u.subscription_no
), 0) - (
    select count(*) from duly_parked p where p.subscription_no = u.subscription_no
)
from duly_subscriptions u
    join duly_cursors c on c.subscription_no = u.subscription_no
    join duly_streams s on s.stream = c.stream
"""

_HOLDERS = """
select c.worker, u.name, sum(c.last - c.first + 1)
from duly_claims c join duly_subscriptions u on u.subscription_no = c.subscription_no
where c.token is not null group by c.worker, u.name
"""

_CLAIMED_UNTIL = """
select max(c.last)
from duly_claims c join duly_subscriptions u on u.subscription_no = c.subscription_no
where c.worker = ? and u.name = ? and c.token is not null
"""


@dataclass(frozen=True, slots=True)
class Reach:
    """How far a consumer is: messages in its topic's log, and those of them it is done with."""

    logged: int
    settled: int


@dataclass(frozen=True, slots=True)
class Holder:
    """A worker that holds claims: messages by consumer."""

    worker: str
    held: Mapping[str, int]

    @property
    def pid(self) -> int:
        """Its process, after which a worker is named."""
        return int(self.worker.partition("-")[0])


def is_drained(reach: Mapping[str, Reach]) -> bool:
    """Whether every consumer of the shop has begun and is done with all there is."""
    done = [name for name, each in reach.items() if each.settled == each.logged]
    return len(done) == len(app.consumers)


class Gauge:
    """Looks at the database from outside, without taking part. Used by one thread."""

    def __init__(self, folder: Path) -> None:
        path = folder / DATABASE
        self._turn = lock_folder(path) / "turn.lock"
        self._db = sqlite3.connect(
            f"{path.as_uri()}?mode=rw", uri=True, isolation_level=None, check_same_thread=False
        )
        # Never to checkpoint: in this file that is done by duly, under its writers' turn.
        self._db.execute("pragma wal_autocheckpoint = 0")
        self._db.execute("pragma query_only = on")

    def close(self) -> None:
        """Look no more."""
        self._db.close()

    def reach(self) -> Mapping[str, Reach]:
        """How far each consumer is; one that has not begun is not there."""
        return {name: Reach(logged, settled) for name, logged, settled in self._read(_PROGRESS)}

    def settled(self) -> int:
        """Messages that consumers are done with, all together."""
        return sum(each.settled for each in self.reach().values())

    def is_drained(self) -> bool:
        """Whether every consumer of the shop has begun and is done with all there is."""
        return is_drained(self.reach())

    def holders(self) -> Sequence[Holder]:
        """Every worker with claims; a dead one too, until somebody takes over what it held."""
        found: dict[str, dict[str, int]] = {}
        for worker, consumer, messages in self._read(_HOLDERS):
            found.setdefault(worker, {})[consumer] = messages
        return [Holder(worker, held) for worker, held in found.items()]

    def held_by(self, worker: str) -> Mapping[str, int]:
        """What this worker holds, by consumer."""
        return next((holder.held for holder in self.holders() if holder.worker == worker), {})

    def claimed_until(self, worker: str, consumer: str) -> int | None:
        """The position of the last message that this worker has claimed for the consumer."""
        return self._read(_CLAIMED_UNTIL, (worker, consumer))[0][0]  # type: ignore[no-any-return]

    def id_at(self, position: int) -> str | None:
        """The id of the message at this position."""
        rows = self._read("select id from duly_messages where position = ?", (position,))
        return rows[0][0] if rows else None

    def is_writing(self, pid: int) -> bool | None:
        """Whether this process has the writers' turn: a transaction is open, or about to be.

        None where the system does not tell.
        """
        try:
            inode = self._turn.stat().st_ino
            locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        # 1: FLOCK ADVISORY WRITE pid major:minor:inode start end
        held = [line.split()[1:6] for line in locks if line.split()[1] == "FLOCK"]
        return any(by == str(pid) and of.endswith(f":{inode}") for *_, by, of in held)

    def _read(self, query: str, params: tuple[Any, ...] = ()) -> Sequence[tuple[Any, ...]]:
        return self._db.execute(query, params).fetchall()
