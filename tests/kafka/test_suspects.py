"""What somebody died with comes in parts that shrink: nobody is charged who was not alone, nothing
goes on for ever, and it costs little.
"""

from __future__ import annotations

import random

import pytest

from duly.brokers.kafka.ending import apply
from duly.brokers.kafka.notes import REACH, Known, Notes, as_text, in_text
from duly.brokers.kafka.share import Order
from duly.brokers.kafka.suspects import FEW, PARTS, part_of
from duly.guarantees import Release, Retry
from tests.kafka.lives import KEY_LANES, Died, Life, World, attempt_of, lived_through

ORDERS = pytest.mark.parametrize("order", [*Order], ids=[each.name for each in Order])

SEEDS = pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(n, marks=pytest.mark.long) for n in range(4, 40))]
)


def some_world(seed: int, order: Order, *, partitions: int = 2) -> World:
    """With gaps, as of marks of transactions."""
    roll = random.Random(f"{seed} {order}")
    there = {n: sorted(roll.sample(range(700), 500)) for n in range(partitions)}
    return World(
        roll, order, there, keys=7 if order.is_in_lines and seed % 4 else 0,
        transacted=order is Order.AS_LOGGED and seed % 2 == 0,
    )  # fmt: skip


def after_a_death(count: int, order: Order = Order.NONE, limit: int = REACH) -> World:
    """A process had claimed so many, and died of something else."""
    world = World(random.Random(1), order, {0: range(count)}, transacted=order is Order.AS_LOGGED)
    life = Life(world, limit=limit)
    life.fetch_all()
    life.claim(0)
    assert len(life.shares[0].claimed) == min(limit, count)
    world.death(life)
    world.commits = world.claims = 0
    return world


def test_suspects_of_lanes_of_keys_are_worked_side_by_side():
    """In the order of offsets the first claim would hold some of every lane."""
    world = after_a_death(2000, Order.BY_LANE, limit=1000)
    life = Life(world, lanes=KEY_LANES, limit=100)
    life.fetch_all()
    held = [life.claim(lane) for lane in range(KEY_LANES)]
    assert all(held)
    assert all(item.suspect for work in held if work for _, _, item, _ in work.items)
    for lane in range(KEY_LANES):
        finish(life, lane)
    work(life)
    assert len(world.settled) == 2000


def work(life: Life) -> None:
    """Handle all that comes, and settle it well. Raises `Died`."""
    life.fetch_all()
    while life.claim(0) is not None:
        finish(life, 0)


def finish(life: Life, lane: int) -> None:
    """Handle what the lane has, and settle it well. Raises `Died`."""
    life.world.roll.random = lambda: 1.0  # type: ignore[method-assign]  # nothing fails by chance
    for _ in life.work[lane].items:  # type: ignore[union-attr]
        life.start(lane)
    life.end(lane)


@pytest.mark.parametrize("order", [Order.NONE, Order.AS_LOGGED])
def test_a_death_of_something_else_costs_few_transactions(order: Order):
    world = after_a_death(REACH, order)
    work(Life(world, limit=REACH))
    assert world.is_over
    assert world.claims == PARTS
    assert world.commits <= PARTS + 1, "each part is announced as the one before is settled"


@pytest.mark.parametrize("at", [0, 700, REACH - 1])
@pytest.mark.parametrize("order", [Order.NONE, Order.AS_LOGGED])
def test_a_killer_is_alone_after_few_deaths_and_few_transactions(order: Order, at: int):
    world = after_a_death(REACH, order)
    world.killers = {(0, at)}
    deaths: list[int] = []
    while not world.is_over:
        life = Life(world, limit=REACH)
        try:
            work(life)
        except Died:
            deaths.append(len(life.shares[0].claimed))
            world.death(life)
    assert deaths == [512, 32, *[1] * 3], "it is alone after two more, and charged for three"
    assert world.settled.pop((0, at)) == "Dead"
    assert set(world.settled.values()) == {"Done"}
    # Of each level its parts, and of the last its messages one by one.
    assert world.claims <= 2 * PARTS + FEW + 3 * PARTS
    assert world.commits <= 2 * world.claims


