"""What a finished run left behind, brought into one place where SQL can compare it.

Read from the resources themselves, and from no worker: the shop's database (effects, log,
dead letters, incidents), the files that stand for the world outside it, and the publisher's
book. Nothing here changes any of them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from duly.demo.book import BOOK
from duly.demo.journal import read_journal

DATABASE = "shop.db"
READINGS = "readings.log"
NOTICES = "notices.log"

_TABLES = """
create temp table logged (topic text, position integer, id text);
create temp table receipts (position integer, order_id text, cents integer);
create temp table recorded (line integer primary key, id text);
create temp table notified (line integer primary key, id text);
"""

_INDEXES = """
create index temp.logged_id on logged (topic, id);
create index temp.logged_position on logged (topic, position);
create index temp.receipts_order on receipts (order_id);
create index temp.recorded_id on recorded (id);
create index temp.notified_id on notified (id);
"""

# What has to be handled: certainly published, or published with unknown outcome and in the log.
_VIEWS = """
create temp view {topic}_due as
select b.* from book.{topic} b where b.outcome = 'ok' or (
    b.outcome <> 'fail'
    and exists (select 1 from logged l where l.topic = '{topic}' and l.id = b.id)
)
"""

_DEAD = """
create temp view dead as
select s.name as consumer, d.id
from shop.duly_dead d join shop.duly_subscriptions s on s.subscription_no = d.subscription_no
"""

# How often a death gave a message out again, by (consumer, message): only deaths that the killer
# brought about explain anything.
_REDELIVERED = """
create temp view redelivered as
select i.subscription as consumer, l.id, count(*) as times
from shop.duly_incidents i join logged l
    on l.topic = i.topic and l.position between i.position and i.position + i.count - 1
where i.kind = 'redelivery' and i.worker in (select worker from book.kills)
group by 1, 2
"""

# A stream's positions lie together: (stream << 40) | sequence number.
_LOG = """
select t.name, m.position, m.id, case when t.name = 'receipts' then m.body end
from shop.duly_topics t
    join shop.duly_streams s on s.topic_no = t.topic_no
    join shop.duly_messages m on m.position between (s.stream << 40) and ((s.stream + 1) << 40) - 1
order by m.position
"""


class _Receipt(msgspec.Struct):
    order: str
    cents: int


@contextmanager
def open_evidence(folder: Path) -> Iterator[sqlite3.Connection]:
    """A connection that sees all of it: ``shop``, ``book``, and temporary tables.

    - ``logged``: every message in the log: topic, position, id
    - ``receipts``: every receipt in the log: position, order_id, cents
    - ``recorded``, ``notified``: every line the two handlers outside the database wrote: id
    - ``sensors_due``, ``rides_due``, ``checkout_due``: what was published, from the book
    - ``dead``: dead letters: consumer, id
    - ``redelivered``: messages given out again after a kill: consumer, id, times
    """
    with closing(sqlite3.connect(":memory:", uri=True, isolation_level=None)) as db:
        for name, file in (("shop", DATABASE), ("book", BOOK)):
            db.execute(f"attach ? as {name}", (f"{(folder / file).absolute().as_uri()}?mode=rw",))
        db.execute("pragma temp_store = memory")
        db.executescript(_TABLES)
        db.execute("begin")
        _read_log(db)
        for table, file in (("recorded", READINGS), ("notified", NOTICES)):
            lines = [(line,) for line in read_journal(folder / file)]
            db.executemany(f"insert into {table} (id) values (?)", lines)  # noqa: S608
        db.execute("commit")
        db.executescript(_INDEXES)
        for topic in ("sensors", "rides", "checkout"):
            db.execute(_VIEWS.format(topic=topic))
        db.execute(_DEAD)
        db.execute(_REDELIVERED)
        yield db


def _read_log(db: sqlite3.Connection) -> None:
    decode = msgspec.json.Decoder(_Receipt).decode
    rows = db.execute(_LOG).fetchall()
    db.executemany("insert into logged values (?, ?, ?)", [row[:3] for row in rows])
    receipts = [(position, decode(body)) for topic, position, _, body in rows if body is not None]
    db.executemany(
        "insert into receipts values (?, ?, ?)", [(p, r.order, r.cents) for p, r in receipts]
    )
