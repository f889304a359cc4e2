"""``python -m tests.kafka.charging BROKER STORE LANES KEY_LANES``: until it is told to end, orders
of one partition are charged in a PostgreSQL database, several at a time.
"""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

import duly
from duly.worker import Worker

ORDERS: duly.Topic[int] = duly.Topic("orders", int, guarantee="at-least-once", partitions=1)
KEYS = 20
CREATE = "create table charges (at bigserial primary key, id bigint, key text)"
CHARGE = "insert into charges (id, key) values (%s, %s)"


def shop(broker: str, store: str, **options: Any) -> duly.App:
    """The application."""
    app = duly.App("shop", broker=broker, store=store)

    @app.consumer(ORDERS, name="billing", guarantee="exactly-once", **options)
    def charge(order: duly.Message[int], tx: duly.Transaction[Any]) -> None:
        tx.connection.execute(CHARGE, (order.payload, order.key))

    return app


def main(broker: str, store: str, lanes: str, key_lanes: str) -> None:
    """Work until SIGTERM."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    app = shop(broker, store, batch=10, lanes=int(lanes), key_lanes=int(key_lanes))
    with app, Worker(app):
        sys.stdout.write("works\n")
        sys.stdout.flush()
        ended.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