@ORDERS
@SEEDS
def test_whatever_kills_comes_to_an_end_and_charges_no_other(seed: int, order: Order):
    world = some_world(seed, order)
    roll = world.roll
    places = [(n, o) for n, offsets in world.there.items() for o in offsets]
    world.killers = {*roll.sample(places, roll.choice([1, 2, 5]))}
    lived_through(world, lanes=roll.choice([1, 1, 3]), limit=roll.choice([1, 50, 500]),
                  deaths=0.0, moves=0.0)  # fmt: skip
    dead = {place for place, how in world.settled.items() if how == "Dead"}
    assert dead == world.killers
    assert world.deaths <= len(world.killers) * 14


@ORDERS
@SEEDS
def test_beside_other_deaths_and_partitions_that_move(seed: int, order: Order):
    world = some_world(seed, order)
    roll = world.roll
    places = [(n, o) for n, offsets in world.there.items() for o in offsets]
    world.killers = {*roll.sample(places, 2)}
    world.hangers = {*roll.sample(places, 1)} - world.killers
    lived_through(world, lanes=roll.choice([1, 3]), limit=roll.choice([20, 500]),
                  deaths=roll.choice([0.0, 0.02, 0.1]),
                  moves=roll.choice([0.0, 0.1, 0.3]))  # fmt: skip
    dead = {place for place, how in world.settled.items() if how == "Dead"}
    assert world.killers | world.hangers <= dead


@ORDERS
@SEEDS
def test_what_hangs_is_alone_without_a_death(seed: int, order: Order):
    world = some_world(seed, order, partitions=1)
    world.hangers = {(0, world.roll.choice(world.there[0]))}
    lived_through(world, lanes=2, limit=300, deaths=0.0, moves=0.0)
    dead = {place for place, how in world.settled.items() if how == "Dead"}
    assert dead == world.hangers
    assert world.deaths == 0


def test_parts_shrink():
    for count in [*range(1, 200), 512, 8191, 8192]:
        assert part_of(count) == 1 or part_of(count) < count
        assert part_of(part_of(part_of(count))) == 1


def test_where_suspects_begin_is_noted():
    notes = Notes("t", 30, 40, {21}, {22: Known(1, True)}, since=20)
    assert in_text(as_text(notes, 15), 15) == notes
    assert in_text(as_text(notes, 20), 20) == notes
    assert in_text(as_text(Notes("t", 30), 15), 15).extent.covers(15), "nothing is said of that"


# --- alone in its process


def two_lanes(world: World) -> Life:
    life = Life(world, lanes=2, limit=10)
    life.fetch_all()
    return life


def held(life: Life) -> list[tuple[int, int, bool, int]]:
    """Partition, offset, whether its death is charged to it, and its attempt."""
    return [
        (number, item.offset, item.alone, attempt_of(item))
        for work in life.work
        for number, _, item, _ in (work.items if work is not None else ())
    ]


def test_nothing_starts_beside_one_that_is_charged():
    world = World(random.Random(1), Order.NONE, {0: range(5), 1: range(5)})
    first = two_lanes(world)
    first.claim(0)
    world.death(first)
    life = two_lanes(world)
    life.claim(0)
    [(number, offset, alone, attempt)] = held(life)
    assert (alone, attempt) == (True, 1)
    assert life.claim(1) is None
    life.shares[number].back(life.shares[number].items[offset])
    assert life.claim(1) is not None


