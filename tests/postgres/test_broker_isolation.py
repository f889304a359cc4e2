"""Broker and store in one database: what happens inside a transaction that handlers share."""

from __future__ import annotations

from typing import Any

import pytest

from duly.guarantees import Admission, Done
from duly.store import Scope
from duly.stores.postgres import PostgresStore
from tests.postgres.brokers import ahead_of, bodies, claim, lane, opened, publish, topic
from tests.servers.postgres import Schema

T = topic()


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_a_claim_made_ahead_does_not_go_by_an_old_snapshot(pg_schema: Schema, isolation: Any):
    """Between the beginning of a transaction and its claim another lane has claimed."""
    with opened(pg_schema, T) as broker:
        store = PostgresStore(
            pg_schema.url,
            schema=pg_schema.duly,
            broker_database=broker.capabilities.database,
            log=broker.log,
            isolation=isolation,
        )
        publish(broker, T, *map(str, range(12)))
        here, there = lane(broker, T), lane(broker, T)
        held = claim(here, limit=3)
        session = store.begin(Scope("sub", Admission.BY_CLAIM))
        session.admit(held)
        other = claim(there, limit=2)
        session.settle([Done(delivery.receipt) for delivery in held], held)
        ahead = ahead_of(here, 3)
        session.claim(ahead)
        session.commit()
        mine = [*bodies(held), *bodies(ahead.deliveries()), *bodies(claim(here, limit=100))]
        assert sorted(mine + bodies(other), key=int) == [str(number) for number in range(12)]
        store.close()
