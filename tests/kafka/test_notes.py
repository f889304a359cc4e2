"""What is committed beside a position, and the partition that it is about."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
from confluent_kafka import Consumer
from hypothesis import given, settings
from hypothesis import strategies as st

from duly.brokers.kafka.address import address_of
from duly.brokers.kafka.ending import Ending, apply, noted
from duly.brokers.kafka.fetched import unknown
from duly.brokers.kafka.membership import is_member
from duly.brokers.kafka.notes import MOST, REACH, Known, Notes, as_text, in_text
from duly.brokers.kafka.producers import Producers
from duly.brokers.kafka.share import Item, Order, Share
from duly.errors import BrokerUnusable
from duly.guarantees import Dead, Done, Release, Retry

LIMIT = 4096  # offset.metadata.max.bytes of a broker that nobody configured


def share(
    order: Order = Order.NONE,
    position: int = 0,
    notes: Notes | None = None,
    key_lanes: int = 1,
) -> Share:
    return Share(("t", 0), "log", 1, order, position, notes or Notes(), key_lanes)


def item(offset: int, key: str | None = None) -> Item:
    found = Item(unknown("t"), offset, 0, b"x")
    found.message = unknown("t").message(b"x", source="s", key=key)
    return found


def fed(share: Share, count: int, keys: list[str | None] | None = None) -> Share:
    for offset in range(share.next, share.next + count):
        share.feed(item(offset, keys[offset % len(keys)] if keys else None), None)
    return share


def taken(share: Share, limit: int = 100, now: float = 0.0, lanes: int = 1) -> list[int]:
    """What one claim takes."""
    lined: dict[str, int] = {}
    offsets: list[int] = []
    while len(offsets) < limit and (found := share.next_ready(now, lined, lanes)) is not None:
        share.take(found, lined)
        offsets.append(found.offset)
    return offsets


@given(
    st.integers(0, 1 << 60),
    st.sets(st.integers(0, REACH - 1)),
    st.dictionaries(
        st.integers(0, REACH - 1), st.tuples(st.integers(0, 99), st.booleans()), max_size=MOST
    ),
)
def test_notes_are_read_as_they_were_written(position, done, known):
    notes = Notes(
        "a" * 22,
        position + 7,
        0,
        {position + offset for offset in done},
        {position + o: Known(charged, repeated, 5) for o, (charged, repeated) in known.items()},
        "somebody/3",
    )
    assert in_text(as_text(notes, position), position) == notes


def test_the_largest_notes_fit():
    notes = Notes(
        "a" * 22,
        REACH,
        REACH,
        set(range(0, REACH, 2)) | {REACH - 1},
        {offset: Known(99, True, 4_102_444_800_000) for offset in range(REACH - MOST, REACH)},
        Producers(address_of("kafka://here", ""), "duly", lambda _: {}).owner,
    )
    assert len(as_text(notes, 0)) <= LIMIT


@given(
    st.integers(0, 1 << 60),
    st.dictionaries(
        st.integers(0, REACH - 1),
        st.tuples(st.integers(0, 99), st.booleans(), st.integers(0, 60_000)),
        min_size=150,
        max_size=400,
    ),
)
@settings(max_examples=25)
def test_many_that_wait_fit_with_all_that_is_known(position, known):
    """Their times in tenths of a second, none of them earlier."""
    dues = {offset: due and 4_000_000_000_000 + due for offset, (_, _, due) in known.items()}
    notes = Notes(
        "a" * 22,
        position + REACH,
        0,
        {position + offset for offset in range(0, REACH, 2)},
        {
            position + o: Known(charged, repeated, dues[o])
            for o, (charged, repeated, _) in known.items()
        },
        "somebody/3",
    )
    text = as_text(notes, position)
    assert len(text) <= LIMIT
    told = in_text(text, position).known
    assert told.keys() == notes.known.keys()
    for offset, each in notes.known.items():
        found = told[offset]
        assert (found.charged, found.repeated) == (each.charged, each.repeated)
        assert 0 <= found.due_ms - each.due_ms < 100


def test_of_more_than_fit_those_are_kept_that_were_tried_most():
    """The others come again as what was tried before."""
    known = {n: Known(7 if n % 50 == 3 else 1, True, 4_000_000_000_000) for n in range(5000)}
    text = as_text(Notes("a" * 22, 0, 0, set(), known), 0)
    assert len(text) <= LIMIT
    told = in_text(text, 0)
    assert {n for n, each in told.known.items() if each.charged == 7} == set(range(3, 5000, 50))
    assert told.repeated == 5000
    after = fed(share(notes=told), 5000)
    assert all(each.repeated for each in after.items.values())


@pytest.mark.parametrize(
    "text",
    [None, "", "by hand", '{"v":2,"d":"AA=="}', '{"v":1,"d":"*"}', '{"v":1,"m":"AQE="}', "[]"],
)
def test_what_others_wrote_says_nothing(text):
    assert in_text(text, 5) == Notes()


def test_the_position_stands_before_the_first_that_is_not_settled():
    part = fed(share(), 5)
    taken(part)
    part.done(part.items[1])
    part.done(part.items[3])
    assert part.position == 0
    part.done(part.items[0])
    assert part.position == 2
    assert part.notes(0, 0.0).done == {3}


def test_who_takes_over_is_given_what_is_not_settled():
    before = fed(share(), 6)
    taken(before)
    for offset in (0, 2, 4):
        before.done(before.items[offset])
    notes = before.notes(0, 0.0, leaving=True)
    after = fed(share(position=before.position, notes=notes), 5)
    assert taken(after) == [1, 3, 5]
    assert after.items[1].repeated
    assert not after.items[1].suspect, "nobody died"


def test_after_a_death_they_come_as_suspects():
    before = fed(share(), 3)
    taken(before)
    notes = before.notes(0, 0.0)
    after = fed(share(position=0, notes=notes), 4)
    assert taken(after) == [], "nothing new starts beside them"
    for offset in range(3):
        first = after.suspect({})
        assert first is not None
        assert (first.offset, first.repeated) == (offset, True)
        after.take(first, {})
        after.done(first)
    assert taken(after) == [3]


def test_as_logged_nothing_is_claimed_beside_anything():
    part = fed(share(Order.AS_LOGGED), 5)
    assert taken(part, 2) == [0, 1]
    assert taken(part) == []
    part.done(part.items[0])
    assert taken(part) == []
    part.wait(part.items[1], due=10.0)
    assert taken(part) == [], "a cursor cannot pass it"


@pytest.mark.parametrize("seed", range(20))
def test_as_logged_every_claim_goes_on_where_the_last_one_ended(seed):
    roll, part, seen = random.Random(seed), share(Order.AS_LOGGED), list[int]()
    fed(part, 40)
    for _ in range(500):
        offsets = taken(part, roll.randint(1, 6))
        ended = roll.randint(0, len(offsets))
        for offset in offsets[:ended]:
            part.done(part.items[offset])
            seen.append(offset)
        for offset in reversed(offsets[ended:]):
            part.back(part.items[offset])
    assert seen == list(range(40))


@pytest.mark.parametrize("order", [Order.BY_KEY, Order.BY_LANE], ids=lambda each: each.name)
@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_claimed_beside_its_like(seed: int, order: Order):
    """Of a key; or of a lane of keys, to which everything belongs."""
    roll, part = random.Random(seed), share(order, key_lanes=3)
    fed(part, 60, ["a", "b", None, "c"])
    held: list[list[int]] = []
    seen: dict[str | None, list[int]] = {}
    beside = 0
    for _ in range(2000):
        if offsets := taken(part, roll.randint(1, 5)):
            held.append(offsets)
        lines = [{part.items[o].line for o in claim} - {None} for claim in held]
        assert sum(map(len, lines)) == len(set().union(*lines)), "a line is claimed twice"
        beside = max(beside, len(held))
        if held and roll.random() < 0.7:
            claim = held.pop(roll.randrange(len(held)))
            ended = roll.randint(0, len(claim))
            for offset in claim[:ended]:
                seen.setdefault(part.items[offset].line, []).append(offset)
                part.done(part.items[offset])
            for offset in claim[ended:]:
                part.back(part.items[offset])
    assert len(seen) == (4 if order is Order.BY_KEY else 3)
    assert all(offsets == sorted(offsets) for line, offsets in seen.items() if line is not None)
    assert sum(map(len, seen.values())) == 60
    assert beside >= 2


def test_a_lane_of_keys_follows_from_the_record_alone():
    """Whoever reads it next has to find its cursor."""
    first, second = (fed(share(Order.BY_LANE, key_lanes=5), 40, ["a", None, "b"]) for _ in range(2))
    there = {o: first.log_of(item) for o, item in first.items.items()}
    assert there == {o: second.log_of(item) for o, item in second.items.items()}
    assert {*there.values()} == {f"log#{n}/5" for n in range(5)}
    of_key = {there[o] for o in range(0, 40, 3)}
    assert len(of_key) == 1
    assert fed(share(Order.AS_LOGGED), 1).log_of(first.items[0]) == "log"


def test_a_claim_takes_of_few_lanes_of_keys():
    """Others are left for those beside it, and what waits holds up no lane but its own."""
    part = fed(share(Order.BY_LANE, key_lanes=4), 40)
    claims = [taken(part, 12) for _ in range(5)]
    lines = [{part.items[o].line for o in claim} for claim in claims]
    assert [len(each) for each in lines] == [1, 1, 1, 1, 0]
    assert claims[0] == [*range(0, 40, 4)]
    for offset in claims[0][1:]:
        part.back(part.items[offset])
    part.wait(part.items[0], due=60.0)
    for offset in claims[1]:
        part.done(part.items[offset])
    fed(part, 4)
    assert taken(part, 12) == [part.next - 4 + claims[1][0]]
    assert taken(part, 12) == []
    assert taken(part, 12, now=61.0) == [*range(0, 44, 4)]


def test_a_claim_that_may_takes_of_several_lanes():
    """In the order of offsets, so that not much is begun before all of it."""
    part = fed(share(Order.BY_LANE, key_lanes=4), 8)
    assert taken(part, 12, lanes=3) == [0, 1, 2, 4, 5, 6]
    assert taken(part, 1, lanes=3) == [3]


def test_of_lanes_of_keys_those_count_that_have_something():
    """Or with few keys one claim would take of all of them."""
    part = fed(share(Order.BY_LANE, key_lanes=32), 50, ["a", "b", "c", "d"])
    assert [part.lanes_a_claim(claimers) for claimers in (1, 2, 3, 8)] == [4, 2, 2, 1]


def test_what_is_foreseen_of_lanes_of_keys_is_what_claims_take():
    """More would be suspect when the process dies, and less costs each claim a commit."""
    part = fed(share(Order.BY_LANE, key_lanes=8), 800)
    held = taken(part, 40, lanes=2)
    part.announce(max(held))
    for offset in held:
        part.done(part.items[offset])
    part.foresee(40)
    extent = part.announced
    for _ in range(4):
        assert all(extent.covers(offset) for offset in taken(part, 40, lanes=2))
    assert extent.end < 8 * 40


@pytest.mark.parametrize("order", [Order.BY_KEY, Order.BY_LANE, Order.AS_LOGGED])
def test_what_cannot_be_read_keeps_nobody_from_work(order: Order):
    """Further ahead than may be started: it waits for its turn by itself."""
    part = fed(share(order, key_lanes=8), REACH + 50, ["a", "b", "c"])
    unreadable(part)
    assert taken(part, 5)


@pytest.mark.parametrize("order", [Order.BY_KEY, Order.BY_LANE])
def test_what_cannot_be_read_behind_many_retries_keeps_nobody(order: Order):
    part = fed(share(order, key_lanes=2000), 300, [f"k{number}" for number in range(300)])
    while found := taken(part, 1):
        part.note(part.items[found[0]])
        part.wait(part.items[found[0]], 10.0)
    unreadable(part)
    assert taken(part, 5, now=11.0)


def unreadable(part: Share) -> None:
    """The next record is no message."""
    bad = item(part.next)
    bad.message, bad.wrong = None, "bad"
    part.feed(bad, None)


def test_nothing_is_claimed_further_ahead_than_can_be_noted():
    part = fed(share(), REACH + 10)
    assert len(taken(part, REACH + 10)) == REACH
    for offset in range(1, REACH):
        part.done(part.items[offset])
    assert taken(part) == []
    assert len(as_text(part.notes(0, 0.0), part.position)) <= LIMIT
    part.done(part.items[0])
    assert len(taken(part)) == 10


def test_what_waits_in_its_place_is_bounded():
    part = fed(share(), 2 * MOST)
    for offset in taken(part, MOST):
        part.note(part.items[offset])
        part.wait(part.items[offset], due=60.0)
    part.notes(0, 0.0)
    assert taken(part) == []
    part.done(part.items[0])
    part.notes(0, 0.0)
    assert len(taken(part)) == MOST


def test_records_of_the_logs_own_are_passed_over():
    part = share(position=3)
    part.reached(9)
    assert (part.position, part.next, part.version) == (9, 9, 1)
    fed(part, 1)
    part.reached(12)
    assert part.position == 9


# --- in a transaction


@pytest.mark.parametrize("taking", [1, 3, 8])
@pytest.mark.parametrize("seed", range(20))
def test_what_is_foretold_is_what_there_is_afterwards(seed: int, taking: int):
    """Position and notes are committed before the claims have ended in the share."""
    chance = random.Random(seed)
    known = {chance.randrange(10): Known(2, True)}
    mine = fed(share(Order.AS_LOGGED, notes=Notes("t", 0, 0, set(), known)), 12)
    while offsets := taken(mine, taking):
        ended = []
        for offset in offsets:
            ending: Any = chance.choice([Done(0), Dead(0, ""), Retry(0, 5.0, ""), Release(0)])
            ended.append(Ending(ending, mine, mine.items[offset], 0))
            if isinstance(ending, Retry | Release):
                break
        noted_ = {e.item.offset: noted(e.settlement, e.item, 1000) for e in ended}
        told = mine.foretell(
            {
                e.item.offset: noted_[e.item.offset]
                for e in ended
                if noted_[e.item.offset] or not isinstance(e.settlement, Release)
            },
            2, 1000, 0.0,
        )  # fmt: skip
        for each in ended:
            apply(each.settlement, mine, each.item, 0.0)
        mine.announced = told.announced
        after = mine.notes(1000, 0.0)
        assert told.position == mine.position
        assert (told.notes.done, told.notes.known) == (after.done, after.known)
        for item in list(mine.claimed.values()):
            mine.back(item)
        if any(isinstance(each.settlement, Retry) for each in ended):
            assert mine.next_ready(0.0, {}) is None, "it holds its partition"
            return


@pytest.mark.parametrize(
    ("generation", "member", "is_one"),
    [(7, b"consumer-1", True), (-1, b"", False), (7, b"", False), (-1, b"consumer-1", False)],
)
def test_only_a_member_commits(generation: int, member: bytes, is_one: bool):
    """Of nobody Kafka takes any position: nobody could be fenced off."""
    told = generation.to_bytes(4, sys.byteorder, signed=True)
    assert is_member(b"CGMDv2:" + told + b"group\0" + member + b"\0\1") is is_one


def test_metadata_in_a_form_that_is_not_known_is_told():
    with pytest.raises(BrokerUnusable, match="not know"):
        is_member(b"CGMDv3:...")


def test_the_driver_tells_metadata_in_the_form_that_is_known():
    consumer: Any = Consumer({"bootstrap.servers": "127.0.0.1:1", "group.id": "g", "log_level": 0})
    assert is_member(consumer.consumer_group_metadata()) is False
    consumer.close()


@pytest.mark.parametrize("count", [1, 300], ids=["plain", "packed"])
def test_a_clock_that_was_set_back_lets_nothing_wait_for_longer(count: int):
    known = {offset: Known(1, True, 10_000) for offset in range(count)}
    text = as_text(Notes(known=known, written_ms=9_000), 0)
    assert ('"m"' in text) == (count > 1)
    read = in_text(text, 0)
    waits = [read.left_ms(read.known[0].due_ms, now) for now in (0, 9_000, 9_700, 10_000, 50_000)]
    assert waits == [1_000, 1_000, 300, 0, 0]


def test_what_nobody_has_fetched_is_noted_by_the_clock_that_there_is_now():
    before = Notes(known={5: Known(1, True, 10_000), 6: Known(1, True, 1)}, written_ms=9_000)
    after = share(notes=before).notes(200, 0.0)
    assert (after.written_ms, after.known[5].due_ms, after.known[6].due_ms) == (200, 1_200, 0)


def test_without_a_time_to_wait_for_no_time_is_told():
    assert '"w"' not in as_text(Notes(known={1: Known(1, True, 0)}, written_ms=9_000), 0)