def test_what_runs_for_long_is_not_charged_once_others_start_beside_it():
    there = {0: range(2), 1: range(5)}
    world = World(random.Random(1), Order.NONE, there)
    first = Life(world, limit=10)
    first.fetch(0, 2)
    first.claim(0)
    world.death(first)
    life = two_lanes(world)
    life.claim(0)
    assert held(life) == [(0, 0, True, 1)]
    world.now += 0.9
    assert life.claim(1) is None
    world.now += 0.2
    assert life.claim(1) is not None
    assert held(life) == [(0, 0, False, 1), *((1, n, False, 1) for n in range(5))]
    world.death(life)
    after = Life(world, lanes=2, limit=10)
    after.fetch(0, 2)
    after.claim(0)
    assert held(after) == [(0, 0, True, 1)], "nobody was charged"
    after.fetch_all()
    world.now += 20.0
    assert after.claim(1) is None, "it has died alone before"


def test_beside_others_it_is_not_charged_and_then_runs_without_them():
    """Its process dies while another lane is busy: nobody knows whose fault it is."""
    there = {0: range(2), 1: range(5), 2: range(3)}
    world = World(random.Random(1), Order.NONE, there)
    first = Life(world, limit=10)
    first.fetch(0, 2)
    first.claim(0)
    world.death(first)
    life = Life(world, lanes=2, limit=10)
    life.fetch(1, 5)
    life.claim(0)  # there is nothing else yet
    life.fetch(0, 2)
    life.claim(1)
    assert held(life) == [*((1, n, False, 1) for n in range(5)), (0, 0, False, 1)]
    world.death(life)
    after = Life(world, lanes=2, limit=10)
    after.fetch(2, 3)
    after.claim(1)
    assert held(after) == [(2, n, False, 1) for n in range(3)]
    after.fetch_all()
    assert after.claim(0) is None, "it waits until the others have ended"
    finish(after, 1)
    after.claim(1)
    assert held(after) == [(0, 0, True, 1)]
    assert after.claim(0) is None
    world.death(after)
    last = two_lanes(world)
    last.claim(0)
    assert held(last) == [(0, 0, True, 2)]


def test_who_hands_over_in_order_charges_nobody_and_says_what_is_left():
    world = after_a_death(500)
    before = Life(world, limit=1000)
    before.fetch_all()
    before.claim(0)
    assert len(held(before)) == part_of(500)
    before.hand_over()
    after = Life(world, limit=1000)
    after.fetch_all()
    after.claim(0)
    assert len(held(after)) == part_of(500), "nothing has had its turn"
    world.death(after)
    alone = Life(world, limit=1000)
    alone.fetch_all()
    alone.claim(0)
    assert held(alone) == [(0, 0, True, 1)]
    alone.hand_over()
    again = Life(world, limit=1000)
    again.fetch_all()
    again.claim(0)
    assert held(again) == [(0, 0, True, 1)], "nobody has died"


def test_a_retry_goes_before_the_suspects_that_it_holds_up():
    """Though others of them are not fetched yet: there may be no room for these before that."""
    world = World(random.Random(1), Order.BY_KEY, {0: range(5)}, keys=1)
    notes = Notes("t", 500, 0, set(), {0: Known(1, True, 60_000)})
    world.told[0] = (0, as_text(notes, 0))
    world.now = 0.0
    part = Life(world).shares[0]
    for offset in range(5):
        part.feed(world.item(offset), 60.0 if offset == 0 else None)
    assert part.suspect({}) is None
    assert part.next_ready(0.0, {}) is None
    first = part.next_ready(60.0, {})
    assert first is not None
    assert (first.offset, first.suspect, first.repeated) == (0, False, True)
    part.take(first, {})
    part.done(first)
    next_ = part.suspect({})
    assert next_ is not None
    assert next_.offset == 1


def test_what_was_never_tried_does_not_keep_what_was_noted_waiting():
    """In order by key, where more were given back than may be noted."""
    part = Life(World(random.Random(1), Order.BY_KEY, {0: range(200)}, keys=200)).shares[0]
    world = World(random.Random(1), Order.BY_KEY, {}, keys=200)
    for offset in range(200):
        part.feed(world.item(offset), None)
    for offset in range(100, 200):
        part.note(part.items[offset])
    first = part.next_ready(0.0, {})
    assert first is not None
    assert first.offset == 0, "it stands before them"


