"""Dead letters brought back or removed: identity, order by key, retention, crashes in between."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from duly.guarantees import Dead, Done, Release, Retry
from duly.inspection import Mending, Selection
from tests.sqlite.brokers import (
    KEYED,
    PLAIN,
    Hands,
    bodies,
    claim,
    done,
    drain,
    execute,
    leftovers,
    opened,
    options,
    publish,
    receipts,
)
from tests.sqlite.programs import running

EVERY = Selection()


def bury(lane, error: str = "ValueError: no") -> None:
    lane.settle([Dead(r, error) for r in receipts(claim(lane))])


def test_a_replay_keeps_identity_starts_anew_and_goes_to_one_subscription(db_path: Path):
    broker = opened(db_path)
    mender: Mending = broker
    publish(broker, PLAIN, ["x"], id="the-id", headers={"traceparent": "t"})
    lane, other = (broker.subscribe([PLAIN], name, options()) for name in ("s", "other"))
    drain(other)
    lane.settle([Retry(r, 0, "once") for r in receipts(claim(lane))])
    bury(lane)
    [letter] = mender.select(EVERY, 10)
    assert (letter.attempts, letter.replays) == (2, 0)
    assert mender.replay([letter, letter]) == []
    assert broker.dead_letters() == []
    [again] = claim(lane)
    message = again.message
    assert (message.source, message.id, message.body) == ("shop", "the-id", b"x")
    assert message.headers == {"traceparent": "t"}
    assert (again.attempt, again.repeated, again.replays) == (1, False, 1)
    assert claim(other) == []
    assert lane.settle(done([again])) == []
    assert leftovers(broker) == {"duly_claims": 0, "duly_parked": 0}
    assert mender.replay([letter]) == [letter]
    assert mender.discard([letter]) == [letter]
    assert broker.incident_counts()["s", "replayed"] == 1


@pytest.mark.parametrize("end", ["retry", "release", "started", "close", "dead"])
@pytest.mark.parametrize("bodies_only", [False, True])
def test_how_often_it_was_replayed_is_known_whatever_becomes_of_it(
    db_path: Path, end: str, bodies_only: bool
):
    broker = opened(db_path)
    publish(broker, PLAIN, ["x"])
    asked = options(bodies_only=bodies_only)
    lane = broker.subscribe([PLAIN], "s", asked)
    bury(lane)
    broker.replay(broker.dead_letters())
    [receipt] = receipts(claim(lane))
    match end:
        case "retry":
            lane.settle([Retry(receipt, 0, "again")])
        case "release" | "started":
            lane.settle([Release(receipt, started=end == "started")])
        case "close":
            lane.close()
            lane = broker.subscribe([PLAIN], "s", asked)
        case _:
            lane.settle([Dead(receipt, "again")])
            assert [letter.replays for letter in broker.dead_letters()] == [1]
            broker.replay(broker.dead_letters())
    [again] = claim(lane)
    assert again.replays == (2 if end == "dead" else 1)


def test_a_message_that_the_log_has_forgotten_is_replayed_from_its_copy(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(3))
    lane = broker.subscribe([PLAIN], "s", options())
    got = receipts(claim(lane))
    lane.settle([Done(got[0]), Dead(got[1], "no"), Done(got[2])])
    execute_delete(broker)
    broker.replay(broker.dead_letters())
    assert drain(lane) == ["1"]
    assert leftovers(broker) == {"duly_claims": 0, "duly_parked": 0}


def execute_delete(broker) -> None:
    execute(broker, "delete from duly_messages returning position")
    assert execute(broker, "select count(*) from duly_messages") == [(0,)]


@pytest.mark.parametrize("how", ["replay", "discard"])
def test_a_held_key_goes_on_and_the_replayed_comes_first_of_it(db_path: Path, how: str):
    broker = opened(db_path)
    publish(broker, KEYED, ["1", "2", "3"], key="k")
    lane = broker.subscribe([KEYED], "s", options(order_by_key=True, hold_key_on_dead=True))
    first, *rest = receipts(claim(lane))
    lane.settle([Dead(first, "no"), *(Release(each) for each in rest)])
    assert drain(lane) == []
    publish(broker, KEYED, ["4"], key="k")
    assert drain(lane) == []
    assert getattr(broker, how)(broker.dead_letters()) == []
    publish(broker, KEYED, ["5"], key="k")
    assert drain(lane, limit=2) == [*(["1"] if how == "replay" else []), "2", "3", "4", "5"]


def test_two_dead_of_a_held_key_come_in_order(db_path: Path):
    broker = opened(db_path)
    publish(broker, KEYED, ["1", "2", "3"], key="k")
    lane = broker.subscribe([KEYED], "s", options(order_by_key=True, hold_key_on_dead=True))
    first, second, third = receipts(claim(lane))
    lane.settle([Dead(first, "no"), Dead(second, "no"), Release(third)])
    later, earlier = broker.dead_letters()
    broker.replay([later])
    assert drain(lane) == []
    broker.discard([earlier])
    assert drain(lane) == ["2", "3"]


def test_a_replay_comes_before_a_later_one_that_waits_for_its_retry(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, KEYED, ["1", "2"], key="k")
    lane = broker.subscribe([KEYED], "s", options(order_by_key=True))
    first, second = receipts(claim(lane))
    lane.settle([Dead(first, "no"), Retry(second, 5, "not yet")])
    broker.replay(broker.dead_letters())
    hands.advance(10)
    assert bodies(claim(lane)) == ["1", "2"]


def test_which_are_meant(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    lane = broker.subscribe([PLAIN], "s", options())
    for id, error in (("a", "ValueError: 100%"), ("b", "KeyError: x"), ("c", "ValueError: y")):
        publish(broker, PLAIN, [id], id=id)
        bury(lane, error)
        hands.advance(60)
    at_ms = broker.dead_letters()[1].dead_ms

    def ids(limit: int = 10, **which) -> list[str]:
        return [d.message.id for d in broker.select(Selection(**which), limit)]

    assert ids() == ["c", "b", "a"]
    assert ids(error="ValueError") == ["c", "a"]
    assert ids(error="0%") == ["a"]
    assert ids(id="b") == ["b"]
    assert ids(since_ms=at_ms) == ["c", "b"]
    assert ids(before_ms=at_ms) == ["a"]
    assert ids(below=broker.dead_letters()[0].number, limit=1) == ["b"]
    assert ids(consumer="s", topic="plain") == ["c", "b", "a"]
    assert ids(consumer="t") == ids(topic="once") == []


DYING = """
import os, signal, sys
from tests.sqlite.brokers import *
from duly.sql import mending
from duly.sql.steps import Ask, Many
broker = opened(sys.argv[1])
real = getattr(mending, sys.argv[2])
def dying(numbers, now_ms):
    steps, step, answer = real(numbers, now_ms), 0, None
    while True:
        if step == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            asked = steps.send(answer)
        except StopIteration as stop:
            return stop.value
        answer = yield asked
        step += 1
setattr(mending, sys.argv[2], dying)
getattr(broker, sys.argv[2])(broker.dead_letters())
print("survived", flush=True)
"""


@pytest.mark.parametrize("how", ["replay", "discard"])
def test_killed_at_any_step_nothing_is_lost_or_doubled(db_path: Path, how: str):
    broker = opened(db_path)
    publish(broker, KEYED, ["1", "2"], key="k")
    lane = broker.subscribe([KEYED], "s", options(order_by_key=True, hold_key_on_dead=True))
    first, second = receipts(claim(lane))
    lane.settle([Dead(first, "no"), Release(second)])
    steps = 0
    while True:
        with running(DYING, db_path, how, steps) as program:
            said = program.rest()
            if said == ["survived"]:
                break
            assert program.process.returncode == -signal.SIGKILL, said
        steps += 1
        assert [letter.message.body for letter in broker.dead_letters()] == [b"1"]
        assert drain(lane) == []
        assert ("s", "replayed" if how == "replay" else "discarded") not in broker.incident_counts()
    assert steps >= 4
    assert broker.dead_letters() == []
    assert drain(lane) == (["1", "2"] if how == "replay" else ["2"])
