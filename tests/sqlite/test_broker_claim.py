"""Claiming: how much, from where, who waits and who wakes."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from duly.broker import Delivery
from duly.errors import BrokerUnavailable, ConfigurationError
from duly.guarantees import Done, Guarantee, Release, Retry
from duly.message import Topic
from duly.sql import log
from tests.sqlite.brokers import (
    KEYED,
    ONCE,
    PLAIN,
    Hands,
    bodies,
    claim,
    done,
    drain,
    execute,
    leftovers,
    messages,
    opened,
    options,
    publish,
    receipts,
)
from tests.waiting import eventually


def test_up_to_the_limit(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(5))
    lane = broker.subscribe([PLAIN], "s", options())
    assert bodies(claim(lane, 2)) == ["0", "1"]
    assert bodies(claim(lane, 2)) == ["2", "3"]
    assert bodies(claim(lane, 2)) == ["4"]
    assert claim(lane, 2) == []


def test_up_to_the_bytes_and_at_least_one(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, ["aaaa", "bbb", "c" * 50, "dd", "e"])
    lane = broker.subscribe([PLAIN], "s", options())
    taken = [bodies(claim(lane, 10, 7)) for _ in range(3)]
    assert taken == [["aaaa", "bbb"], ["c" * 50], ["dd", "e"]]
    assert lane.settle([]) == []


def test_bytes_bound_what_comes_back_as_well(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, ["aaaa", "bbb", "c" * 50, "dd"])
    lane = broker.subscribe([PLAIN], "s", options())
    lane.settle([Release(r) for r in receipts(claim(lane))])
    assert [bodies(claim(lane, 10, 7)) for _ in range(3)] == [["aaaa", "bbb"], ["c" * 50], ["dd"]]
    lane.close()
    lane = broker.subscribe([PLAIN], "s", options())
    lane.settle([Retry(r, 0, "again") for r in receipts(claim(lane))])
    assert [bodies(claim(lane, 10, 7)) for _ in range(3)] == [["aaaa", "bbb"], ["c" * 50], ["dd"]]


def test_every_subscription_sees_every_message(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(3))
    assert drain(broker.subscribe([PLAIN], "a", options())) == ["0", "1", "2"]
    assert drain(broker.subscribe([PLAIN], "b", options())) == ["0", "1", "2"]


def test_lanes_of_one_subscription_share(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(6))
    one, two = (broker.subscribe([PLAIN], "s", options()) for _ in range(2))
    got = [bodies(claim(lane, 2)) for lane in (one, two, one)]
    assert got == [["0", "1"], ["2", "3"], ["4", "5"]]


def test_several_topics_feed_one_subscription(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, ["p"])
    publish(broker, ONCE, ["o"])
    lane = broker.subscribe([PLAIN, ONCE], "s", options())
    got = claim(lane)
    assert sorted((d.message.topic, d.message.body) for d in got) == [
        ("once", b"o"),
        ("plain", b"p"),
    ]
    assert lane.settle(done(got)) == []
    assert leftovers(broker) == {"duly_claims": 0, "duly_parked": 0}


def test_a_busy_topic_does_not_starve_another(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(100))
    publish(broker, ONCE, ["once"])
    lane = broker.subscribe([PLAIN, ONCE], "s", options())
    taken = [bodies(claim(lane, 5)) for _ in range(2)]
    assert ["once" in some for some in taken].count(True) == 1


def test_a_lane_sees_only_the_topics_it_asks_for(db_path: Path):
    """Another version of the application had, or still has, more topics under this name."""
    broker = opened(db_path)
    publish(broker, ONCE, range(4))
    both = broker.subscribe([PLAIN, ONCE], "s", options())
    got = receipts(claim(both))
    both.settle([Retry(got[0], 0, "boo"), Release(got[1])])
    lane = broker.subscribe([PLAIN], "s", options())
    assert claim(lane) == []
    publish(broker, PLAIN, ["p"])
    assert bodies(claim(lane)) == ["p"]
    assert claim(lane) == []
    both.settle([Done(r) for r in got[2:]])
    assert sorted(drain(both)) == ["0", "1"]


def test_a_topic_that_joins_later_has_its_own_start(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, ["p"])
    publish(broker, ONCE, ["o"])
    assert drain(broker.subscribe([PLAIN], "s", options())) == ["p"]
    assert drain(broker.subscribe([PLAIN, ONCE], "s", options())) == ["o"]


# --- where a subscription starts ------------------------------------------------------------------


def test_earliest_sees_what_is_kept_and_latest_only_what_comes(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, ["old"])
    early = broker.subscribe([PLAIN], "early", options(start="earliest"))
    late = broker.subscribe([PLAIN], "late", options(start="latest"))
    publish(broker, PLAIN, ["new"])
    assert drain(early) == ["old", "new"]
    assert drain(late) == ["new"]


def test_a_time_sees_what_was_made_since(db_path: Path):
    broker = opened(db_path)
    for second in range(5):
        publish(broker, PLAIN, [second], time_ms=1_700_000_000_000 + second * 1000)
    since = datetime.fromtimestamp(1_700_000_003, UTC)
    assert drain(broker.subscribe([PLAIN], "s", options(start=since))) == ["3", "4"]
    never = datetime(2099, 1, 1, tzinfo=UTC)
    assert drain(broker.subscribe([PLAIN], "t", options(start=never))) == []


def test_the_start_matters_once(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, ["old"])
    broker.subscribe([PLAIN], "s", options(start="latest"))
    publish(broker, PLAIN, ["new"])
    assert drain(broker.subscribe([PLAIN], "s", options(start="earliest"))) == ["new"]


def test_another_guarantee_is_refused_and_names_both(db_path: Path):
    broker = opened(db_path)
    broker.subscribe([PLAIN], "s", options())
    broker.close()
    with pytest.raises(ConfigurationError, match=r"at-least-once.*exactly-once"):
        opened(db_path).subscribe([PLAIN], "s", options(guarantee=Guarantee.EXACTLY_ONCE))


def test_an_undeclared_topic_is_refused(db_path: Path):
    broker = opened(db_path, PLAIN)
    with pytest.raises(ConfigurationError, match="once"):
        broker.subscribe([ONCE], "s", options())


def test_order_by_key_of_a_topic_without_order_is_refused(db_path: Path):
    broker = opened(db_path)
    with pytest.raises(ConfigurationError, match="partitions"):
        broker.subscribe([PLAIN], "s", options(order_by_key=True))


# --- due times ------------------------------------------------------------------------------------


def test_a_delayed_message_comes_when_it_is_due(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, ["late"], due_ms=hands.wall + 5_000)
    publish(broker, PLAIN, ["now"])
    lane = broker.subscribe([PLAIN], "s", options())
    assert drain(lane) == ["now"]
    hands.advance(4.9)
    assert drain(lane) == []
    hands.advance(0.2)
    [late] = claim(lane)
    assert (late.message.body, late.attempt, late.repeated) == (b"late", 1, False)
    assert lane.settle(done([late])) == []


def test_a_range_of_delayed_messages_does_not_hide_what_follows(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(100), due_ms=hands.wall + 5_000)
    publish(broker, PLAIN, ["now"])
    lane = broker.subscribe([PLAIN], "s", options())
    assert bodies(claim(lane, 3)) == ["now"]


def test_each_subscription_waits_for_itself(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, ["x"], due_ms=hands.wall + 1_000)
    one = broker.subscribe([PLAIN], "one", options())
    assert drain(one) == []
    hands.advance(2)
    two = broker.subscribe([PLAIN], "two", options())
    assert (drain(one), drain(two)) == (["x"], ["x"])


def test_parked_free_and_fresh_messages_all_get_their_turn(db_path: Path):
    broker = opened(db_path)
    lane = broker.subscribe([PLAIN], "s", options())
    publish(broker, PLAIN, [f"retried-{i}" for i in range(20)])
    lane.settle([Retry(r, 0, "again") for r in receipts(claim(lane))])
    publish(broker, PLAIN, [f"released-{i}" for i in range(20)])
    claim(lane, 20)
    released = claim(lane, 20)
    lane.settle([Release(r) for r in receipts(released)])
    publish(broker, PLAIN, [f"fresh-{i}" for i in range(200)])
    first = [bodies(claim(lane, 2))[0].split("-")[0] for _ in range(3)]
    assert len(set(first)) >= 2
    assert "fresh" in first


# --- waiting --------------------------------------------------------------------------------------


class Waiting:
    """A claim that waits in a thread."""

    def __init__(self, lane: Any, wait_s: float = 30.0) -> None:
        self.got: list[Delivery] | None = None
        self.took_s = 0.0

        def run() -> None:
            began = time.monotonic()
            self.got = list(lane.claim(10, 1 << 20, wait_s))
            self.took_s = time.monotonic() - began

        self.thread = threading.Thread(target=run)
        self.thread.start()
        eventually(lambda: lane._file._changes._waiting or self.got is not None, "it waits")

    def result(self) -> list[Delivery]:
        self.thread.join(timeout=30)
        assert self.got is not None
        return self.got


def test_a_waiting_claim_wakes_on_publish(db_path: Path):
    broker = opened(db_path)
    waiting = Waiting(broker.subscribe([PLAIN], "s", options()))
    publish(broker, PLAIN, ["x"])
    assert bodies(waiting.result()) == ["x"]
    assert waiting.took_s < 10


def test_a_waiting_claim_wakes_for_a_retry_that_comes_due(db_path: Path):
    broker = opened(db_path)
    lane = broker.subscribe([PLAIN], "s", options())
    publish(broker, PLAIN, ["x"])
    claimed = receipts(claim(lane))
    began = time.monotonic()
    lane.settle([Retry(r, 0.3, "again") for r in claimed])
    assert bodies(Waiting(lane).result()) == ["x"]
    assert 0.25 < time.monotonic() - began < 10


def test_a_claim_made_and_lost_while_others_wait_is_noticed(db_path: Path):
    broker = opened(db_path)
    lane = broker.subscribe([PLAIN], "s", options())
    waiting = Waiting(lane)

    def publish_claim_and_die() -> Any:
        gone = replace(lane._lanes[0], worker="who is dead")
        yield from log.publish(broker._topics, messages(PLAIN, ["x"]), 1)
        yield from log.claim([gone], 10, 1 << 30, 1, 1, 1 << 60, token=7)

    broker.file.write(publish_claim_and_die)
    [x] = waiting.result()
    assert (x.message.body, x.alone) == (b"x", True)
    assert waiting.took_s < 10


def test_a_waiting_claim_ends_on_close(db_path: Path):
    broker = opened(db_path)
    lane = broker.subscribe([PLAIN], "s", options())
    waiting = Waiting(lane)
    lane.close()
    assert waiting.result() == []
    assert waiting.took_s < 10
    assert claim(lane) == []


def test_a_waiting_claim_ends_in_time(db_path: Path):
    broker = opened(db_path)
    began = time.monotonic()
    assert broker.subscribe([PLAIN], "s", options()).claim(10, 1 << 20, 0.2) == []
    assert 0.15 < time.monotonic() - began < 10


def test_an_idle_lane_writes_nothing(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    lane = broker.subscribe([PLAIN], "s", options())
    claim(lane)
    commits = broker.file.stats.commits
    for _ in range(50):
        assert claim(lane) == []
    assert broker.file.stats.commits == commits


def test_closing_gives_back_uncharged(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(4))
    lane = broker.subscribe([PLAIN], "s", options())
    got = claim(lane)
    lane.settle([Done(got[1].receipt)])
    lane.close()
    [again] = [claim(broker.subscribe([PLAIN], "s", options()))]
    assert bodies(again) == ["0", "2", "3"]
    assert {(d.attempt, d.repeated, d.alone) for d in again} == {(1, True, False)}


def test_a_lane_that_cannot_give_back_keeps_nothing_open(
    db_path: Path, monkeypatch: pytest.MonkeyPatch
):
    broker = opened(db_path)
    lanes = [broker.subscribe([PLAIN], name, options()) for name in ("a", "b")]

    def locked(*_: object, **__: object) -> None:
        raise BrokerUnavailable("locked")

    monkeypatch.setattr(broker.file, "write", locked)
    lanes[0].close()
    broker.close()
    assert [claim(lane) for lane in lanes] == [[], []]
    assert broker.file._users == 0


def test_a_sweep_that_fails_costs_nobody_a_claim(db_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Held by nobody until its lease ends, a claim of one message would be charged to it."""
    broker = opened(db_path)
    publish(broker, PLAIN, range(2))
    lane = broker.subscribe([PLAIN], "s", options())
    write = broker.file.write

    def cannot_sweep(make_steps: Any, **options: Any) -> Any:
        if broker._sweeper._mutex.locked():
            raise BrokerUnavailable("disk full")
        return write(make_steps, **options)

    monkeypatch.setattr(broker.file, "write", cannot_sweep)
    monkeypatch.setattr("duly.brokers.sqlite.sweeper._CLAIMED", 1)
    assert bodies(claim(lane)) == ["0", "1"]
    assert claim(lane) == []