# --- leases that are over


def let_go(life: Life, lane: int) -> None:
    """The lane hangs until its lease is over."""
    for _, _, item, _ in life.work[lane].items:  # type: ignore[union-attr]
        item.until = life.world.now
    life.work[lane] = None


def claimed(life: Life, lane: int) -> list[int]:
    """The offsets of what the lane claims now."""
    work = life.claim(lane)
    return [] if work is None else [item.offset for _, _, item, _ in work.items]


def test_a_part_that_hangs_is_cut_smaller():
    world = World(random.Random(1), Order.NONE, {0: range(REACH)})
    life = Life(world, lanes=2, limit=REACH)
    life.fetch_all()
    sizes = []
    for _ in range(4):
        sizes.append(len(claimed(life, 0)))
        let_go(life, 0)
    assert sizes == [REACH, 512, 32, 1]
    life.claim(0)
    assert held(life) == [(0, 0, True, 2)]


def test_what_was_cut_is_not_among_more_again():
    world = World(random.Random(1), Order.NONE, {0: range(600)})
    life = Life(world, lanes=2, limit=10)
    life.fetch_all()
    assert len(claimed(life, 0)) == 10
    life.limit = 500
    assert len(claimed(life, 1)) == 500
    let_go(life, 0)
    assert claimed(life, 0) == [0], "it comes alone"
    let_go(life, 1)
    finish(life, 0)
    assert claimed(life, 0) == [1]


def test_what_hung_alone_runs_without_others():
    there = {0: range(2), 1: range(5)}
    world = World(random.Random(1), Order.NONE, there)
    life = Life(world, lanes=2, limit=10)
    life.fetch(0, 2)
    life.claim(0)
    let_go(life, 0)
    assert claimed(life, 0) == [0]
    let_go(life, 0)
    life.fetch(1, 5)
    life.shares[0].leaving = True
    assert claimed(life, 1) == [*range(5)]
    life.shares[0].leaving = False
    assert claimed(life, 0) == []
    finish(life, 1)
    assert claimed(life, 0) == [0]
    assert held(life) == [(0, 0, True, 2)]


def test_what_hung_is_marked_for_who_takes_over_though_it_is_no_suspect():
    world = World(random.Random(1), Order.NONE, {0: range(600)})
    life = Life(world, limit=500)
    life.fetch_all()
    life.claim(0)
    let_go(life, 0)
    assert len(claimed(life, 0)) == 32
    world.death(life)
    after = Life(world, limit=500)
    after.fetch_all()
    items = after.shares[0].items
    assert [item.suspect for item in items.values()] == [True] * 32 + [False] * 568
    assert [item.repeated for item in items.values()] == [True] * 500 + [False] * 100


# --- what stands between


def test_what_is_settled_makes_no_part_smaller():
    done = {offset for offset in range(REACH) if offset % 8}
    world = World(random.Random(1), Order.NONE, {0: range(0, REACH, 8)})
    world.told[0] = (0, as_text(Notes("t", REACH, 0, done), 0))
    work(Life(world, limit=REACH))
    assert world.claims == PARTS


def test_as_logged_no_suspect_passes_a_retry():
    world = World(random.Random(1), Order.AS_LOGGED, {0: range(64)})
    world.told[0] = (0, as_text(Notes("t", 64), 0))
    life = Life(world)
    life.fetch_all()
    assert claimed(life, 0) == [0, 1, 2, 3]
    part = life.shares[0]
    for offset in (0, 1, 3):
        apply(Release(0), part, part.items[offset], world.now)
    apply(Retry(0, 0.0, "no"), part, part.items[2], world.now)
    life.work[0] = None
    assert part.next_ready(world.now, {}) is None, "what comes before it is not settled"
    assert claimed(life, 0) == [0, 1]
    finish(life, 0)
    assert claimed(life, 0) == [2]
