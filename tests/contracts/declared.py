"""Brokers, stores and consumers as values, for contracts: nothing here runs."""

from __future__ import annotations

from typing import Any

from duly import Topic
from duly.broker import Capabilities
from duly.consumer import Consumer, Handler, Options
from duly.contract import Contract, Run, contract_of
from duly.guarantees import Guarantee
from duly.store import StoreCapabilities

SQL = Capabilities("SQL", database="file:1", one_writer=True)
LOG = Capabilities("a log", is_log=True, identity_retention=False)
QUEUE = Capabilities("a queue", identity_retention=False, orders_by_key=False, holds_keys=False)
IN_MEMORY = Capabilities("memory", database="memory:1", durable=False)

SAME_FILE = StoreCapabilities("SQL", database="file:1", one_writer=True)
OTHER_FILE = StoreCapabilities("other SQL", database="file:2", one_writer=True, outbox=True)
NO_ROWS = StoreCapabilities(
    "Its own transactions", database="log:1", effects=False, limits=("seen when they commit",)
)
TRANSACTING = Capabilities("a log", database="log:1", is_log=True, identity_retention=False)
NO_OUTBOX = StoreCapabilities("plain SQL", database="file:3")


def topic(guarantee: Any = "exactly-once", name: str = "orders", **options: Any) -> Topic[Any]:
    return Topic(name, dict, guarantee=guarantee, **options)


def consumer(
    guarantee: Any = "exactly-once",
    *topics: Topic[Any],
    name: str = "billing",
    is_async: bool = False,
    is_batch: bool = False,
    connection: Any = None,
    **options: Any,
) -> Consumer:
    promise = Guarantee(guarantee)
    handler = Handler(
        function=lambda *_: None,
        is_async=is_async,
        is_batch=is_batch,
        wants_message=False,
        wants_tx=promise is Guarantee.EXACTLY_ONCE,
        uses={},
        connection=connection,
    )
    return Consumer(name, topics or (topic(),), promise, handler, Options(**options))


def contract(
    *consumers: Consumer,
    broker: Capabilities = SQL,
    store: StoreCapabilities | None = SAME_FILE,
    topics: tuple[Topic[Any], ...] = (),
    **run: Any,
) -> Contract:
    return contract_of(broker, store, topics, consumers, Run(**run))
