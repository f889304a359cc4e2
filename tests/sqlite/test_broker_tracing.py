"""The life of a message from the file alone, and following a topic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from duly.errors import ConfigurationError
from duly.guarantees import Dead, Done, Release, Retry
from duly.inspection.tracing import Following, Tracing
from tests.sqlite.brokers import (
    KEYED,
    ONCE,
    PLAIN,
    claim,
    drain,
    execute,
    opened,
    options,
    publish,
    receipts,
)


def test_where_it_stands_for_everybody(db_path: Path):
    broker = opened(db_path)
    tracing: Tracing = broker
    publish(broker, PLAIN, ["x"], id="it")
    lanes = {
        name: broker.subscribe([PLAIN], name, options())
        for name in ("claimed", "dead", "done", "free", "new", "parked")
    }
    for name, lane in lanes.items():
        if name == "new":
            continue
        [receipt] = receipts(claim(lane))
        ends: dict[str, Any] = {
            "dead": Dead(receipt, "ValueError: no"),
            "done": Done(receipt),
            "free": Release(receipt),
            "parked": Retry(receipt, 60, "KeyError: x"),
        }
        if name in ends:
            lane.settle([ends[name]])
    [trace] = tracing.trace("it", "shop")
    assert trace.message is not None
    assert (trace.topic, trace.message.body, trace.stored) == ("plain", b"x", None)
    assert [(s.subscription, s.state, s.attempt) for s in trace.standings] == [
        ("claimed", "claimed", 1),
        ("dead", "dead", 1),
        ("done", "done", None),
        ("free", "waiting", 1),
        ("new", "waiting", 1),
        ("parked", "parked", 2),
    ]
    standing = {s.subscription: s for s in trace.standings}
    assert standing["claimed"].worker == broker.file.worker.id
    assert (standing["dead"].error, standing["parked"].error) == ("ValueError: no", "KeyError: x")
    assert [i.kind for i in trace.incidents] == ["dead-letter", "retry"]
    assert tracing.trace("it", "another") == tracing.trace("it", "shop", "once") == []


def test_behind_another_of_its_key(db_path: Path):
    broker = opened(db_path)
    publish(broker, KEYED, ["1"], key="k", id="first")
    publish(broker, KEYED, ["2"], key="k", id="second")
    lane = broker.subscribe([KEYED], "s", options(order_by_key=True))
    first, second = receipts(claim(lane))
    lane.settle([Retry(first, 60, "e"), Release(second)])
    assert claim(lane) == []
    [trace] = broker.trace("second", "shop")
    assert [s.state for s in trace.standings] == ["behind"]


def test_what_the_log_has_forgotten(db_path: Path):
    broker = opened(db_path)
    publish(broker, ONCE, ["x"], id="it")
    publish(broker, PLAIN, ["y"], id="it")
    lane = broker.subscribe([ONCE, PLAIN], "s", options())
    lane.settle([Retry(r, 0, "e") for r in receipts(claim(lane))])
    drain(lane)
    execute(broker, "delete from duly_messages returning 1")
    once, plain = broker.trace("it", "shop")
    assert once.stored is not None  # its identity is remembered
    assert (once.message, plain.message, plain.stored) == (None, None, None)
    assert [i.kind for i in (*once.incidents, *plain.incidents)] == ["retry", "retry"]
    assert [s.state for s in (*once.standings, *plain.standings)] == ["done", "done"]


def test_a_range_that_was_given_out_again_is_part_of_its_life(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, ["a"], id="a")
    publish(broker, PLAIN, ["b"], id="b")
    lane = broker.subscribe([PLAIN], "s", options())
    position = receipts(claim(lane))[0][1]
    broker.file.write(lambda: _note(position))
    [trace] = broker.trace("b", "shop")
    assert [(i.kind, i.count) for i in trace.incidents] == [("redelivery", 2)]


def _note(position: int):
    from duly.sql.steps import Ask

    row = (1, "redelivery", "plain", "s", "shop", "a", position, 2, "w", "attempt 1: it died")
    yield Ask("note", row)


def test_what_was_published_because_of_it(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, ["x"], id="cause")
    [trace] = broker.trace("cause", "shop")
    assert trace.message is not None
    publish(broker, KEYED, ["y"], id="effect", headers=trace.message.causation)
    publish(broker, KEYED, ["z"], id="other", headers={"tenant": "t"})
    [effect] = broker.caused_by("shop/plain/cause", 10)
    assert (effect.message.topic, effect.message.id) == ("keyed", "effect")


def test_following_is_no_subscription(db_path: Path):
    broker = opened(db_path)
    following: Following = broker
    publish(broker, PLAIN, range(3))
    earliest, latest = (following.mark("plain", start) for start in ("earliest", "latest"))
    publish(broker, PLAIN, range(3, 5))
    followed = following.follow("plain", earliest, 2)
    assert [m.message.body for m in followed.messages] == [b"0", b"1"]
    followed = following.follow("plain", followed.mark, 100)
    assert [m.message.body for m in followed.messages] == [b"2", b"3", b"4"]
    assert following.follow("plain", followed.mark, 100).messages == []
    assert [m.message.body for m in following.follow("plain", latest, 9).messages] == [b"3", b"4"]
    assert broker.subscriptions() == []


def test_what_was_gone_before_it_was_looked_at_is_counted(db_path: Path):
    broker = opened(db_path)
    mark = broker.mark("plain", "latest")
    publish(broker, PLAIN, range(5))
    execute(broker, "delete from duly_messages where position & 255 in (1, 3, 5) returning 1")
    followed = broker.follow("plain", mark, 100)
    assert ([m.message.body for m in followed.messages], followed.missed) == ([b"1", b"3"], 3)
    assert broker.follow("plain", followed.mark, 100).missed == 0


def test_all_partitions_are_followed(db_path: Path):
    broker = opened(db_path)
    mark = broker.mark("keyed", "latest")
    for n in range(10):
        publish(broker, KEYED, [n], key=str(n))
    assert len(broker.follow("keyed", mark, 100).messages) == 10
    with pytest.raises(ConfigurationError, match="no topic 'x' here; there are: keyed, once"):
        broker.mark("x", "latest")
