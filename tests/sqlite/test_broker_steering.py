"""Subscriptions paused, rewound and removed: fenced, in pieces, and finished after a crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from duly.errors import BrokerUnusable, ConfigurationError
from duly.guarantees import Dead, Done, Guarantee, Release, Retry
from duly.inspection.steering import Steering
from duly.message import Topic
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


def rewind(broker: Steering, to: Any = None, limit: int = 100, epoch: str | None = None) -> int:
    targets = broker.targets("s", to)
    assert broker.rewind("s", targets, epoch, quiet=False)
    while broker.tidy("s", limit):
        pass
    broker.finish("s")
    return sum(target.messages for target in targets)


def states(broker: Steering) -> list[tuple[str, str]]:
    return [(each.subscription, each.state) for each in broker.steered()]


# --- pausing


def test_nothing_is_claimed_while_it_is_paused_by_whoever_asks(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(6))
    lane, other = (broker.subscribe([PLAIN], name, options()) for name in ("s", "other"))
    held = claim(lane, 2)
    assert broker.pause("s")
    assert not broker.pause("s")
    assert states(broker) == [("s", "paused")]
    assert (claim(lane), lane.paused) == ([], True)
    assert lane.settle(done(held)) == []
    broker.close()
    broker = opened(db_path)
    lane, other = (broker.subscribe([PLAIN], name, options()) for name in ("s", "other"))
    assert (claim(lane), lane.paused) == ([], True)
    assert (len(drain(other)), other.paused) == (6, False)
    assert broker.resume("s")
    assert not broker.resume("s")
    assert (drain(lane), lane.paused) == (["2", "3", "4", "5"], False)
    assert [each.kind for each in broker.incidents("s")] == ["resumed", "paused"]


def test_what_is_due_waits_for_the_end_of_the_pause_and_no_claim_spins(
    db_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, ["x"])
    lane = broker.subscribe([PLAIN], "s", options())
    lane.settle([Retry(r, 5, "later") for r in receipts(claim(lane))])
    broker.pause("s")
    hands.advance(10)
    asked: list[int] = []
    reads = broker.file.read

    def read(steps: Any) -> Any:
        asked.append(1)
        return reads(steps)

    monkeypatch.setattr(broker.file, "read", read)
    assert claim(lane) == []
    assert len(asked) < 5
    broker.resume("s")
    assert drain(lane) == ["x"]


def test_a_busy_lane_claims_nothing_ahead_of_a_pause(db_path: Path):
    broker = opened(db_path, hands=Hands())
    publish(broker, PLAIN, range(10))
    lane = broker.subscribe([PLAIN], "s", options())
    held = claim(lane, 5)
    ahead = lane.ahead(5, 1 << 30)
    assert ahead is not None
    broker.pause("s")
    assert lane.settle_and_claim(done(held), ahead) == []
    assert list(ahead.deliveries()) == []


@pytest.mark.parametrize("call", ["pause", "resume"])
def test_a_subscription_that_nobody_made(db_path: Path, call: str):
    broker = opened(db_path)
    broker.subscribe([PLAIN], "s", options())
    with pytest.raises(ConfigurationError, match="no subscription 'x' here; there are: s"):
        getattr(broker, call)("x")


# --- rewinding


def test_what_is_kept_comes_again_and_nothing_else(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(10))
    lane, other = (broker.subscribe([PLAIN], name, options()) for name in ("s", "other"))
    assert len(drain(lane)) == len(drain(other)) == 10
    assert rewind(broker, broker.targets("s", None)[0].position + 7) == 3
    assert (drain(lane), drain(other)) == (["7", "8", "9"], [])
    assert rewind(broker) == 10
    assert len(drain(lane)) == 10
    assert [each.kind for each in broker.incidents("s")] == ["rewound"] * 2


def test_to_a_time(db_path: Path):
    hands = Hands()
    broker = opened(db_path, KEYED, hands=hands)
    lane = broker.subscribe([KEYED], "s", options())
    for n in range(20):
        publish(broker, KEYED, [n], key=str(n), time_ms=hands.wall)
        hands.advance(60)
    drain(lane)
    from datetime import UTC, datetime

    since = datetime.fromtimestamp((hands.wall - 5 * 60_000) / 1000, UTC)
    assert rewind(broker, since) == 5
    assert sorted(map(int, drain(lane))) == [15, 16, 17, 18, 19]


def test_never_forward(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(5))
    lane = broker.subscribe([PLAIN], "s", options())
    first, second = receipts(claim(lane, 2))
    lane.settle([Done(first), Done(second)])
    assert broker.targets("s", first[1] + 4) == []
    assert broker.targets("s", first[1] + 1)[0].messages == 1
    with pytest.raises(ConfigurationError, match="in none of its topics"):
        broker.targets("s", 5)


@pytest.mark.parametrize("span", [False, True])
def test_who_holds_a_claim_can_settle_nothing_that_comes_again(db_path: Path, span: bool):
    broker = opened(db_path)
    publish(broker, PLAIN, range(6))
    lane, second = (broker.subscribe([PLAIN], "s", options(bodies_only=span)) for _ in range(2))
    held = claim(lane, 4)
    position = broker.targets("s", None)[0].position
    rewind(broker, position + 2)
    assert [d.message.body for d in claim(second)] == [b"2", b"3", b"4", b"5"]
    refused = lane.settle([Done(held.receipt, 4)] if span else done(held))  # type: ignore[attr-defined]
    assert [receipt[1] - position for receipt in refused] == [2, 3]
    assert broker.incident_counts()["s", "stale-settle"] == 2


def test_what_waited_was_free_or_dead_comes_again_once(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(6))
    lane = broker.subscribe([PLAIN], "s", options())
    got = receipts(claim(lane))
    ends: list[Any] = [
        Done,
        lambda r: Retry(r, 60, "e"),
        lambda r: Dead(r, "e"),
        Release,
        Done,
        Done,
    ]
    lane.settle([end(receipt) for end, receipt in zip(ends, got, strict=True)])
    execute(broker, "delete from duly_messages where position & 255 = 3 returning 1")  # the dead
    assert rewind(broker, limit=1) == 6
    assert sorted(drain(lane)) == ["0", "1", "2", "3", "4", "5"]
    assert broker.dead_letters() == []
    assert leftovers(broker) == {"duly_claims": 0, "duly_parked": 0}


def test_what_lies_before_the_place_stays_as_it_is(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(4))
    lane = broker.subscribe([PLAIN], "s", options())
    got = receipts(claim(lane))
    lane.settle([Dead(got[0], "e"), Release(got[1]), Done(got[2]), Done(got[3])])
    assert rewind(broker, got[3][1]) == 1
    assert len(broker.dead_letters()) == 1
    assert sorted(drain(lane)) == ["1", "3"]


def test_wide_gaps_are_stepped_over(db_path: Path):
    kept = Topic("kept", bytes, guarantee="at-least-once", retention_s=3600)
    broker = opened(db_path, kept)
    publish(broker, kept, range(5000))
    lane = broker.subscribe([kept], "s", options())
    drain(lane)
    gone = "delete from duly_messages where position & 65535 between 2 and 4999 returning 1"
    assert len(execute(broker, gone)) == 4998
    assert rewind(broker) == 2
    commits = broker.file.stats.commits
    assert drain(lane, limit=1) == ["0", "4999"]
    assert broker.file.stats.commits - commits < 10


def test_an_epoch_begins_once(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(2))
    lane = broker.subscribe([PLAIN], "s", options())
    drain(lane)
    targets = broker.targets("s", None)
    assert broker.rewind("s", targets, "e", quiet=False)
    assert broker.rewind("s", targets, "e", quiet=False)  # not finished: it goes on
    broker.finish("s")
    assert not broker.rewind("s", targets, "e", quiet=False)
    assert (drain(lane), states(broker)) == (["0", "1"], [])


def test_quiet_wants_a_pause_and_no_claim(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(2))
    lane = broker.subscribe([PLAIN], "s", options())
    held = claim(lane)
    targets = broker.targets("s", None)
    with pytest.raises(ConfigurationError, match="not paused"):
        broker.rewind("s", targets, "e", quiet=True)
    broker.pause("s")
    with pytest.raises(ConfigurationError, match="2 messages of it are claimed"):
        broker.rewind("s", targets, "e", quiet=True)
    lane.settle(done(held))
    assert broker.rewind("s", targets, "e", quiet=True)
    broker.finish("s")
    assert states(broker) == [("s", "paused")]


@pytest.mark.parametrize("dies_after", range(4))
def test_one_that_was_interrupted_holds_everything_until_it_is_done_again(
    db_path: Path, dies_after: int
):
    broker = opened(db_path)
    publish(broker, PLAIN, range(6))
    lane = broker.subscribe([PLAIN], "s", options())
    lane.settle([Retry(r, 0, "again") for r in receipts(claim(lane))])
    assert broker.rewind("s", broker.targets("s", None), None, quiet=False)
    for _ in range(dies_after):
        assert broker.tidy("s", 1) == 1
    broker.close()
    broker = opened(db_path)
    lane = broker.subscribe([PLAIN], "s", options())
    assert claim(lane) == []
    with pytest.raises(ConfigurationError, match="was not finished"):
        broker.resume("s")
    with pytest.raises(ConfigurationError, match="still there"):
        broker.finish("s")
    assert broker.targets("s", None) == []
    rewind(broker)
    assert drain(lane) == ["0", "1", "2", "3", "4", "5"]


def test_one_that_another_overtook_takes_nothing_back(
    db_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What has come again by now would come once more, in the same life, and be given out twice."""
    broker, other = opened(db_path), opened(db_path)
    publish(broker, PLAIN, range(3))
    lane = broker.subscribe([PLAIN], "s", options())
    drain(lane)
    targets = broker.targets("s", None)
    ground = broker._ground
    write, writes = ground.write, iter(range(2))

    def overtaken(make_steps: Any) -> Any:
        if next(writes) == 1:  # it holds the subscription, and has taken nothing back yet
            rewind(other, epoch="e")
            lane.settle([Retry(each, 0, "e") for each in receipts(claim(lane))])
        return write(make_steps)

    monkeypatch.setattr(ground, "write", overtaken)
    with pytest.raises(ConfigurationError, match="took nothing back"):
        broker.rewind("s", targets, "e", quiet=False)
    assert (drain(lane), states(other)) == (["0", "1", "2"], [])


