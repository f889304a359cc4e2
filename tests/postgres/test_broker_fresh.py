"""The claim that is one statement: what it takes, and what it leaves to the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict

from duly.broker import Delivery, Span
from duly.brokers.postgres import PostgresBroker
from duly.guarantees import Done, Retry
from tests.postgres.brokers import (
    ahead_of,
    bodies,
    claim,
    drain,
    lane,
    message,
    opened,
    publish,
    topic,
)
from tests.postgres.proxy import Proxy
from tests.servers.postgres import Schema

T = topic()


def done(deliveries: Sequence[Delivery]) -> list[Done]:
    if isinstance(deliveries, Span):
        return [Done(deliveries.receipt, len(deliveries))]
    return [Done(delivery.receipt) for delivery in deliveries]


def test_a_batch_is_settled_and_the_next_claimed_in_four_turns(pg_schema: Schema):
    """Begin, settle, claim, commit; and a publish in one."""
    with Proxy(int(str(conninfo_to_dict(pg_schema.url)["port"]))) as proxy:
        broker = PostgresBroker(proxy.url(pg_schema.url), schema=pg_schema.duly)
        broker.declare([T])
        broker._bell.close()  # what it passes on is not counted here
        for _ in range(10):
            publish(broker, T, *"abcdefghij")
        before = proxy.turns
        publish(broker, T, "a")
        assert proxy.turns - before == 1
        sub = lane(broker, T, bodies_only=True)
        held = claim(sub, 10)
        turns = []
        for _ in range(8):
            ahead = ahead_of(sub, 10)
            before = proxy.turns
            assert list(sub.settle_and_claim(done(held), ahead)) == []
            turns.append(proxy.turns - before)
            held = ahead.deliveries()
            assert bodies(held) == list("abcdefghij")
        # What is prepared is prepared in a turn of its own.
        assert turns[0] == turns[-1] == 4
        broker.close()


def test_bodies_of_any_size_are_told_apart(pg_schema: Schema):
    with opened(pg_schema, T) as broker:
        sent = ["", "a" * 100_000, "", "bc", "é", "x" * 300]
        publish(broker, T, *sent)
        held = claim(lane(broker, T, bodies_only=True))
        assert isinstance(held, Span)
        assert [message(T, body).body for body in sent] == held.bodies


def test_it_takes_no_more_bytes_than_there_is_room_for(pg_schema: Schema):
    with opened(pg_schema, T) as broker:
        publish(broker, T, *("x" * 1_000 for _ in range(10)))
        sub = lane(broker, T, bodies_only=True)
        assert [len(sub.claim(10, 2_500, 0.0)) for _ in range(6)] == [2, 2, 2, 2, 2, 0]


def test_what_is_due_again_and_what_is_nobodys_is_not_starved(pg_schema: Schema):
    with opened(pg_schema, T) as broker:
        publish(broker, T, *(str(n) for n in range(40)))
        sub = lane(broker, T, bodies_only=True)
        first = claim(sub, 1)
        sub.settle([Retry(first[0].receipt, 0.0, "again")])
        seen: list[str] = []
        for _ in range(3):
            seen += bodies(some := claim(sub, 1))
            sub.settle(done(some))
        assert "0" in seen
        gone = lane(broker, T, bodies_only=True)
        freed = bodies(claim(gone, 5))
        gone.close()
        assert set(freed) <= set(drain(sub, 5))


def test_what_is_not_due_yet_waits(pg_schema: Schema):
    with opened(pg_schema, T) as broker:
        publish(broker, T, "later", due_ms=broker._clock.wall_ms() + 3_600_000)
        publish(broker, T, "now")
        assert drain(lane(broker, T, bodies_only=True)) == ["now"]


def test_of_several_sources_each_message_keeps_its_own(pg_schema: Schema):
    with opened(pg_schema, T) as broker:
        for source in ("one", "other"):
            broker.publish([T.message("a", source=source, id=f"{source}-a")])
        held = claim(lane(broker, T, bodies_only=True, identities=True))
        assert isinstance(held, Span)
        assert held.identities == ("t", ["one", "other"], ["one-a", "other-a"])


@pytest.mark.parametrize("bodies_only", [True, False])
def test_a_gap_in_the_log_is_passed_over(pg_schema: Schema, bodies_only: Any):
    with opened(pg_schema, T) as broker:
        publish(broker, T, *"abcde")
        broker._ticker.tick()
        with pg_schema.connect(autocommit=True) as direct:
            gone = f"delete from {pg_schema.duly}.messages where convert_from(body, 'UTF8') = 'c'"
            assert direct.execute(gone.encode()).rowcount == 1
        assert drain(lane(broker, T, bodies_only=bodies_only), 3) == list("abde")
