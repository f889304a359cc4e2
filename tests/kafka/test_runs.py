"""Records that are kept many at a time: which are, and what becomes of part of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import pytest
from confluent_kafka import Message
from hypothesis import given
from hypothesis import strategies as st

from duly.brokers.kafka.ending import Endings, RunEnding
from duly.brokers.kafka.fetched import Fetched
from duly.brokers.kafka.item import Item, item_of
from duly.brokers.kafka.notes import REACH, Known, Notes
from duly.brokers.kafka.runs import Claim, Run
from duly.brokers.kafka.share import Order, Share
from duly.brokers.kafka.soundness import Soundness
from duly.brokers.kafka.span import Part, RunSpan
from duly.guarantees import Done, Release
from duly.message import Topic

TOPIC: Topic[bytes] = Topic("t", bytes, guarantee="at-least-once")
NAMED: Topic[dict[str, str]] = Topic("t", dict, guarantee="at-least-once", dedup_by="order")
SHORTEST = Soundness().shortest
AGAIN = "duly.again.sub"

Headers = list[tuple[str, bytes | None]]


def headers(id: str, **more: bytes | None) -> Headers:
    """As duly writes them, with others behind."""
    own: Headers = [("duly", b"1"), ("ce_specversion", b"1.0"), ("ce_id", id.encode())]
    own += [("ce_source", b"shop"), ("ce_time", b"2026-11-29T10:00:00.000Z"), ("ce_type", b"t")]
    return [*own, *more.items()]


def record(
    offset: int,
    given: Headers | None = None,
    *,
    body: bytes | None = b"x",
    key: bytes | None = None,
    epoch: int = 3,
) -> Any:
    made: Any = Message
    found = headers(f"id-{offset}") if given is None else given
    return made(
        topic="t", partition=0, offset=offset, value=body, key=key,
        headers=found or None, timestamp=(1, 1000), leader_epoch=epoch,
    )  # fmt: skip


def records(offsets: Sequence[int]) -> list[Any]:
    return [record(offset) for offset in offsets]


def share(order: Order = Order.NONE, position: int = 0, notes: Notes | None = None) -> Share:
    return Share(("t", 0), "log", 1, order, position, notes or Notes())


def fetched() -> Fetched:
    found = Fetched(AGAIN, lambda: 0.0, lambda: 0, as_runs=True)
    found.declared = {"t": TOPIC}
    return found


def fed(share: Share, found: list[Any]) -> Share:
    reader = fetched()
    reader.put(share, reader.divide(found))
    return share


_tokens = count(1)


def claim(share: Share, limit: int = 1000, until: float = 30.0) -> tuple[int, list[Run]]:
    """Take runs as a lane does; with the token."""
    token, lined, taken = next(_tokens), dict[str, int](), list[Run]()
    while limit and (run := share.next_run(0.0, lined)) is not None:
        count = min(limit, share.within_reach(run))
        share.take_run(run, count, lined, Claim(token, 1, until))
        taken.append(run)
        limit -= count
    return token, taken


def take_items(share: Share, limit: int = 1000) -> list[int]:
    lined, taken = dict[str, int](), list[int]()
    while len(taken) < limit and (item := share.next_ready(0.0, lined)) is not None:
        share.take(item, lined)
        taken.append(item.offset)
    return taken


def offsets(runs: Sequence[Run]) -> list[int]:
    return [offset for run in runs for offset in run.offsets]


# --- which are sound

texts = st.one_of(
    st.text(max_size=8).map(str.encode),
    st.just(b""),
    st.just(b"\xff"),
    st.just(b"x" * 300),
    st.none(),
)
names = st.sampled_from(
    ["ce_id", "ce_source", "ce_type", "ce_time", "ce_tenant", "ce_Id", "ce_data", "ce_a-b", "trace"]
)
alike = st.lists(st.tuples(names, texts), max_size=5)


@st.composite
def batches(draw: st.DrawFn) -> list[Any]:
    """Most of a batch are alike, some are not."""
    common = draw(alike)
    found = []
    for offset in range(draw(st.integers(1, 40))):
        odd = draw(st.integers(0, 9))
        given = draw(alike) if odd == 0 else [*common]
        if odd > 2:
            given = [("ce_id", f"{offset}".encode()), *[h for h in given if h[0] != "ce_id"]]
        key = draw(st.one_of(st.none(), texts)) if odd == 1 else None
        found.append(record(offset, given, key=key))
    return found


@given(batches(), st.sampled_from([TOPIC, NAMED]))
def test_what_is_sound_among_many_is_sound_by_itself(found: list[Any], topic: Topic[Any]):
    """And is named alike; and everything is there, in order."""
    seen: list[int] = []
    for part in Soundness().divide(topic, found):
        seen += [each.offset() for each in (part.records if isinstance(part, Run) else part)]
        if isinstance(part, Run):
            some = Part.of(1, "log", part)
            for each, id, source in zip(part.whole(), some.ids(), some.sources(), strict=True):
                item = item_of(topic, each)
                assert item.wrong is None
                assert item.message is not None
                assert (item.message.id, item.message.source) == (id, source)
    assert seen == [each.offset() for each in found]


def test_what_duly_publishes_is_one_run():
    [run] = Soundness().divide(TOPIC, records(range(500)))
    assert isinstance(run, Run)
    assert (run.first, run.last, len(run), run.epoch) == (0, 499, 500, 3)
    assert run.offsets == range(500)


@pytest.mark.parametrize(
    "given",
    [
        [],
        [("ce_source", b"s")],
        [("ce_id", b"")],
        [("ce_id", b"\xff")],
        [("ce_id", None)],
        [("ce_id", b"a\nb")],
        [("ce_id", b"a" * 257)],
        headers("a", trace=b"\xff"),
        headers("a", ce_tenant=b"\x00"),
        headers("a", ce_tenant=b"x" * 20_000),
        [(f"ce_{number}", b"1") for number in range(70)],
    ],
)
def test_one_that_is_no_message_is_told_apart_from_those_around_it(given: Headers):
    found = records(range(64))
    found[30] = record(30, given)
    part = fed(share(), found)
    assert [offset for offset, item in part.items.items() if item.wrong is not None] == [30]
    assert len(part.items) < 2 * SHORTEST, "most are in runs"
    assert part.runs.count + len(part.items) == 64


def test_a_key_that_is_no_text_is_told_apart():
    found = [record(offset, key=b"k") for offset in range(32)]
    found[3] = record(3, key=b"\xff")
    part = fed(share(), found)
    assert [offset for offset, item in part.items.items() if item.wrong is not None] == [3]


def test_tombstones_have_an_empty_body():
    [run] = Soundness().divide(TOPIC, [record(offset, body=None) for offset in range(SHORTEST)])
    assert isinstance(run, Run)
    assert run.bodies == [b""] * SHORTEST


def test_epochs_are_never_mixed():
    found = [record(offset, epoch=1 if offset < 20 else 2) for offset in range(40)]
    runs = [part for part in Soundness().divide(TOPIC, found) if isinstance(part, Run)]
    for run in runs:
        assert {each.leader_epoch() for each in run.records} == {run.epoch}
    assert {run.epoch for run in runs} == {1, 2}


def test_what_others_name_by_a_header_is_looked_at_one_by_one():
    found = [record(o, [("ce_id", b"%d" % o), ("order", b"o")]) for o in range(SHORTEST)]
    assert [isinstance(part, Run) for part in Soundness().divide(NAMED, found)] == [False]


# --- where they may be kept so


def test_what_something_is_known_of_is_kept_one_by_one():
    notes = Notes(suspects=3, repeated=5, done={6}, known={9: Known(1)})
    part = fed(share(notes=notes), records(range(16)))
    assert part.runs.count == 0
    assert part.position == 0
    fed(part, records(range(16, 32)))
    assert part.runs.count == 16


def test_what_was_fetched_before_is_passed_over():
    part = fed(share(), records(range(16)))
    fed(part, records(range(8, 40)))
    assert part.count == 40
    assert offsets(claim(part)[1]) == list(range(16))


def test_gaps_are_stepped_over():
    """Of compaction, of transactions."""
    there = [*range(0, 40, 3), *range(50, 60)]
    part = fed(share(), records(there))
    token, [run] = claim(part)
    assert [*run.offsets] == there
    [some] = part.runs.holding(token, run.offsets[:5])
    assert [*some.offsets] == there[:5]
    part.done_run(some)
    assert part.position == there[5]
    part.done_run(next(iter(part.runs.claimed.values())))
    assert part.position == 60


def test_nothing_is_claimed_further_ahead_than_can_be_noted():
    part = fed(share(), records(range(REACH + 100)))
    _, [first] = claim(part, 10)
    _, rest = claim(part, 2 * REACH)
    assert offsets(rest) == list(range(10, REACH))
    part.done_run(first)
    assert offsets(claim(part, 2 * REACH)[1]) == list(range(REACH, REACH + 10))


def test_as_logged_nothing_is_claimed_beside_anything():
    part = fed(share(Order.AS_LOGGED), records(range(40)))
    token, _ = claim(part, 10)
    assert claim(part)[1] == []
    [half] = part.runs.holding(token, range(5))
    part.done_run(half)
    assert claim(part)[1] == []
    assert take_items(part) == []
    part.back_run(next(iter(part.runs.claimed.values())))
    assert offsets(claim(part, 10)[1]) == list(range(5, 15))


def test_as_logged_an_item_in_front_comes_first():
    part = fed(share(Order.AS_LOGGED), [*records(range(3))])
    fed(part, records(range(3, 30)))
    assert claim(part)[1] == []
    assert take_items(part, 2) == [0, 1]
    for offset in (0, 1):
        part.done(part.items[offset])
    assert claim(part)[1] == []
    assert take_items(part) == [2], "and nothing out of its place"
    part.done(part.items[2])
    assert offsets(claim(part)[1]) == list(range(3, 30))


def test_one_of_a_run_goes_its_own_way():
    """The rest stays as it was, and what is settled behind it is noted."""
    part = fed(share(), records(range(30)))
    token, _ = claim(part)
    [one] = part.runs.holding(token, (10,))
    part.open(one)
    item = part.items[10]
    assert (item.token, part.claimed) == (token, {10: item})
    for left in part.runs.holding(token, range(30)):
        part.done_run(left)
    assert part.position == 10
    assert part.notes(0, 0.0).done == set(range(11, 30))
    item.charged += 1
    part.note(item)
    part.wait(item, due=5.0)
    assert part.notes(0, 0.0).known == {10: Known(1, False, 5000)}
    assert take_items(part) == []
    part.done(item)
    assert part.position == 30


def test_a_lease_that_ends_makes_each_of_them_suspect():
    part = fed(share(), records(range(20)))
    _, [run] = claim(part, until=10.0)
    assert not run.is_late(9.0)
    assert run.is_late(10.0)
    part.reap(10.0)
    assert (part.runs.count, part.runs.held, part.position) == (0, 0, 0)
    assert take_items(part) == []
    first = part.suspect({})
    assert first is not None
    assert (first.offset, first.repeated) == (0, True)


def test_after_a_death_each_of_them_is_suspect():
    before = fed(share(), records(range(20)))
    claim(before, 15)
    notes = before.notes(0, 0.0)
    after = fed(share(notes=notes), records(range(20)))
    first = after.suspect({})
    assert first is not None
    assert (first.offset, first.repeated) == (0, True)
    assert take_items(after) == [], "nothing new starts beside them"
    for item in [item for item in after.items.values() if item.suspect]:
        after.done(item)
    assert take_items(after) == list(range(15, 20)), "what nobody had is as if new"


def test_no_run_is_claimed_beside_suspects():
    part = fed(share(notes=Notes(suspects=15)), records(range(15)))
    fed(part, records(range(15, 60)))
    assert part.runs.count == 45
    assert claim(part)[1] == []
    for offset in range(15):
        part.done(part.items[offset])
    assert offsets(claim(part)[1]) == list(range(15, 60))


def test_what_is_handed_over_is_marked():
    before = fed(share(), records(range(20)))
    _, [run] = claim(before, 15)
    before.back_run(run, started=True)
    notes = before.notes(0, 0.0, leaving=True)
    after = fed(share(notes=notes), records(range(20)))
    assert after.suspect({}) is None
    assert take_items(after) == list(range(20))
    assert [after.items[offset].repeated for offset in range(20)] == [True] * 15 + [False] * 5


def test_what_the_next_claim_takes_is_announced():
    part = fed(share(), records(range(40)))
    _, [run] = claim(part, 10)
    part.foresee(12)
    assert part.announced.end == 22
    part.done_run(run)
    part.foresee(5)
    assert part.announced.end == 15


def test_far_from_the_end_of_the_log_more_is_announced_than_is_there():
    """It comes, and is spared a commit; near its end nothing is announced that is not there."""
    part = fed(share(), records(range(2000)))
    while offsets(claimed := claim(part)[1])[-1:] != [1999]:
        for run in claimed:
            part.done_run(run)
    part.foresee(300)
    assert part.announced.end == 2300
    part.reached(2000)
    part.foresee(300)
    assert part.announced.end == 2000


@pytest.mark.parametrize("order", [Order.NONE, Order.AS_LOGGED])
@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_each_is_settled_once_and_the_position_is_true(seed: int, order: Order):
    play = Play(random.Random(seed), share(order))
    for _ in range(400):
        play.something()
        play.check()
    play.end()
    assert play.settled == play.fetched
    if order is Order.AS_LOGGED:
        assert play.settled_in_order == sorted(play.settled_in_order)


class Play:
    """A partition and what lanes do with it, by chance; beside it what should be true."""

    def __init__(self, roll: random.Random, part: Share) -> None:
        self._roll = roll
        self._part = part
        self._reader = fetched()
        self._next = 0
        self._now = 0.0
        self._claims: list[tuple[int, list[int]]] = []
        self.fetched: set[int] = set()
        self.settled: set[int] = set()
        self.settled_in_order: list[int] = []

    def something(self) -> None:
        self._roll.choice([self._fetch, self._claim, self._claim, self._end, self._end])()

    def _fetch(self) -> None:
        if self._part.count > 200:
            return
        found = []
        for _ in range(self._roll.randint(1, 60)):
            self._next += self._roll.choice([1, 1, 1, 1, 2])
            odd = self._roll.random() < 0.02
            found.append(record(self._next, [("ce_id", b"odd"), ("a", b"b")] if odd else None))
        self._reader.put(self._part, self._reader.divide(found))
        self.fetched |= {each.offset() for each in found}

    def _claim(self) -> None:
        part, limit = self._part, self._roll.randint(1, 50)
        if (item := part.suspect({})) is not None:
            part.take(item, {})
            item.token, item.until = next(_tokens), 30.0
            self._claims.append((item.token, [item.offset]))
            return
        token, runs = claim(part, limit)
        if runs:
            self._claims.append((token, offsets(runs)))
            return
        taken = take_items(part, limit)
        for offset in taken:
            part.items[offset].token, part.items[offset].until = token, 30.0
        if taken:
            self._claims.append((token, taken))

    def _end(self) -> None:
        if not self._claims:
            return
        token, held = self._claims.pop(self._roll.randrange(len(self._claims)))
        stop = self._roll.randint(0, len(held))
        if self._part.order is Order.AS_LOGGED or self._roll.random() < 0.7:
            done, rest = held[:stop], held[stop:]
        else:
            done = [offset for offset in held if self._roll.random() < 0.5]
            rest = [offset for offset in held if offset not in set(done)]
        self._settle(token, done)
        self._give_back(token, rest)

    def _settle(self, token: int, done: list[int]) -> None:
        for run in self._runs(token, done):
            self._part.done_run(run)
        for item in self._items(token, done):
            self._part.done(item)
        self.settled |= set(done)
        self.settled_in_order += done

    def _give_back(self, token: int, rest: list[int]) -> None:
        how = self._roll.choice(["back", "started", "late", "retry"])
        for run in self._runs(token, rest):
            if how in {"late", "retry"}:
                run.until = 0.0
            else:
                self._part.back_run(run, started=how == "started")
        for item in self._items(token, rest):
            if how == "retry":
                self._part.wait(item, 0.0)
            elif how == "late":
                item.until = 0.0
            else:
                self._part.back(item)
        self._part.reap(0.0)

    def _runs(self, token: int, held: list[int]) -> Iterator[Run]:
        """As a span's receipt has them: stretches without a gap in what is meant."""
        for some in _stretches(held, self.fetched):
            yield from self._part.runs.holding(token, some)

    def _items(self, token: int, held: list[int]) -> list[Item]:
        found = [self._part.items.get(offset) for offset in held]
        return [item for item in found if item is not None and item.token == token]

    def check(self) -> None:
        part = self._part
        open_ = sorted(self.fetched - self.settled)
        assert part.position == (open_[0] if open_ else part.next)
        notes = part.notes(0, 0.0)
        assert notes.done == {offset for offset in self.settled if offset >= part.position}
        held = [offset for _, some in self._claims for offset in some]
        assert len(held) == len(set(held)), "nothing is claimed twice"
        assert all(map(notes.extent.covers, held)), "who has it next is told who had it"
        assert part.count == len(open_)
        assert part.size == len(open_)
        assert part.is_held == bool(held)
        if part.order is Order.AS_LOGGED:
            assert len(self._claims) <= 1

    def end(self) -> None:
        while self._claims:
            token, held = self._claims.pop()
            self._settle(token, held)
        while self.settled != self.fetched:
            self._claim()
            if not self._claims:
                self._claim()  # what came due may be a suspect, which is claimed next
            assert self._claims, "something is stuck"
            self._settle(*self._claims.pop())
            self.check()


