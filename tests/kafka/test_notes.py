"""What is committed beside a position, and the partition that it is about."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duly.brokers.kafka.fetched import unknown
from duly.brokers.kafka.notes import MOST, REACH, Known, Notes, as_text, in_text
from duly.brokers.kafka.share import Item, Order, Share

LIMIT = 4096  # offset.metadata.max.bytes of a broker that nobody configured


def share(order: Order = Order.NONE, position: int = 0, notes: Notes | None = None) -> Share:
    return Share(("t", 0), "log", 1, order, position, notes or Notes())


def item(offset: int, key: str | None = None) -> Item:
    found = Item(unknown("t"), offset, 0, b"x")
    found.message = unknown("t").message(b"x", source="s", key=key)
    return found


def fed(share: Share, count: int, keys: list[str | None] | None = None) -> Share:
    for offset in range(share.next, share.next + count):
        share.feed(item(offset, keys[offset % len(keys)] if keys else None), None)
    return share


def taken(share: Share, limit: int = 100) -> list[int]:
    """What one claim takes."""
    lined: dict[str, int] = {}
    offsets: list[int] = []
    while len(offsets) < limit and (found := share.next_ready(0.0, lined)) is not None:
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
    )
    assert in_text(as_text(notes, position), position) == notes


def test_the_largest_notes_fit():
    notes = Notes(
        "a" * 22,
        REACH,
        REACH,
        set(range(0, REACH, 2)) | {REACH - 1},
        {offset: Known(99, True, 4_102_444_800_000) for offset in range(REACH - MOST, REACH)},
    )
    assert len(as_text(notes, 0)) <= LIMIT


@pytest.mark.parametrize(
    "text", [None, "", "by hand", '{"v":2,"d":"AA=="}', '{"v":1,"d":"*"}', "[]"]
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
    assert taken(after) == [3]
    first = after.suspect()
    assert first is not None
    assert (first.offset, first.repeated) == (0, True)


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


@pytest.mark.parametrize("seed", range(20))
def test_by_key_nothing_is_claimed_beside_its_like(seed):
    roll, part = random.Random(seed), share(Order.BY_KEY)
    fed(part, 60, ["a", "b", None, "c"])
    held: list[list[int]] = []
    order: dict[str | None, list[int]] = {"a": [], "b": [], "c": [], None: []}
    for _ in range(2000):
        if offsets := taken(part, roll.randint(1, 5)):
            held.append(offsets)
        keys = [{part.items[o].key for o in claim} - {None} for claim in held]
        assert sum(map(len, keys)) == len(set().union(*keys)), "a key is claimed twice"
        if held and roll.random() < 0.7:
            claim = held.pop(roll.randrange(len(held)))
            ended = roll.randint(0, len(claim))
            for offset in claim[:ended]:
                order[part.items[offset].key].append(offset)
                part.done(part.items[offset])
            for offset in claim[ended:]:
                part.back(part.items[offset])
    assert all(order[key] == sorted(order[key]) for key in "abc")
    assert sum(map(len, order.values())) == 60


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
