"""Admission by claim: broker and store in one file, so that claim and effects are one fact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from duly.broker import Delivery, Published, RepeatDropped, SubscribeOptions, Subscription
from duly.brokers.sqlite import SQLiteBroker
from duly.errors import IdentityConflict, PublishFailed, Superseded, TransactionLost
from duly.guarantees import Admission, Dead, Done, Guarantee, Release, Retry, Settlement
from duly.message import Topic
from duly.store import Scope
from duly.stores.sqlite import SQLiteStore
from tests.sqlite.programs import running
from tests.sqlite.stores import (
    begin_anew,
    effects,
    execute,
    ids,
    lose_the_transaction,
    rows,
    run,
    write,
)

CHECKOUT = Topic("checkout", bytes, guarantee="exactly-once")
RECEIPTS = Topic("receipts", bytes, guarantee="exactly-once")
UNDECLARED = Topic("undeclared", bytes, guarantee="at-least-once")
BILLING = Scope("billing", Admission.BY_CLAIM)


@dataclass
class Shop:
    """A broker and a store that are one file."""

    broker: SQLiteBroker
    store: SQLiteStore
    billing: Subscription

    def publish(self, *ids: str) -> None:
        messages = [CHECKOUT.message(b"order", source="shop", id=id) for id in ids]
        assert all(isinstance(o, Published) for o in self.broker.publish(messages))

    def claim(self, limit: int = 10) -> list[Delivery]:
        return list(self.billing.claim(limit, 1 << 20, 0))


def subscribed(broker: SQLiteBroker, topic: Topic[bytes], name: str) -> Subscription:
    return broker.subscribe([topic], name, SubscribeOptions(Guarantee.EXACTLY_ONCE, lease_s=30))


@pytest.fixture
def shop(db_path: Path) -> Iterator[Shop]:
    broker = SQLiteBroker(db_path)
    store = SQLiteStore(db_path, broker_database=broker.capabilities.database)
    broker.declare([CHECKOUT, RECEIPTS])
    store.declare([CHECKOUT, RECEIPTS])
    execute(db_path, "create table if not exists effects (value)")
    yield Shop(broker, store, subscribed(broker, CHECKOUT, "billing"))
    store.close()
    broker.close()


def test_effects_and_settlement_are_one(shop: Shop):
    shop.publish("a", "b")
    assert run(shop.store, BILLING, shop.claim()) == ["a", "b"]
    assert effects(shop.store.path) == ["a", "b"]
    assert shop.claim() == []


def test_a_rolled_back_transaction_settles_nothing(shop: Shop):
    shop.publish("a")
    claimed = shop.claim()
    session = shop.store.begin(BILLING)
    fresh = session.admit(claimed).fresh
    write(session, "a")
    session.settle([Done(d.receipt) for d in fresh], fresh)
    session.rollback()
    assert effects(shop.store.path) == []
    assert run(shop.store, BILLING, claimed) == ["a"]
    assert shop.claim() == []


def test_a_claim_that_is_over_is_superseded(shop: Shop):
    shop.publish("a", "b")
    claimed = shop.claim()
    shop.billing.settle([Release(claimed[0].receipt)])
    session = shop.store.begin(BILLING)
    with pytest.raises(Superseded, match="1 of 2 messages was lost"):
        session.admit(claimed)
    session.rollback()
    assert effects(shop.store.path) == []


def test_settled_twice_takes_effect_once(shop: Shop):
    shop.publish("a")
    claimed = shop.claim()
    run(shop.store, BILLING, claimed)
    session = shop.store.begin(BILLING)
    with pytest.raises(Superseded):
        session.admit(claimed)
    session.rollback()
    assert effects(shop.store.path) == ["a"]


def test_each_settlement_in_the_transaction(shop: Shop):
    shop.publish("done", "retry", "dead", "release", "kept")
    claimed = shop.claim()
    session = shop.store.begin(BILLING)
    session.admit(claimed)
    done, retry, dead, release, _ = (d.receipt for d in claimed)
    ends: list[Settlement] = [
        Done(done),
        Retry(retry, 0, "again"),
        Dead(dead, "never"),
        Release(release),
    ]
    session.settle(ends, claimed[:4])
    session.commit()
    assert [d.message.id for d in shop.broker.dead_letters()] == ["dead"]
    again = [d for _ in range(5) for d in shop.claim()]
    assert sorted(ids(again)) == ["release", "retry"]
    assert run(shop.store, BILLING, claimed[4:]) == ["kept"]


@pytest.mark.parametrize("anew", [False, True])
def test_effects_without_their_settlement_are_never_committed(shop: Shop, anew: bool):
    shop.publish("a")
    claimed = shop.claim()
    session = shop.store.begin(BILLING)
    session.admit(claimed)
    lose_the_transaction(session)
    if anew:
        begin_anew(session)
    with pytest.raises(TransactionLost):
        session.settle([Done(d.receipt) for d in claimed], claimed)
    with pytest.raises(TransactionLost):
        session.commit()
    session.rollback()
    assert effects(shop.store.path) == []
    assert run(shop.store, BILLING, claimed) == ["a"], "the claim still holds"


def test_what_a_transaction_publishes_comes_with_its_commit(shop: Shop):
    receipts = subscribed(shop.broker, RECEIPTS, "mail")
    session = shop.store.begin(None)
    message = RECEIPTS.message(b"receipt", source="shop", id="r")
    assert session.publish([message]) == [Published("r")]
    assert rows(shop.store.path, "select id from duly_messages") == []
    session.commit()
    assert ids(receipts.claim(1, 1000, 0)) == ["r"]


def test_what_a_rolled_back_transaction_published_never_comes(shop: Shop):
    receipts = subscribed(shop.broker, RECEIPTS, "mail")
    session = shop.store.begin(None)
    session.publish([RECEIPTS.message(b"receipt", source="shop", id="r")])
    session.rollback()
    assert receipts.claim(1, 1000, 0) == []


def test_repeats_and_conflicts_of_what_a_transaction_publishes(shop: Shop):
    shop.publish("a")
    session = shop.store.begin(None)
    outcomes = session.publish(
        [
            CHECKOUT.message(b"order", source="shop", id="a"),
            CHECKOUT.message(b"other", source="shop", id="a"),
            CHECKOUT.message(b"order", source="shop", id="b"),
            UNDECLARED.message(b"x", source="shop", id="u"),
        ]
    )
    session.commit()
    assert outcomes[0] == RepeatDropped("a")
    assert isinstance(outcomes[1], IdentityConflict)
    assert outcomes[2] == Published("b")
    assert isinstance(outcomes[3], PublishFailed)
    assert ids(shop.claim()) == ["a", "b"]


def test_the_broker_of_another_file_is_not_here(shop: Shop, tmp_path: Path):
    store = SQLiteStore(tmp_path / "other.db", broker_database=shop.broker.capabilities.database)
    store.declare([CHECKOUT])
    session = store.begin(None)
    session.publish([CHECKOUT.message(b"order", source="shop", id="a")])
    session.commit()
    assert shop.claim() == []
    store.close()


WORK = """
    import sys
    from duly.broker import SubscribeOptions
    from duly.brokers.sqlite import SQLiteBroker
    from duly.guarantees import Admission, Done, Guarantee
    from duly.message import Topic
    from duly.store import Scope
    from duly.stores.sqlite import SQLiteStore

    topic = Topic("checkout", bytes, guarantee="exactly-once")
    broker = SQLiteBroker(sys.argv[1])
    store = SQLiteStore(sys.argv[1], broker_database=broker.capabilities.database)
    broker.declare([topic])
    options = SubscribeOptions(Guarantee.EXACTLY_ONCE, lease_s=30)
    lane = broker.subscribe([topic], "billing", options)
    claimed = lane.claim(10, 1000, 10)
    session = store.begin(Scope("billing", Admission.BY_CLAIM))
    session.admit(claimed)
    session.connection.execute("insert into effects values ('killed')")
    if sys.argv[2] == "after settling":
        session.settle([Done(d.receipt) for d in claimed], claimed)
    if sys.argv[2] == "after the commit":
        session.settle([Done(d.receipt) for d in claimed], claimed)
        session.commit()
    print("here")
    sys.stdin.readline()
"""


@pytest.mark.parametrize("moment", ["in the handler", "after settling", "after the commit"])
def test_a_worker_killed_at_any_moment_leaves_all_or_nothing(shop: Shop, moment: str):
    shop.publish("a")
    with running(WORK, shop.store.path, moment) as worker:
        worker.expect("here")
        worker.kill()
    claimed = list(shop.billing.claim(10, 1 << 20, 20 if moment != "after the commit" else 0))
    if moment == "after the commit":
        assert claimed == []
        assert effects(shop.store.path) == ["killed"]
    else:
        assert run(shop.store, BILLING, claimed) == ["a"]
        assert effects(shop.store.path) == ["a"]