def _stretches(held: list[int], there: set[int]) -> Iterator[list[int]]:
    some: list[int] = []
    for offset in sorted(held):
        between = range(some[-1] + 1, offset) if some else ()
        if any(each in there for each in between):
            yield some
            some = []
        some.append(offset)
    if some:
        yield some


# --- as a worker sees them


def span(count: int) -> RunSpan:
    """Two runs, with a gap between."""
    runs = [
        run
        for first in (0, count + 5)
        for run in Soundness().divide(TOPIC, records(range(first, first + count)))
        if isinstance(run, Run)
    ]
    parts = [Part.of(7, "log", run) for run in runs]
    bodies = [body for run in runs for body in run.bodies]
    return RunSpan(1, 99, parts, bodies, False)


def test_a_span_is_its_deliveries():
    some = span(10)
    assert len(some) == 20
    assert [d.message_id for d in some] == [f"id-{o}" for o in (*range(10), *range(15, 25))]
    assert [d.receipt for d in some] == some.receipt.each()
    for index in (0, 9, 10, 19, -1):
        assert some[index] == [*some][index]
        message = some[index].message
        assert (message.id, message.time_ms) == (some[index].message_id, 1_795_946_400_000)
    with pytest.raises(IndexError):
        some[20]


@pytest.mark.parametrize(("start", "stop"), [(0, 20), (0, 5), (5, 15), (10, 20), (3, 3), (19, 20)])
def test_a_slice_of_a_span_is_a_span(start: int, stop: int):
    some = span(10)
    part = some[start:stop]
    assert [d.message for d in part] == [d.message for d in [*some][start:stop]]
    assert part.receipt.each() == [d.receipt for d in [*some][start:stop]]
    if part:
        assert part.identities[2] == [d.message_id for d in part]
    assert [o for each in part.stretches for o in each.offsets] == [
        d.position.offset for d in part if d.position is not None
    ]
    with pytest.raises(ValueError, match="no gaps"):
        some[::2]