# --- removing


def test_it_is_gone_with_all_it_had_and_nobody_gets_its_number(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(6))
    lane, other = (broker.subscribe([PLAIN], name, options()) for name in ("s", "other"))
    got = receipts(claim(lane, 4))
    lane.settle([Dead(got[0], "e"), Retry(got[1], 0, "e"), Release(got[2])])
    assert broker.drop("s")
    assert not broker.drop("s")
    assert [state.name for state in broker.subscriptions()] == ["other"]
    assert states(broker) == [("s", "removing")]
    while broker.tidy("s", 1):
        pass
    assert (states(broker), broker.dead_letters()) == ([], [])
    assert leftovers(broker) == {"duly_claims": 0, "duly_parked": 0}
    anew = broker.subscribe([PLAIN], "s", options(guarantee=Guarantee.AT_MOST_ONCE))
    assert lane.settle([Done(got[3])]) == [got[3]]
    for _ in range(2):
        with pytest.raises(BrokerUnusable, match="was removed"):
            claim(lane)
    assert len(drain(anew)) == len(drain(other)) == 6


def test_it_is_removed_in_pieces_each_short(db_path: Path):
    """What waits may be millions: each transaction removes some of it."""
    broker = opened(db_path)
    publish(broker, PLAIN, range(1000), due_ms=1 << 60)
    lane = broker.subscribe([PLAIN], "s", options())
    assert claim(lane, 10_000) == []
    broker.drop("s")
    removed = []
    while count := broker.tidy("s", 300):
        removed.append(count)
    assert removed == [300, 300, 300, 100]


