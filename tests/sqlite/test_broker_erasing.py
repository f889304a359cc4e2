"""A person's messages removed: from everywhere, from the very bytes, and safely beside workers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import duly
from duly.brokers.sqlite import SQLiteBroker
from duly.guarantees import Dead, Done, Release, Retry
from duly.inspection.erasing import Erasing, Whose
from duly.message import Topic
from duly.worker import Worker
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

ANN = Whose(key="ann")
SECRET = b"ann lives in the yellow house"


def erase(broker: Erasing, whose: Whose = ANN) -> int:
    return sum(broker.erase(whose))


def on_disk(path: Path) -> bytes:
    beside = [path, path.with_name(path.name + "-wal")]
    return b"".join(each.read_bytes() for each in beside if each.exists())


def test_who_is_killed_in_the_middle_leaves_no_trace_of_what_is_gone(db_path: Path):
    """What failed after the first look goes with the message: later a key finds nothing."""
    broker = opened(db_path)
    lane = broker.subscribe([KEYED], "s", options())
    for n in range(101):
        publish(broker, KEYED, [SECRET], key="ann", id=f"ann-{n}")
    killed = broker.erase(ANN)
    assert next(killed) == 100
    [last] = receipts(claim(lane, 101))
    lane.settle([Retry(last, 60, f"no {SECRET!r}")])
    assert next(killed) == 1
    del killed
    assert broker.holdings(ANN) == 0
    assert [(i.id, i.detail) for i in broker.incidents() if i.kind == "retry"] == [(None, "erased")]


def test_from_log_dead_letters_parked_and_incidents_and_from_the_bytes(db_path: Path):
    broker = opened(db_path)
    for _ in range(4):
        publish(broker, KEYED, [SECRET], key="ann", id="ann-1")
    publish(broker, KEYED, ["other"], key="bob", id="bob-1")
    lane = broker.subscribe([KEYED], "s", options())
    first, second, *_ = receipts(claim(lane, 2))
    lane.settle([Dead(first, f"KeyError: {SECRET!r}"), Retry(second, 60, f"no {SECRET!r}")])
    assert broker.holdings(ANN) == 5
    assert erase(broker) == 5
    assert erase(broker) == broker.holdings(ANN) == 0
    assert SECRET not in on_disk(db_path)
    assert b"ann-1" not in on_disk(db_path)
    assert broker.dead_letters() == []
    assert {i.kind: (i.id, i.detail) for i in broker.incidents()} == {
        "erased": (None, "removed by a person"),
        "retry": (None, "erased"),
        "dead-letter": (None, "erased"),
    }
    assert drain(lane) == ["other"]
    assert leftovers(broker) == {"duly_claims": 0, "duly_parked": 0}


def test_a_repeat_of_what_was_erased_is_dropped_and_its_id_is_no_more(db_path: Path):
    hands = Hands()
    once = Topic("once", bytes, guarantee="exactly-once", identity_retention_s=60)
    broker = opened(db_path, once, hands=hands)
    publish(broker, once, ["x"], id="ann@example.org")
    publish(broker, once, ["y"], id="bob")
    whose = Whose(id="ann@example.org", source="shop")
    assert broker.holdings(whose) == 1
    assert erase(broker, whose) == 1
    assert b"ann@example.org" not in on_disk(db_path)
    [again] = broker.publish(messages(once, ["x"], id="ann@example.org"))
    assert again == duly.RepeatDropped("ann@example.org")
    mixed = [*messages(once, ["z"], id="new"), *messages(once, ["x"], id="ann@example.org")]
    assert [type(outcome).__name__ for outcome in broker.publish(mixed)] == [
        "Published",
        "RepeatDropped",
    ]
    assert broker.publish(messages(once, ["y"], id="bob")) == [duly.RepeatDropped("bob")]
    lane = broker.subscribe([once], "s", options())
    assert drain(lane) == ["y", "z"]
    for _ in range(4):  # a round of identities is swept once a minute
        hands.advance(120)
        broker._sweeper._sweep()
    assert execute(broker, "select count(*) from duly_erased") == [(0,)]


def test_an_identity_whose_message_is_long_done(db_path: Path):
    broker = opened(db_path)
    publish(broker, ONCE, ["x"], id="ann")
    drain(broker.subscribe([ONCE], "s", options()))
    execute(broker, "delete from duly_messages returning 1")
    assert erase(broker, Whose(id="ann", source="shop")) == 1
    assert broker.publish(messages(ONCE, ["x"], id="ann")) == [duly.RepeatDropped("ann")]
    assert erase(broker, Whose(id="ann", source="shop")) == 0


@pytest.mark.parametrize("span", [False, True])
@pytest.mark.parametrize("end", ["done", "retry", "dead", "release", "close"])
def test_in_the_middle_of_a_claim(db_path: Path, span: bool, end: str):
    """Who has it may still settle it; the others of its claim come to their own ends."""
    broker = opened(db_path)
    for n in range(5):
        publish(broker, PLAIN, [n], id=f"m-{n}")
    lane = broker.subscribe([PLAIN], "s", options(bodies_only=span))
    held = claim(lane)
    assert erase(broker, Whose(id="m-2", source="shop")) == 1
    assert [d.message_id for d in held][:2] == ["m-0", "m-1"]
    assert held[2].message_id == ("(gone)" if span else "m-2")
    each: Any = {
        "done": Done,
        "retry": lambda r: Retry(r, 0, "e"),
        "dead": lambda r: Dead(r, "e"),
        "release": Release,
    }.get(end)
    if each is None:
        lane.close()
        lane = broker.subscribe([PLAIN], "s", options(bodies_only=span))
    else:
        assert lane.settle([each(r) for r in receipts(held)]) == []
    others = ["0", "1", "3", "4"]
    if end == "dead":
        assert sorted(d.message.body.decode() for d in broker.dead_letters()) == others
    assert drain(lane) == ([] if end in ("done", "dead") else others)
    assert leftovers(broker) == {"duly_claims": 0, "duly_parked": 0}


@pytest.mark.parametrize("span", [False, True])
def test_a_gap_in_what_is_claimed_later(db_path: Path, span: bool):
    broker = opened(db_path)
    for n in range(10):
        publish(broker, PLAIN, [n], id=f"m-{n}")
    for n in (0, 4, 5, 9):
        erase(broker, Whose(id=f"m-{n}", source="shop"))
    for limit in (1, 3, 100):
        lane = broker.subscribe([PLAIN], f"s-{limit}", options(bodies_only=span))
        seen: list[str] = []
        while claimed := claim(lane, limit):
            assert lane.extend(receipts(claimed), 60) == []
            seen += [d.message.body.decode() for d in claimed]
            assert lane.settle(done(claimed)) == []
        assert seen == ["1", "2", "3", "6", "7", "8"]


def test_a_suspect_that_was_erased_is_passed_over(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    for n in range(3):
        publish(broker, PLAIN, [n], id=f"m-{n}")
    lane = broker.subscribe([PLAIN], "s", options())
    assert len(claim(lane)) == 3
    erase(broker, Whose(id="m-1", source="shop"))
    hands.advance(100)
    assert drain(lane) == ["0", "2"]


def test_what_waits_behind_it_goes_on(db_path: Path):
    broker = opened(db_path)
    publish(broker, KEYED, ["1"], key="k", id="first")
    publish(broker, KEYED, ["2", "3"], key="k")
    lane = broker.subscribe([KEYED], "s", options(order_by_key=True))
    first, *rest = receipts(claim(lane))
    lane.settle([Retry(first, 3600, "e"), *(Release(each) for each in rest)])
    assert claim(lane) == []
    erase(broker, Whose(id="first", source="shop"))
    assert drain(lane) == ["2", "3"]


def test_a_key_that_its_dead_letter_held_goes_on(db_path: Path):
    broker = opened(db_path)
    publish(broker, KEYED, ["1"], key="k", id="first")
    publish(broker, KEYED, ["2"], key="k")
    lane = broker.subscribe([KEYED], "s", options(order_by_key=True, hold_key_on_dead=True))
    first, second = receipts(claim(lane))
    lane.settle([Dead(first, "e"), Release(second)])
    assert claim(lane) == []
    erase(broker, Whose(id="first", source="shop"))
    assert bodies(claim(lane)) == ["2"]


@pytest.mark.parametrize("step", range(5))
def test_interrupted_anywhere_and_done_again_nothing_is_left(db_path: Path, step: int):
    broker = opened(db_path)
    publish(broker, KEYED, [SECRET] * 250, key="ann")
    lane = broker.subscribe([KEYED], "s", options())
    lane.settle([Dead(r, str(SECRET)) for r in receipts(claim(lane, 150))])
    steps = broker.erase(ANN)
    for _ in range(step):
        next(steps)
    broker.close()
    broker = opened(db_path)
    erase(broker)
    assert broker.holdings(ANN) == 0
    assert SECRET not in on_disk(db_path)


def test_pieces_are_short(db_path: Path):
    broker = opened(db_path)
    publish(broker, KEYED, range(250), key="ann")
    assert list(broker.erase(ANN)) == [100, 100, 50]
    publish(broker, KEYED, [b"x" * 1_000_000] * 9, key="ann")
    assert list(broker.erase(ANN)) == [4, 4, 1]


def test_it_is_narrowed(db_path: Path):
    broker = opened(db_path)
    publish(broker, KEYED, ["x"], key="ann", id="a")
    publish(broker, KEYED, ["y"], key="ann", id="b")
    publish(broker, PLAIN, ["z"], key="ann", id="b")
    assert broker.holdings(Whose(key="ann", topic="plain")) == 1
    assert broker.holdings(Whose(key="ann", id="b", source="shop")) == 2
    assert broker.holdings(Whose(id="b", source="other")) == 0
    assert broker.holdings(Whose(key="' or 1=1 --")) == 0


def test_a_worker_whose_message_is_erased_while_it_fails_goes_on(tmp_path: Path, caplog: Any):
    """The log line of a failure looks ids up, of which one is gone."""
    plain = duly.Topic("plain", str, guarantee="at-least-once")
    app = duly.App("shop", broker=f"sqlite:///{tmp_path}/shop.db")
    erased: list[int] = []

    @app.consumer(plain, name="c", guarantee="at-least-once", retry=duly.RetryPolicy(attempts=1))
    def fail(text: str) -> None:
        if not erased:
            erased.append(app.erase(id="m-3"))
        raise ValueError(text)

    with app, caplog.at_level(logging.CRITICAL):
        app.publish_many(plain, [*"abcdef"], ids=[f"m-{n}" for n in range(6)])
        with Worker(app):
            eventually(lambda: len(app.dead_letters()) == 5, "the others are dead")
        broker, _ = app.backends()
        assert isinstance(broker, SQLiteBroker)
        assert [state.is_drained for state in broker.subscriptions()] == [True]
    assert erased == [1]
    assert not caplog.records


def test_what_is_on_its_way_in_an_outbox(tmp_path: Path):
    app = duly.App("shop", broker=f"sqlite:///{tmp_path}/a.db", store=f"sqlite:///{tmp_path}/b.db")
    keyed = duly.Topic("keyed", str, guarantee="at-least-once")
    with app:
        for key in ("ann", "bob"):
            with app.transaction() as tx:
                tx.publish(keyed, SECRET.decode() if key == "ann" else "y", key=key)
        assert app.erase(key="ann") == 1
        assert app.erase(key="ann") == 0
        with pytest.raises(duly.ConfigurationError, match="say whose"):
            app.erase()
    assert SECRET not in on_disk(tmp_path / "b.db")
