"""What cannot be kept is refused, each with its reason and its remedy."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Callable

import pytest

from duly.contract import Contract
from duly.errors import ContractRefused
from tests.contracts.declared import (
    IN_MEMORY,
    LOG,
    NO_ROWS,
    OTHER_FILE,
    QUEUE,
    SQL,
    TRANSACTING,
    consumer,
    contract,
    topic,
)

AT_LEAST = topic("at-least-once")
ORDERED = topic("at-least-once", partitions=8)
UNCONFIRMED = dataclasses.replace(SQL, confirms_settlement=False)
HORIZON = dataclasses.replace(QUEUE, redelivery_horizon_s=14 * 86400.0)
APART = dataclasses.replace(QUEUE, orders_by_key=True)
SMALL = dataclasses.replace(SQL, max_message_bytes=262_144)

CASES: dict[str, tuple[Callable[[], Contract], str, str]] = {
    "exactly-once without a store": (
        lambda: contract(consumer("exactly-once", AT_LEAST), broker=QUEUE, store=None),
        "there is no store",
        "store=",
    ),
    "order without a broker for it": (
        lambda: contract(
            consumer("at-least-once", AT_LEAST, order_by_key=True), broker=QUEUE, store=None
        ),
        "keeps no order by key",
        "leave order_by_key out",
    ),
    "order without partitions": (
        lambda: contract(consumer("at-least-once", AT_LEAST, order_by_key=True)),
        "has no partitions to order in",
        "partitions=16",
    ),
    "order of what is settled before it runs": (
        lambda: contract(consumer("at-most-once", ORDERED, order_by_key=True)),
        "settled before its handler runs",
        "at-least-once",
    ),
    "a key held where dead letters are apart": (
        lambda: contract(
            consumer("at-least-once", ORDERED, order_by_key=True, hold_key_on_dead=True),
            broker=APART,
            store=None,
        ),
        "keeps dead letters apart",
        "leave it out",
    ),
    "partitions where there is no order": (
        lambda: contract(topics=(ORDERED,), broker=QUEUE, store=None),
        "partitions=8",
        "without partitions",
    ),
    "at-most-once without confirmed settlement": (
        lambda: contract(consumer("at-most-once"), broker=UNCONFIRMED),
        "does not confirm that a message is settled",
        "exactly-once with a store",
    ),
    "order of what nothing names": (
        lambda: contract(
            consumer(
                "at-least-once",
                topic("at-least-once", partitions=8, without_identity="accept"),
                order_by_key=True,
            )
        ),
        "what nothing names cannot be told from others of its key",
        "dedup_by=",
    ),
    "exactly-once of what nothing names": (
        lambda: contract(consumer("exactly-once", topic(without_identity="accept"))),
        "cannot be known again when it is delivered a second time",
        "Topic(..., dedup_by=...)",
    ),
    "repeats that nobody drops, at-least-once": (
        lambda: contract(consumer("at-least-once"), broker=LOG, store=OTHER_FILE),
        "drops no repeated publishes, nor does consumer 'billing'",
        "declare the topic at-least-once",
    ),
    "repeats that nobody drops, by claim": (
        lambda: contract(consumer(), broker=dataclasses.replace(SQL, identity_retention=False)),
        "admits by claim, which lets them pass",
        "a store in another database",
    ),
    "rows where there are none": (
        lambda: contract(
            consumer("exactly-once", AT_LEAST, connection=sqlite3.Connection),
            broker=TRANSACTING,
            store=NO_ROWS,
        ),
        "writes through a Connection (tx: duly.Transaction[Connection])",
        "a database as store",
    ),
    "an inbox that forgets before the broker": (
        lambda: contract(consumer(), broker=HORIZON, store=OTHER_FILE),
        "remembers for 7 days, and a queue may deliver a message again for 14 days",
        "inbox_retention_s=1209600 or more",
    ),
    "an inbox that forgets at once": (
        lambda: contract(consumer(inbox_retention_s=0), broker=LOG, store=OTHER_FILE),
        "inbox_retention_s=0 forgets a message at once",
        "inbox_retention_s=7 * 86400",
    ),
    "identities forgotten at once": (
        lambda: contract(topics=(topic(identity_retention_s=0),)),
        "forgets an id at once",
        "identity_retention_s=7 * 86400",
    ),
    "concurrency in a transaction": (
        lambda: contract(consumer(is_async=True, concurrency=2)),
        "the messages of one transaction run in order",
        "leave concurrency out",
    ),
    "concurrency of a def": (
        lambda: contract(consumer("at-least-once", AT_LEAST, concurrency=500)),
        "is for async def handlers",
        "lanes=500",
    ),
    "concurrency of batches": (
        lambda: contract(
            consumer("at-least-once", AT_LEAST, is_async=True, is_batch=True, concurrency=2)
        ),
        "is given all claimed messages at once",
        "lanes=",
    ),
    "a time limit of no transaction": (
        lambda: contract(consumer("at-least-once", AT_LEAST, tx_s=0.1)),
        "tx_s=0.1 bounds a transaction, and it has none",
        "leave tx_s out",
    ),
    "bodies too large for the broker": (
        lambda: contract(topics=(topic(),), broker=SMALL),
        "allows bodies of 1 MiB, SQL carries at most 256 KiB",
        "max_body_bytes=262144",
    ),
    "one subscription twice": (
        lambda: contract(consumer(), consumer("at-least-once")),
        "2 consumers have this name",
        "a name of its own",
    ),
    "one memory in several processes": (
        lambda: contract(consumer("at-least-once"), broker=IN_MEMORY, store=None, processes=2),
        "each would have its own",
        "run one process",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_reason_and_remedy(case: str):
    make, reason, remedy = CASES[case]
    with pytest.raises(ContractRefused) as refused:
        make()
    text = str(refused.value)
    assert reason in text
    said = text.split("Remedy: ")[1:]
    assert len(said) == 1
    assert remedy in said[0]


def test_everything_is_refused_at_once():
    with pytest.raises(ContractRefused) as refused:
        contract(
            consumer(concurrency=2),
            consumer("at-least-once", topic("at-least-once", "mails"), name="mail", concurrency=2),
            broker=LOG,
            store=None,
        )
    assert str(refused.value).count("Remedy: ") == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: contract(consumer("at-least-once", AT_LEAST, is_async=True, concurrency=500)),
        lambda: contract(consumer("at-least-once", ORDERED, order_by_key=True)),
        lambda: contract(
            consumer("at-least-once", ORDERED, is_async=True, concurrency=9, order_by_key=True)
        ),
        lambda: contract(consumer(is_batch=True, lanes=4)),
        lambda: contract(consumer("at-most-once"), broker=SQL, store=None),
        lambda: contract(consumer(inbox_retention_s=14 * 86400), broker=HORIZON, store=OTHER_FILE),
        lambda: contract(consumer(), broker=IN_MEMORY, store=OTHER_FILE),
        lambda: contract(consumer("exactly-once", AT_LEAST), broker=TRANSACTING, store=NO_ROWS),
        lambda: contract(topics=(topic(),), broker=LOG, store=None),
    ],
)
def test_what_can_be_kept_is_not_refused(make: Callable[[], Contract]):
    make()
