"""Topics that a transaction is the first to publish to."""

from __future__ import annotations

from pathlib import Path

from duly.broker import Published, SubscribeOptions
from duly.brokers.sqlite import SQLiteBroker
from duly.guarantees import Guarantee
from duly.message import Topic
from duly.stores.sqlite import SQLiteStore

numbers: Topic[int] = Topic("numbers", int, guarantee="exactly-once")


def test_a_topic_is_declared_as_part_of_the_transaction(db_path: Path) -> None:
    broker = SQLiteBroker(db_path)
    store = SQLiteStore(db_path, broker_database=broker.capabilities.database)
    message = numbers.message(1, source="shop", id="n-1")

    session = store.begin(None)
    session.declare([numbers])
    assert session.publish([message]) == [Published("n-1")]
    session.rollback()

    session = store.begin(None)
    session.savepoint()
    session.declare([numbers])
    session.publish([message])
    session.rollback_to_savepoint()
    session.declare([numbers])  # what declared it before was undone with the savepoint
    assert session.publish([message]) == [Published("n-1")]
    session.commit()

    session = store.begin(None)
    session.declare([numbers])
    session.publish([numbers.message(2, source="shop", id="n-2")])
    session.commit()

    broker.declare([numbers])
    lane = broker.subscribe([numbers], "all", SubscribeOptions(Guarantee.AT_LEAST_ONCE))
    assert [d.message.id for d in lane.claim(10, 1000, 0)] == ["n-1", "n-2"]
    store.close()
    broker.close()
