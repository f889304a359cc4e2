"""What the settings of a broker's server make of a contract."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from duly.contract import Contract, contract_of, render
from duly.errors import ContractRefused
from duly.inspection.survey import Hold, Peril, Survey
from tests.contracts.declared import QUEUE, consumer, topic

REMEDY = "remove the setting"


def peril(topic: str | None, subscription: str | None) -> Survey:
    return Survey(perils=(Peril(topic, subscription, "it drops the oldest", REMEDY),))


def contract(survey: Survey, guarantee: str = "at-least-once", **options: Any) -> Contract:
    in_order = bool(options.get("order_by_key"))
    orders = topic(guarantee, partitions=4 * in_order)
    reader = consumer("at-least-once", orders, **options)
    can = replace(QUEUE, orders_by_key=in_order)
    return contract_of(can, None, [orders], [reader], survey=survey)


@pytest.mark.parametrize(
    ("where", "subject"),
    [
        ((None, None), "topic 'orders'"),
        (("orders", None), "topic 'orders'"),
        (("orders", "billing"), "consumer 'billing'"),
    ],
)
def test_what_may_be_lost_against_the_promise_is_refused(where: Any, subject: str):
    with pytest.raises(ContractRefused, match=subject) as refusal:
        contract(peril(*where))
    assert "it drops the oldest" in str(refusal.value)
    assert f"Remedy: {REMEDY}." in str(refusal.value)


@pytest.mark.parametrize("where", [("other", None), ("other", "mail")])
def test_what_concerns_others_is_not(where: Any):
    assert contract(peril(*where)).topics


def test_what_may_be_lost_by_its_own_word_is_not():
    assert contract(peril("orders", None), "at-most-once").topics


@pytest.mark.parametrize(
    ("where", "said"),
    [((None, None), "notes"), (("orders", None), "topic"), ((None, "billing"), "consumer")],
)
def test_what_a_promise_takes_for_granted_is_said_where_it_belongs(where: Any, said: str):
    limit = Peril(where[0], where[1], "one disk has it", "buy another")
    found = contract(Survey(limits=(limit,)))
    places = {
        "notes": found.notes,
        "topic": found.topics[0].limits,
        "consumer": found.consumers[0].limits,
    }
    for name, texts in places.items():
        assert ("one disk has it (remedy: buy another)" in texts) == (name == said)


@pytest.mark.parametrize("where", [("other", None), ("orders", "mail")])
def test_what_others_take_for_granted_is_not(where: Any):
    limit = Peril(where[0], where[1], "one disk has it", "buy another")
    assert "one disk" not in render(contract(Survey(limits=(limit,))))


def test_who_may_lose_messages_takes_nothing_for_granted():
    limit = Peril("orders", None, "one disk has it", "buy another")
    assert "one disk" not in render(contract(Survey(limits=(limit,)), "at-most-once"))


def test_it_says_what_was_looked_at_and_what_was_not():
    found = contract(Survey(seen=("policies were read",), unseen=("quotas were not",)))
    assert found.notes == ("policies were read", "quotas were not")


def test_a_handler_that_the_server_does_not_wait_for_is_refused():
    known = Survey(hold=Hold(1800.0, known=True, remedy="raise the_timeout"))
    assert contract(known, max_run_s=1800.0).topics
    with pytest.raises(ContractRefused, match=r"takes a message back after 30 min") as refusal:
        contract(known, max_run_s=1801.0)
    assert "declare max_run_s=1800 or less, or raise the_timeout" in str(refusal.value)


def test_in_order_what_waits_behind_a_handler_is_held_as_well():
    known = Survey(hold=Hold(1800.0, known=True, remedy="raise the_timeout", in_order_s=900.0))
    assert contract(known, max_run_s=1800.0).topics
    assert contract(known, max_run_s=900.0, order_by_key=True).topics
    with pytest.raises(ContractRefused, match=r"or others wait behind it") as refusal:
        contract(known, max_run_s=901.0, order_by_key=True)
    assert "declare max_run_s=900 or less, or raise the_timeout" in str(refusal.value)
    assumed = Survey(hold=Hold(1800.0, known=False, remedy="raise it", in_order_s=900.0))
    assert "what waits behind it" not in render(contract(assumed, max_run_s=901.0))
    assert "for over 15 min, and what waits behind it, is started again" in render(
        contract(assumed, max_run_s=901.0, order_by_key=True)
    )


BATCHES = Survey(hold=Hold(1800.0, known=True, remedy="raise it", claim_s=900.0))


def test_what_waits_behind_slow_handlers_in_their_batch_is_said_to_come_again():
    assert (
        "where 100 handlers in a row take over 9 s each, what is claimed with them is taken back "
        "after 30 min, and comes again: if they may, declare batch=15 or less, or max_run_s=9"
    ) in " ".join(contract(BATCHES, batch=100, max_run_s=60.0).consumers[0].limits)


@pytest.mark.parametrize(
    "fits",
    [
        {"batch": 15, "max_run_s": 60.0},
        {"batch": 100, "max_run_s": 9.0},
        {"batch": 1, "max_run_s": 1800.0},
    ],
)
def test_of_what_fits_nothing_is_said(fits: Any):
    assert "in a row" not in render(contract(BATCHES, **fits))
    assert "in a row" not in render(contract(Survey(), batch=100, max_run_s=60.0))


def test_where_that_cannot_be_seen_it_says_so():
    assumed = Survey(hold=Hold(1800.0, known=False, remedy="raise the_timeout"))
    assert "started again" not in render(contract(assumed, max_run_s=1800.0))
    assert "for over 30 min is started again" in render(contract(assumed, max_run_s=1801.0))
