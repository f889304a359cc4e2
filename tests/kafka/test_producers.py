"""Which transactional ids a process has, and which of another's are ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from duly.brokers.kafka import producers as producers_module
from duly.brokers.kafka.address import address_of
from duly.brokers.kafka.producers import Producers
from duly.errors import BrokerUnavailable


class Played:
    """A producer that does nothing, and tells which ids positions were ended under."""

    ended: list[str]
    untold: set[str]

    def __init__(self, _: Any, id: str) -> None:
        self.id = id
        self.is_clean = True

    def prepare(self) -> None: ...

    def end_standing(self, _: Any) -> None:
        if self.id in self.untold:
            raise BrokerUnavailable("a partition has no leader")
        self.ended.append(self.id)

    def end_positions(self, _places: Sequence[Any], _group: bytes) -> None:
        self.ended.append(self.id)

    def abort(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def producers(monkeypatch: pytest.MonkeyPatch) -> Producers:
    monkeypatch.setattr(Played, "ended", [], raising=False)
    monkeypatch.setattr(Played, "untold", set(), raising=False)
    monkeypatch.setattr(producers_module, "TransactionalProducer", Played)
    return Producers(address_of("kafka://here", ""), "ids", lambda _: {})


def test_a_position_names_the_id_of_the_transaction_that_commits_it(producers: Producers):
    """Also behind one that was not committed, after which another id is taken."""
    for is_clean in (True, False, False, True, True):
        named = producers.owner
        one = producers.take()
        assert one.id == f"ids-{named.replace('/', '-')}"
        one.is_clean = is_clean
        producers.give_back(one)


@pytest.mark.parametrize(
    ("turn", "first", "last"), [(0, 5, 36), (1, 37, 52), (3, 69, 84), (4, 5, 36)]
)
def test_of_positions_that_stay_open_other_ids_are_tried_each_time(
    producers: Producers, turn: int, first: int, last: int
):
    """What failed since the last position was committed left ids that no position names."""
    owners = ["dead/20", "dead/3", producers.owner]
    assert producers.end_standing_positions(owners, [], b"", turn, lambda: True)
    assert Played.ended == [f"ids-dead-{number}" for number in range(first, last + 1)]


def test_who_is_to_stop_tries_no_further_id(producers: Producers):
    assert not producers.end_standing_positions(
        ["dead/20"], [], b"", 0, lambda: len(Played.ended) < 3
    )
    assert len(Played.ended) == 3


def failed(producers: Producers) -> str:
    """Take one whose transaction is not committed; its id."""
    one = producers.take()
    one.is_clean = False
    producers.give_back(one)
    return one.id


def test_what_a_partition_without_a_leader_hides_holds_up_no_other_transaction(
    producers: Producers,
):
    """Nobody tells whether something is open there. That is asked again."""
    hidden = failed(producers)
    Played.untold.add(hidden)
    assert producers.take().id != hidden
    producers.end_standing()
    assert Played.ended == []
    Played.untold.clear()
    producers.end_standing()
    producers.end_standing()
    assert Played.ended == [hidden]


def test_no_more_producers_are_kept_for_what_nobody_tells_than_a_few(producers: Producers):
    for _ in range(4):
        Played.untold.add(failed(producers))
    Played.untold.add(failed(producers))
    with pytest.raises(BrokerUnavailable):
        producers.take()
    Played.untold.clear()
    producers.end_standing()
    producers.take()
    assert len(Played.ended) == 5


def test_of_its_own_ids_those_are_tried_whose_last_transaction_was_not_committed(
    producers: Producers,
):
    """Its positions may be what Kafka has forgotten, though it lives."""
    over = failed(producers)
    clean, late = producers.take(), producers.take()
    late.is_clean = False
    producers.give_back(clean)
    producers.give_back(late)
    Played.ended.clear()
    assert producers.end_standing_positions([producers.owner], [], b"", 0, lambda: True)
    assert Played.ended == [late.id, over]
    assert not producers.end_standing_positions([producers.owner], [], b"", 0, lambda: False)
    assert {producers.take().id, producers.take().id} == {clean.id, "ids-" + next_id(producers)}


def next_id(producers: Producers) -> str:
    process, _, count = producers.owner.partition("/")
    return f"{process}-{int(count) - 1}"
