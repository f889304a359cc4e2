"""The next claim, made in the transaction that settles the last one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from duly.brokers.sqlite import SQLiteBroker
from duly.guarantees import Admission, Done, Retry
from duly.store import Scope
from duly.stores.sqlite import SQLiteStore
from tests.sqlite.brokers import (
    BIG,
    KEYED,
    PLAIN,
    Hands,
    bodies,
    claim,
    done,
    opened,
    options,
    publish,
)

BILLING = Scope("s", Admission.BY_CLAIM)


@pytest.fixture
def broker(db_path: Path) -> Iterator[SQLiteBroker]:
    broker = opened(db_path, hands=Hands())
    yield broker
    broker.close()


def lane_of(broker: SQLiteBroker, **given: Any) -> Any:
    return broker.subscribe([PLAIN], "s", options(**given))


def test_settling_and_claiming_are_one_commit(broker: SQLiteBroker):
    publish(broker, PLAIN, range(6))
    lane = lane_of(broker)
    first = claim(lane, 2)
    commits = broker.file.stats.commits
    ahead = lane.ahead(2, BIG)
    assert lane.settle_and_claim(done(first), ahead) == []
    assert broker.file.stats.commits == commits + 1
    second = ahead.deliveries()
    assert bodies(second) == ["2", "3"]
    assert bodies(claim(lane, 10)) == ["4", "5"]
    assert lane.settle(done(second)) == []


def test_nothing_is_claimed_ahead_of_what_a_claim_has_emptied(broker: SQLiteBroker):
    publish(broker, PLAIN, range(3))
    lane = lane_of(broker)
    assert lane.ahead(2, BIG) is None
    claim(lane, 2)
    assert lane.ahead(2, BIG) is not None
    claim(lane, 2)
    assert lane.ahead(2, BIG) is None


def test_now_and_then_a_claim_of_its_own_looks_after_the_dead(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(6))
    lane = lane_of(broker)
    claim(lane, 2)
    assert lane.ahead(2, BIG) is not None
    publish(broker, PLAIN, ["another commit"])
    hands.advance(1)
    assert lane.ahead(2, BIG) is None
    broker.close()


def test_a_claim_that_comes_to_nothing_leaves_nothing(broker: SQLiteBroker):
    publish(broker, PLAIN, range(2))
    lane = lane_of(broker)
    ahead_of = claim(lane, 2)
    ahead = lane.ahead(2, BIG)
    assert lane.settle_and_claim(done(ahead_of), ahead) == []
    assert list(ahead.deliveries()) == []
    publish(broker, PLAIN, ["new"])
    assert bodies(claim(lane)) == ["new"]


def test_what_a_stale_settlement_claims_is_claimed_nevertheless(broker: SQLiteBroker):
    publish(broker, PLAIN, range(4))
    lane = lane_of(broker)
    first = claim(lane, 2)
    lane.settle(done(first[:1]))
    ahead = lane.ahead(2, BIG)
    assert lane.settle_and_claim(done(first), ahead) == [first[0].receipt]
    assert bodies(ahead.deliveries()) == ["2", "3"]


def test_closing_gives_back_what_was_claimed_ahead(broker: SQLiteBroker):
    publish(broker, PLAIN, range(4))
    lane = lane_of(broker)
    first = claim(lane, 2)
    ahead = lane.ahead(2, BIG)
    lane.settle_and_claim(done(first), ahead)
    lane.close()
    again = claim(lane_of(broker))
    assert bodies(again) == ["2", "3"]
    assert [d.attempt for d in again] == [1, 1]


def test_a_closed_lane_settles_and_claims_no_more(broker: SQLiteBroker):
    publish(broker, PLAIN, range(4))
    lane = lane_of(broker)
    first = claim(lane, 2)
    ahead = lane.ahead(2, BIG)
    lane.close()
    assert lane.settle_and_claim(done(first), ahead) == [d.receipt for d in first]
    assert list(ahead.deliveries()) == []
    another = lane_of(broker)
    assert sorted(bodies([*claim(another), *claim(another)])) == ["0", "1", "2", "3"]


def test_in_order_by_key_a_retry_is_not_overtaken_by_what_is_claimed_with_it(broker: SQLiteBroker):
    lane: Any = broker.subscribe([KEYED], "s", options(order_by_key=True))
    publish(broker, KEYED, range(4), key="k")
    first = claim(lane, 2)
    ahead = lane.ahead(2, BIG)
    ends = [Done(first[0].receipt), Retry(first[1].receipt, 5.0, "not yet")]
    assert lane.settle_and_claim(ends, ahead) == []
    assert list(ahead.deliveries()) == []
    assert bodies(claim(lane)) == []


class TestInATransaction:
    @pytest.fixture
    def store(self, broker: SQLiteBroker) -> Iterator[SQLiteStore]:
        store = SQLiteStore(broker.file.path, broker_database=broker.capabilities.database)
        yield store
        store.close()

    def test_it_stands_with_the_transaction(self, broker: SQLiteBroker, store: SQLiteStore):
        publish(broker, PLAIN, range(4))
        lane = lane_of(broker)
        first = claim(lane, 2)
        session = store.begin(BILLING)
        session.admit(first)
        session.settle(done(first), first)
        ahead = lane.ahead(2, BIG)
        session.claim(ahead)
        session.commit()
        assert bodies(ahead.deliveries()) == ["2", "3"]
        assert bodies(claim(lane)) == []

    def test_it_is_rolled_back_with_it(self, broker: SQLiteBroker, store: SQLiteStore):
        publish(broker, PLAIN, range(4))
        lane = lane_of(broker)
        first = claim(lane, 2)
        session = store.begin(BILLING)
        session.admit(first)
        session.settle(done(first), first)
        session.claim(lane.ahead(2, BIG))
        session.rollback()
        assert bodies(claim(lane)) == ["2", "3"]
        assert lane.settle(done(first)) == []