def test_closing_one_lane_leaves_the_others_claims(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(4))
    one, two = (broker.subscribe([PLAIN], "s", options()) for _ in range(2))
    claim(one, 2)
    mine = claim(two, 2)
    one.close()
    assert two.settle(done(mine)) == []
    assert drain(two) == ["0", "1"]


def test_claims_of_a_thousand_messages_write_a_handful_of_rows(db_path: Path):
    broker = opened(db_path)
    lane = broker.subscribe([PLAIN], "s", options())
    publish(broker, PLAIN, range(1000))
    got = claim(lane)
    assert execute(broker, "select count(*) from duly_claims") == [(1,)]
    lane.settle(done(got[:500]))
    assert execute(broker, "select first & 0xffff, last & 0xffff from duly_claims") == [(501, 1000)]
    lane.settle(done(got[500:]))
    assert leftovers(broker) == {"duly_claims": 0, "duly_parked": 0}


def test_topics_of_many_partitions_fill_a_batch(db_path: Path):
    wide = Topic("wide", bytes, guarantee="at-least-once", partitions=16)
    broker = opened(db_path, wide, KEYED)
    for i in range(64):
        publish(broker, wide, [i], key=f"k{i}")
    for flag in (False, True):
        lane = broker.subscribe([wide], f"s{flag}", options(order_by_key=flag))
        assert len(claim(lane, 64)) == 64


