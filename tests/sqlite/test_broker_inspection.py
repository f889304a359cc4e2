"""Looking inside: from the file alone, also after the process that met it is gone."""

from __future__ import annotations

from pathlib import Path

from duly.guarantees import Dead, Done, Release, Retry
from duly.inspection import KINDS, Inspection, SubscriptionState
from tests.sqlite.brokers import (
    ONCE,
    PLAIN,
    claim,
    drain,
    messages,
    opened,
    options,
    publish,
    receipts,
)


def test_the_state_of_each_topic_of_a_subscription(db_path: Path):
    broker = opened(db_path)
    look: Inspection = broker
    publish(broker, PLAIN, range(10))
    publish(broker, ONCE, range(3))
    lane = broker.subscribe([PLAIN, ONCE], "s", options())
    broker.subscribe([PLAIN], "other", options())
    both = broker.subscribe([PLAIN], "plain-only", options())
    got = receipts(claim(both, 6))
    both.settle([Done(got[0]), Retry(got[1], 60, "e"), Dead(got[2], "e"), Release(got[3])])
    assert look.subscriptions() == [
        SubscriptionState("other", "plain", backlog=10, in_flight=0, parked=0, dead=0),
        SubscriptionState("plain-only", "plain", backlog=5, in_flight=2, parked=1, dead=1),
        SubscriptionState("s", "once", backlog=3, in_flight=0, parked=0, dead=0),
        SubscriptionState("s", "plain", backlog=10, in_flight=0, parked=0, dead=0),
    ]
    drain(lane)
    assert [state.is_drained for state in look.subscriptions()] == [False, False, True, True]


def test_dead_letters_newest_first_and_of_one_subscription(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(3))
    for name in ("a", "b"):
        lane = broker.subscribe([PLAIN], name, options())
        lane.settle([Dead(r, f"by {name}") for r in receipts(claim(lane))])
    broker.close()
    broker = opened(db_path)
    assert [d.message.body for d in broker.dead_letters("b", limit=2)] == [b"2", b"1"]
    assert [d.error for d in broker.dead_letters()] == ["by b"] * 3 + ["by a"] * 3


def test_incidents_say_what_whose_and_why(db_path: Path):
    broker = opened(db_path)
    [message] = messages(PLAIN, ["x"], id="the-id")
    broker.publish([message])
    lane = broker.subscribe([PLAIN], "s", options())
    lane.settle([Retry(r, 0, "ValueError: boo") for r in receipts(claim(lane))])
    lane.settle([Dead(r, "ValueError: again") for r in receipts(claim(lane))])
    dead, retry = broker.incidents("s")
    assert (retry.kind, retry.topic, retry.source, retry.id) == ("retry", "plain", "shop", "the-id")
    assert "boo" in retry.detail
    assert "attempt 1" in retry.detail
    assert (dead.kind, "attempt 2" in dead.detail) == ("dead-letter", True)
    assert broker.incidents("s", kind="retry") == [retry]
    assert broker.incidents("nobody") == []
    assert broker.incidents(limit=1) == [dead]
    assert {dead.kind, retry.kind} <= KINDS.keys()


def test_drops_are_visible(db_path: Path):
    broker = opened(db_path)
    broker.record_drops("plain", 17)
    broker.record_drops("plain", 3)
    broker.close()
    broker = opened(db_path)
    assert broker.incident_counts() == {("plain", "dropped"): 20}
    assert [i.count for i in broker.incidents(kind="dropped")] == [3, 17]
