"""Headers whose names are no UTF-8, which the driver cannot show: a dead letter like anything else
that is no message, and nobody ends of it.
"""

from __future__ import annotations

import pytest

import duly
from duly.broker import SubscribeOptions
from duly.guarantees import Dead, Guarantee, Retry
from duly.inspection import Selection
from tests.kafka.foreign import produce
from tests.kafka.work import awaited, broker_at, host_of, namespace_of, work_off
from tests.waiting import eventually

ONE = duly.Topic("one", str, guarantee="at-least-once", partitions=1)
NAME = b"bad\xff\xfe"


@pytest.mark.parametrize("bodies_only", [True, False])
@pytest.mark.parametrize("around", [1, 20])
def test_a_record_with_a_name_that_cannot_be_shown_is_a_dead_letter(
    kafka_url: str, around: int, bodies_only: bool
):
    """Also among so many others that they are kept together."""
    topic = f"{namespace_of(kafka_url)}.{ONE.name}"
    names = [str(number) for number in range(2 * around)]
    with broker_at(kafka_url, ONE) as broker:
        broker.publish([ONE.message(name, source="tests") for name in names[:around]])
        for body in (b"first", b"second"):
            produce(host_of(kafka_url), topic, body, [(b"ce_id", b"7"), (NAME, b"x")])
        broker.publish([ONE.message(name, source="tests") for name in names[around:]])
        options = SubscribeOptions(Guarantee.AT_LEAST_ONCE, bodies_only=bodies_only)
        lane = broker.subscribe([ONE], "sub", options)
        assert work_off(lane, set(names).issubset) == names

        def dead() -> list[bytes]:
            lane.claim(10, 1 << 20, 0.1)
            letters = broker.graveyard.select(Selection(), 10)
            assert all("name is no UTF-8" in letter.error for letter in letters)
            return sorted(letter.message.body for letter in letters)

        eventually(lambda: dead() == [b"first", b"second"], "both are dead letters")


def test_among_dead_letters_it_hides_no_other(kafka_url: str):
    with broker_at(kafka_url, ONE) as broker:
        lane = broker.subscribe([ONE], "sub", SubscribeOptions(Guarantee.AT_LEAST_ONCE))
        broker.publish([ONE.message("a", source="tests")])
        [held] = awaited(lane)
        lane.settle([Dead(held.receipt, "no")])
        dead = f"{namespace_of(kafka_url)}.duly.dead"
        produce(host_of(kafka_url), dead, b"what", [(NAME, b"x")])
        for _ in range(2):  # what was read before is looked at again
            letters = broker.graveyard.select(Selection(), 10)
            assert sorted(letter.message.body for letter in letters) == [b"a", b"what"]


def test_where_retries_wait_it_ends_nobody(kafka_url: str):
    with broker_at(kafka_url, ONE) as broker:
        lane = broker.subscribe([ONE], "sub", SubscribeOptions(Guarantee.AT_LEAST_ONCE))
        broker.publish([ONE.message("a", source="tests")])
        [held] = awaited(lane)
        lane.settle([Retry(held.receipt, 0.0, "once more")])
        again = f"{namespace_of(kafka_url)}.duly.again.sub"
        produce(host_of(kafka_url), again, b"what", [(NAME, b"x")])
        broker.publish([ONE.message("b", source="tests")])
        assert set(work_off(lane, {"a", "b"}.issubset)) == {"a", "b"}