@pytest.mark.parametrize("retried", ["one", "two"])
def test_retries_are_not_starved_by_the_backlog_of_two_topics(db_path: Path, retried: str):
    one, two = (Topic(name, bytes, guarantee="at-least-once") for name in ("one", "two"))
    topics = {"one": one, "two": two}
    broker = opened(db_path, one, two)
    lane = broker.subscribe([one, two], "s", options())
    publish(broker, topics[retried], ["again"])
    [failed] = claim(lane)
    lane.settle([Retry(failed.receipt, 0.0, "once more")])
    for topic in (one, two):
        publish(broker, topic, range(50))
    seen: list[str] = []
    while "again" not in seen:
        got = claim(lane, 1)
        seen += bodies(got)
        lane.settle(done(got))
    assert len(seen) <= 8


def test_no_partition_of_two_topics_is_starved(db_path: Path):
    one, two = (
        Topic(name, bytes, guarantee="at-least-once", partitions=2) for name in ("one", "two")
    )
    broker = opened(db_path, one, two)
    lane = broker.subscribe([one, two], "s", options(order_by_key=True))
    for topic in (one, two):
        for n in range(120):
            publish(broker, topic, [f"{topic.name} {n % 8}"], key=f"k{n % 8}")
    seen = set()
    for _ in range(24):
        got = claim(lane, 1)
        seen |= {d.receipt[1] >> 40 for d in got}
        lane.settle(done(got))
    assert len(seen) == 4


@pytest.mark.parametrize("retention_s", [0.0, 3600.0])
def test_at_most_once_the_id_of_what_is_settled_is_known(db_path: Path, retention_s: float):
    broker = opened(db_path, hands=Hands())
    topic = Topic("readings", bytes, guarantee="at-most-once", retention_s=retention_s)
    broker.declare([topic])
    publish(broker, topic, range(3))
    lane: Any = broker.subscribe(
        [topic], "s", options(guarantee=Guarantee.AT_MOST_ONCE, bodies_only=True)
    )
    claimed: Any = claim(lane)
    assert lane.settle([Done(claimed.receipt, 3)]) == []  # as one span: no id was looked at
    if not retention_s:
        execute(broker, "delete from duly_messages")  # as retention does, sooner or later
    ids = [delivery.message_id for delivery in claimed]
    assert len(set(ids)) == 3
    assert "(gone)" not in ids
    broker.close()