# --- in a transaction


@pytest.mark.parametrize("seed", range(20))
def test_what_is_foretold_of_runs_is_what_there_is_afterwards(seed: int):
    """Position and notes are committed before the claims have ended in the share."""
    chance = random.Random(seed)
    mine = fed(share(Order.AS_LOGGED), records([o for o in range(120) if o not in (40, 41)]))
    while (claimed := claim(mine, 30))[1]:
        _, runs = claimed
        limit = runs[0].first + chance.randrange(31)
        some = [run for run in runs if run.last < limit]
        for run in [run for run in runs if run.first < limit <= run.last]:
            some += mine.runs.holding(run.token, range(run.first, limit))  # part of it ends
        given_back = Release(0, started=chance.random() < 0.5)
        kept = [run for run in mine.runs.claimed.values() if run not in some]
        ended = Endings(mine)
        endings = [RunEnding(Done(0), mine, run, run.offsets, run.token) for run in some]
        endings += [RunEnding(given_back, mine, run, run.offsets, run.token) for run in kept]
        for each in endings:
            assert each.is_held
            ended.add(each, 0)
        told = mine.foretell(
            ended.known, ended.ahead, 0, 0.0, done=ended.done, begun=ended.begun
        )  # fmt: skip
        for each in endings:
            each.apply(0.0)
            assert not each.is_held
        mine.announced = told.announced
        after = mine.notes(0, 0.0)
        assert told.position == mine.position
        assert (told.notes.done, told.notes.repeated) == (after.done, after.repeated)
        taken = offsets(claim(mine, 30 if kept else 2 * ended.count)[1])
        assert not taken or told.notes.suspects > taken[-1], "the next claim is announced"
        for run in [*mine.runs.claimed.values()]:
            mine.back_run(run)
    assert mine.position == 120


def test_what_is_kept_one_by_one_is_announced_too():
    """Not what is far behind it: after a death each of those would come alone."""
    mine = fed(share(), records(range(3000)))
    _, [run] = claim(mine)
    mine.back_run(run)
    mine.open(run)
    mine.foresee(25)
    assert mine.announced.end == 25


def test_a_part_that_was_cut_off_is_not_held_as_it_was():
    mine = fed(share(Order.AS_LOGGED), records(range(20)))
    token, [run] = claim(mine, 20)
    ending = RunEnding(Done(0), mine, run, run.offsets, token)
    assert ending.is_held
    mine.runs.holding(token, (7,))
    assert not ending.is_held
