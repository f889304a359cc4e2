"""What each promise is kept by, and its limits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from duly.broker import Capabilities
from duly.contract import Contract, Flow, render
from duly.errors import ConfigurationError
from duly.guarantees import Admission, Guarantee
from duly.store import StoreCapabilities
from tests.contracts.declared import (
    IN_MEMORY,
    LOG,
    NO_OUTBOX,
    NO_ROWS,
    OTHER_FILE,
    QUEUE,
    SAME_FILE,
    SQL,
    TRANSACTING,
    consumer,
    contract,
    topic,
)

AT_LEAST = topic("at-least-once")


PARKING = dataclasses.replace(OTHER_FILE, parks=True)
HELD = "a retry holds up everything behind it in its partition"


@pytest.mark.parametrize(
    ("broker", "store", "read", "admission"),
    [
        (SQL, SAME_FILE, topic(), Admission.BY_CLAIM),
        (SQL, OTHER_FILE, topic(), Admission.BY_INBOX),
        (LOG, OTHER_FILE, AT_LEAST, Admission.BY_CURSOR),
        # A repeated publish stands at another position of the log, which a cursor lets pass.
        (LOG, OTHER_FILE, topic(), Admission.BY_INBOX),
        (
            dataclasses.replace(LOG, identity_retention=True),
            OTHER_FILE,
            topic(),
            Admission.BY_CURSOR,
        ),
        (QUEUE, OTHER_FILE, topic(), Admission.BY_INBOX),
        # No database is no database, even if both say so.
        (QUEUE, StoreCapabilities("odd", database=""), AT_LEAST, Admission.BY_INBOX),
    ],
)
def test_admission(broker: Capabilities, store: StoreCapabilities, read, admission: Admission):
    made = contract(consumer("exactly-once", read), broker=broker, store=store)
    assert made.admission("billing") is admission


def test_only_exactly_once_consumers_have_an_admission():
    made = contract(consumer("at-least-once"))
    assert made.consumer("billing").admission is None
    with pytest.raises(ConfigurationError, match="no transaction"):
        made.admission("billing")
    with pytest.raises(ConfigurationError, match="no consumer 'gone'"):
        made.admission("gone")


def limits(made: Contract, name: str = "billing") -> str:
    return "\n".join(made.consumer(name).limits)


def test_messages_at_risk_in_one_crash():
    read = topic("at-most-once")
    made = contract(consumer("at-most-once", read, batch=50, lanes=4))
    assert made.consumer("billing").crash_loses == 200
    assert "at risk in one crash: 200 messages (batch=50 x lanes=4" in limits(made)
    made = contract(consumer("at-most-once", read, is_async=True, concurrency=500, lanes=2))
    assert made.consumer("billing").crash_loses == 1000


def test_repeats_after_one_crash():
    made = contract(consumer("at-least-once", AT_LEAST, batch=1))
    terms = made.consumer("billing")
    assert (terms.crash_loses, terms.crash_repeats) == (0, 1)
    assert "at most 1 message (batch=1" in limits(made)


def test_exactly_once_costs_no_message():
    terms = contract(consumer()).consumer("billing")
    assert (terms.crash_loses, terms.crash_repeats) == (0, 0)


@pytest.mark.parametrize(
    ("run", "is_async", "said"),
    [
        ({"supervised": True}, False, "has its process ended and replaced"),
        ({}, False, "nobody ends a def handler that hangs"),
        ({}, True, "is cancelled and retried"),
    ],
)
def test_who_ends_a_hung_handler(run, is_async: bool, said: str):
    made = contract(consumer("at-least-once", AT_LEAST, is_async=is_async, max_run_s=90), **run)
    assert said in limits(made)
    assert "90 s" in limits(made)


def test_what_drops_repeated_publishes():
    (terms,) = contract(topics=(topic(identity_retention_s=86400),)).topics
    assert terms.drops_repeats == "SQL's identity table (topic, source, id), for 1 day"
    assert terms.identity_retention_s == 86400
    (terms,) = contract(consumer(inbox_retention_s=3600), broker=QUEUE, store=OTHER_FILE).topics
    assert terms.drops_repeats is not None
    assert "the inbox of each consumer (billing for 1 h)" in terms.drops_repeats
    assert terms.identity_retention_s is None
    (terms,) = contract(topics=(AT_LEAST,)).topics
    assert terms.drops_repeats is None


def test_what_becomes_of_a_message_that_nobody_takes():
    keeps_none = dataclasses.replace(QUEUE, replays=False)
    for unheard, said in ((False, "is refused"), (True, "is stored nowhere")):
        wanted = topic("at-least-once", may_go_unheard=unheard)
        (terms,) = contract(topics=(wanted,), broker=keeps_none, store=None).topics
        assert f"no subscription takes {said}" in " ".join(terms.limits)
        (terms,) = contract(topics=(wanted,), broker=QUEUE, store=None).topics
        assert "takes" not in " ".join(terms.limits)


def test_what_is_handed_out_once_may_be_handled_at_most_once():
    unconfirmed = dataclasses.replace(QUEUE, confirms_settlement=False, hands_out_once=True)
    made = contract(
        consumer("at-most-once", topic("at-most-once"), batch=20, lanes=2), broker=unconfirmed
    )
    terms = made.consumer("billing")
    assert terms.provided_by == "taken out of a queue for good, before the handler starts"
    assert (terms.crash_loses, terms.crash_repeats) == (40, 0)
    assert "at risk in one crash: 40 messages" in limits(made)
    assert "a restart of a queue loses what waits for it there" in limits(made)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dedup_by": "x-order"}, "known by its header 'x-order'"),
        ({"dedup_by": lambda order: order["id"]}, "what dedup_by makes of its payload"),
        ({"without_identity": "accept"}, "without identity is another event at each delivery"),
    ],
)
def test_what_names_the_messages_of_other_programs(options: dict[str, Any], said: str):
    (terms,) = contract(topics=(topic("at-least-once", **options),)).topics
    assert said in " ".join(terms.limits)


def test_what_cannot_wait_in_order_is_said():
    unordered = dataclasses.replace(SQL, delays_in_order=False)
    for partitions, said in ((0, False), (8, True)):
        wanted = topic("at-least-once", partitions=partitions)
        (terms,) = contract(topics=(wanted,), broker=unordered).topics
        assert ("no delays" in " ".join(terms.limits)) == said


def test_the_inbox_says_what_it_does_with_what_is_older():
    made = contract(consumer(inbox_retention_s=7200), broker=QUEUE, store=OTHER_FILE)
    assert "more than 2 h after it took effect is dead-lettered, not run" in limits(made)
    assert made.consumer("billing").inbox_retention_s == 7200
    bounded = dataclasses.replace(QUEUE, redelivery_horizon_s=7200)
    made = contract(consumer(inbox_retention_s=7200), broker=bounded, store=OTHER_FILE)
    assert "dead-lettered, not run" not in limits(made)


@pytest.mark.parametrize(
    ("store", "wanted", "ordered", "said"),
    [
        (PARKING, AT_LEAST, False, "a retry waits in other SQL, parked there"),
        (PARKING, topic("at-least-once", partitions=2), True, HELD),
        (PARKING, topic(partitions=2), False, HELD),
        (OTHER_FILE, AT_LEAST, False, HELD),
    ],
    ids=["by cursor", "in order by key", "by inbox", "in a store that does not park"],
)
def test_where_a_retry_on_a_log_waits_is_said(store: Any, wanted: Any, ordered: bool, said: str):
    made = contract(consumer("exactly-once", wanted, order_by_key=ordered), broker=LOG, store=store)
    told = limits(made)
    assert said in told
    assert ("parked" in told) == (said is not HELD)


def test_one_writer_a_file_is_said():
    assert "more processes do not speed" in "".join(contract(consumer()).notes)
    notes = contract(consumer(), broker=QUEUE, store=OTHER_FILE).notes
    assert "other SQL: one writer a file" in "".join(notes)
    assert "lanes=3 take turns" in limits(contract(consumer(lanes=3)))


def test_a_process_death_that_loses_everything_is_said():
    (note,) = contract(consumer("at-least-once"), broker=IN_MEMORY, store=None).notes
    assert "its death loses all of them" in note


def test_what_becomes_of_what_a_transaction_publishes():
    made = contract(consumer("exactly-once", AT_LEAST), broker=QUEUE, store=NO_OUTBOX)
    assert "tx.publish is refused" in limits(made)
    made = contract(consumer("exactly-once", AT_LEAST), broker=QUEUE, store=OTHER_FILE)
    assert "tx.publish goes through other SQL's outbox: sent after the commit, and again" in limits(
        made
    )
    assert "tx.publish" not in limits(contract(consumer()))


@pytest.mark.parametrize("guarantee", ["exactly-once", "at-least-once"])
def test_what_comes_through_an_outbox_alone_may_be_stored_once(guarantee: str):
    once = dataclasses.replace(LOG, relays_once=True)
    made = contract(consumer("exactly-once", topic(guarantee)), broker=once, store=OTHER_FILE)
    assert "sent after the commit, and stored once, for readers of what is committed" in limits(
        made
    )
    # Only of what promises that a repeat has no effect: who drops it otherwise is said there.
    said = "other SQL's outbox alone (tx.publish, within=) is stored once, for readers of"
    assert (said in render(made).replace("\n             ", " ")) == (guarantee == "exactly-once")
    for broker, store in ((LOG, OTHER_FILE), (once, NO_OUTBOX)):
        told = render(contract(consumer("exactly-once", topic()), broker=broker, store=store))
        assert "stored once" not in told.replace("\n             ", " ")


@pytest.mark.parametrize(
    ("published", "consumed", "end_to_end"),
    [
        ("at-most-once", "at-most-once", "at-most-once"),
        ("at-most-once", "at-least-once", None),
        ("at-most-once", "exactly-once", "at-most-once"),
        ("at-least-once", "at-most-once", None),
        ("at-least-once", "at-least-once", "at-least-once"),
        ("at-least-once", "exactly-once", "at-least-once"),
        ("exactly-once", "at-most-once", "at-most-once"),
        ("exactly-once", "at-least-once", "at-least-once"),
        ("exactly-once", "exactly-once", "exactly-once"),
    ],
)
def test_end_to_end(published: str, consumed: str, end_to_end: str | None):
    (flow,) = contract(consumer(consumed, topic(published))).flows
    assert flow.guarantee == (end_to_end and Guarantee(end_to_end))
    if end_to_end != "exactly-once":
        assert flow.why != "published once, takes effect once"
    assert ("handled twice" in flow.why) == (published == "at-least-once")
    assert ("lost" in flow.why) == ("at-most-once" in (published, consumed))


def test_an_inbox_drops_repeated_publishes_of_an_at_least_once_topic():
    (flow,) = contract(consumer("exactly-once", AT_LEAST), broker=QUEUE, store=OTHER_FILE).flows
    assert flow.guarantee is Guarantee.EXACTLY_ONCE
    assert "under the same id, for 7 days" in flow.why


def test_a_flow_for_every_topic_of_a_consumer():
    made = contract(consumer("at-least-once", AT_LEAST, topic("at-most-once", "clicks")))
    assert [(flow.topic, flow.consumer) for flow in made.flows] == [
        ("orders", "billing"),
        ("clicks", "billing"),
    ]


def test_topics_that_are_only_published_to_are_in_it():
    made = contract(consumer(), topics=(topic("at-least-once", "receipts"),))
    assert [terms.name for terms in made.topics] == ["receipts", "orders"]


def test_a_store_says_what_else_holds_for_its_transactions():
    found = contract(
        consumer("exactly-once", topic("at-least-once")), broker=TRANSACTING, store=NO_ROWS
    )
    [terms] = found.consumers
    assert terms.admission is Admission.BY_CLAIM
    assert "the positions of the messages" in terms.provided_by
    assert "seen when they commit" in terms.limits
    assert not any("outbox" in limit for limit in terms.limits)


def test_the_text_names_everything_once_and_fits_a_screen():
    read = topic("at-most-once", "clicks", partitions=4, retention_s=3600)
    made = contract(
        consumer(),
        consumer("at-least-once", read, name="board", order_by_key=True),
        broker=SQL,
    )
    text = render(made)
    assert max(map(len, text.splitlines())) <= 96
    assert "billing <- orders: exactly-once, admission by claim" in text
    assert "clicks -> board: NONE of the three: may be lost, and may be handled twice" in text
    assert "up to 4 key streams" in text


def test_a_flow_is_a_value():
    assert Flow("a", "b", None, "c") == Flow("a", "b", None, "c")


@pytest.mark.parametrize(
    ("broker", "said"),
    [(QUEUE, True), (LOG, True), (SQL, False), (dataclasses.replace(QUEUE, durable=False), False)],
)
def test_where_others_have_no_part_in_the_stores_file_it_says_so(broker: Capabilities, said: bool):
    """Who works the same messages on another machine has another memory of what took effect."""
    server = dataclasses.replace(OTHER_FILE, one_writer=False)
    text = "only among workers on this other SQL file"
    for store, tells in ((OTHER_FILE, said), (server, False)):
        made = contract(consumer("exactly-once", AT_LEAST), broker=broker, store=store)
        assert (text in " ".join(made.consumers[0].limits)) == tells