def test_the_log_is_kept_for_whoever_comes(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(3))
    lane = broker.subscribe([PLAIN], "s", options())
    broker.drop("s")
    hands.advance(100)
    with pytest.raises(BrokerUnusable):
        claim(lane)
    assert drain(broker.subscribe([PLAIN], "new", options())) == ["0", "1", "2"]


def test_a_new_topic_of_a_paused_subscription_is_paused_too(db_path: Path):
    broker = opened(db_path)
    broker.subscribe([PLAIN], "s", options())
    broker.pause("s")
    publish(broker, KEYED, ["x"])
    lane = broker.subscribe([PLAIN, KEYED], "s", options())
    assert claim(lane) == []
    broker.resume("s")
    assert bodies(claim(lane)) == ["x"]


# --- in pieces


@pytest.mark.parametrize("how", ["rewind", "drop"])
def test_a_piece_is_bounded_in_bytes_too(db_path: Path, how: str):
    broker = opened(db_path)
    large = bytes(1024 * 1024)
    lane = broker.subscribe([PLAIN], "s", options())
    publish(broker, PLAIN, [large] * 10)
    lane.settle([Dead(receipt, "e") for receipt in receipts(claim(lane))])
    if how == "rewind":
        broker.rewind("s", broker.targets("s", None), None, quiet=False)
    else:
        broker.drop("s")
    assert [broker.tidy("s", 500) for _ in range(4)] == [4, 4, 2, 0]


def test_one_that_is_larger_than_a_piece_goes_all_the_same(db_path: Path):
    huge = Topic("huge", bytes, guarantee="at-least-once", max_body_bytes=1 << 24)
    broker = opened(db_path, huge)
    lane = broker.subscribe([huge], "s", options())
    publish(broker, huge, [bytes(5 * 1024 * 1024)] * 2)
    lane.settle([Dead(receipt, "e") for receipt in receipts(claim(lane))])
    broker.drop("s")
    assert [broker.tidy("s", 500) for _ in range(3)] == [1, 1, 0]
