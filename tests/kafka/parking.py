"""``python -m tests.kafka.parking FOLDER BROKER STORE``: a worker whose handlers fail, and kill it.

Until the file ``fixed`` is there orders that begin with "bad" fail; where ``deadly`` is, those that
are called "bad killer" end their process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import duly
from duly.worker import Worker

ORDERS: duly.Topic[str] = duly.Topic("orders", str, guarantee="at-least-once", partitions=1)
RETRY = duly.RetryPolicy(attempts=1000, first_s=0.2, factor=1.0, longest_s=0.2, jitter=0.0)
LEASE_S = 2.0


def shop_at(folder: Path, broker: str, store: str, **options: Any) -> duly.App:
    """The application, with its effects in a table ``charges``."""
    app = duly.App("shop", broker=broker, store=store)
    insert = f"insert into charges values ({'?' if store.startswith('sqlite') else '%s'})"
    more = {"retry": RETRY, "lease_s": LEASE_S, "batch": 20, **options}

    @app.consumer(ORDERS, name="billing", guarantee="exactly-once", **more)
    def charge(order: str, tx: duly.Transaction[Any]) -> None:
        tx.connection.execute(insert, (order,))
        with (folder / "ran").open("a") as ran:
            ran.write(f"{os.getpid()} {order}\n")
        if order == "bad killer" and (folder / "deadly").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if order.startswith("bad") and not (folder / "fixed").exists():
            raise ValueError("not yet")

    return app


def main(folder: str, broker: str, store: str) -> None:
    """Work until told to end."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with shop_at(Path(folder), broker, store) as app, Worker(app):
        sys.stdout.write("works\n")
        sys.stdout.flush()
        ended.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
