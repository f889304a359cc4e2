"""Handlers' transactions that see the past, beside claims, which go by the present."""

from __future__ import annotations

import pytest

from duly.guarantees import Admission, Done, Guarantee
from duly.sql.postgres.transactions import Isolation
from duly.store import Scope
from duly.stores.postgres import PostgresStore
from tests.postgres.brokers import claim, drain, lane, opened, publish, topic
from tests.servers.postgres import Schema

T = topic("t", "exactly-once")


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_nothing_is_claimed_twice(pg_schema: Schema, isolation: Isolation):
    """What another lane has claimed since the transaction began is not claimed ahead by it."""
    with opened(pg_schema, T) as broker:
        store = PostgresStore(
            pg_schema.url,
            schema=pg_schema.duly,
            isolation=isolation,
            broker_database=broker.capabilities.database,
            log=broker.log,
        )
        for n in range(9):
            publish(broker, T, str(n))
        once = {"guarantee": Guarantee.EXACTLY_ONCE}
        first, second = lane(broker, T, **once), lane(broker, T, **once)
        held = claim(first, 3)
        ahead = first.ahead(2, 1 << 30)
        assert ahead is not None
        session = store.begin(Scope("sub", Admission.BY_CLAIM))
        session.admit(held)
        others = claim(second, 3)
        session.settle([Done(each.receipt) for each in held], held)
        session.claim(ahead)
        session.commit()
        claimed = [each.message_id for each in (*held, *others, *ahead.deliveries())]
        assert len(claimed) == len(set(claimed))
        second.settle([Done(each.receipt) for each in others])
        first.close()
        assert len(drain(second)) == 3
        store.close()
