"""What a death costs on a real node, and whom it is charged to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from duly.broker import SubscribeOptions
from duly.brokers.kafka import KafkaBroker
from duly.brokers.kafka.commits import Commits
from duly.brokers.kafka.suspects import PARTS
from duly.brokers.kafka.transactions import TransactionalProducer
from duly.guarantees import Dead, Done, Guarantee
from duly.inspection import Selection
from duly.message import Topic
from tests.kafka.copier import copier
from tests.kafka.copying import HASTY, Process, publish, read
from tests.kafka.work import A_LOT, broker_at
from tests.waiting import eventually

ONE: Topic[str] = Topic("one", str, guarantee="at-least-once", partitions=1)
COUNT = 2000
POISON = "1234"
ATTEMPTS = 3


@pytest.fixture(params=["at-least-once", "exactly-once"])
def guarantee(request: pytest.FixtureRequest) -> Guarantee:
    """Positions are committed by themselves, or by Kafka's transactions."""
    return Guarantee(request.param)


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often positions, or transactions, are committed."""
    counted: Counter[str] = Counter()

    def counting(of: type[Any], name: str) -> None:
        original = getattr(of, name)

        def call(*given: Any) -> Any:
            counted["commits"] += 1
            return original(*given)

        monkeypatch.setattr(of, name, call)

    counting(TransactionalProducer, "commit")
    counting(Commits, "answered")
    return counted


@contextmanager
def process(url: str, guarantee: Guarantee) -> Iterator[Any]:
    """A lane of a process, which is gone in the end without a word."""
    with broker_at(url, ONE) as broker:
        if guarantee is Guarantee.EXACTLY_ONCE:
            broker.own_store()
        yield broker.subscribe([ONE], "sub", SubscribeOptions(guarantee, lease_s=600.0))
        broker.abandon()


def fill(url: str, guarantee: Guarantee) -> None:
    """A process claims all there is, and dies."""
    with broker_at(url, ONE) as broker:
        texts = [str(number) for number in range(COUNT)]
        broker.publish([ONE.message(t, id=t, key=t, source="tests") for t in texts])
    with process(url, guarantee) as lane:
        # A claim of some, given back while others come, would announce more than there is.
        eventually(lambda: lane.intake._ready() == COUNT, "all are fetched")
        assert len(lane.claim(COUNT, A_LOT, 30.0)) == COUNT


def test_a_death_of_something_else_costs_few_transactions(
    kafka_url: str, guarantee: Guarantee, commits: Counter[str]
):
    fill(kafka_url, guarantee)
    commits.clear()
    seen: Counter[str] = Counter()
    claims = 0
    with process(kafka_url, guarantee) as lane:
        while len(seen) < COUNT:
            claimed = lane.claim(COUNT, A_LOT, 30.0)
            assert all(each.repeated and each.attempt == 1 for each in claimed)
            seen.update(each.message_id for each in claimed)
            assert list(lane.settle([Done(each.receipt) for each in claimed])) == []
            claims += 1
    assert set(seen.values()) == {1}
    # What is not fetched yet as its part begins is claimed by itself.
    assert claims <= PARTS + 8
    assert commits["commits"] <= claims + 4


def test_a_killer_is_found_alone_and_nobody_else_is_charged(
    kafka_url: str, guarantee: Guarantee, commits: Counter[str]
):
    fill(kafka_url, guarantee)
    died_with: list[int] = []
    attempts: list[int] = []
    seen: Counter[str] = Counter()
    while len(seen) < COUNT:
        with process(kafka_url, guarantee) as lane:
            commits.clear()
            while len(seen) < COUNT:
                claimed = lane.claim(COUNT, A_LOT, 30.0)
                assert all(each.repeated for each in claimed)
                mates = [each for each in claimed if each.message_id != POISON]
                assert all(each.attempt == 1 for each in mates)
                if len(mates) < len(claimed):
                    [poison] = [each for each in claimed if each not in mates]
                    if poison.attempt <= ATTEMPTS:
                        died_with.append(len(claimed))
                        attempts.append(poison.attempt)
                        break
                    assert list(lane.settle([Dead(poison.receipt, "it kills")])) == []
                else:
                    assert list(lane.settle([Done(each.receipt) for each in claimed])) == []
                seen.update(each.message_id for each in claimed)
        assert commits["commits"] <= 4 * PARTS
    assert set(seen.values()) == {1}
    assert died_with[0] <= COUNT // PARTS + 1
    assert died_with[-ATTEMPTS - 1 :] == [died_with[-ATTEMPTS - 1], *[1] * ATTEMPTS]
    assert len(died_with) <= 2 + ATTEMPTS
    assert attempts[-ATTEMPTS:] == [1, 2, 3]


@pytest.mark.long
def test_a_message_that_kills_each_process_is_a_dead_letter_and_the_others_are_copied(
    kafka_url: str, tmp_path: Path
):
    """From Kafka to Kafka, by processes that are killed in the middle of a batch."""
    broker = kafka_url + HASTY
    publish(broker, COUNT)
    deaths = 0

    def all_are_copied() -> bool:
        return len(read(broker)) >= COUNT - 1

    while deaths < 20:
        with Process(broker, tmp_path, COPIER_KILLS=f"{POISON}:{ATTEMPTS}:{COUNT}") as worker:
            eventually(
                lambda: worker.ended or letters(broker), "it dies, or gives up", timeout_s=60
            )
            if not worker.ended:
                eventually(all_are_copied, "the others are copied", timeout_s=60)
                break
            deaths += 1
    assert deaths <= 3 + ATTEMPTS
    assert sorted(int(each.body) for each in read(broker)) == [
        number for number in range(COUNT) if str(number) != POISON
    ]
    assert letters(broker) == [POISON]


def letters(broker: str) -> list[str]:
    with copier(broker) as app:
        found, _ = app.backends()
        assert isinstance(found, KafkaBroker)
        return [each.message.id for each in found._graveyard.select(Selection("copy"), 10)]
