"""Tests of `orders_app.py`: what docs/testing.md shows, for pytest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta

import pytest
from orders_app import TABLES, Mailer, Order, PaymentRefused, app, mailer, orders, receipts

import duly
import duly.testing
from duly.testing import RunApp, Running


@pytest.fixture
def t(duly_running: RunApp) -> Iterator[Running]:
    with duly_running(app) as running:
        with running.connection() as db:
            db.execute(TABLES)
        yield running


def charged(t: Running) -> list[str]:
    with t.connection() as db:
        return [number for (number,) in db.execute("select number from charges order by number")]


def test_an_order_is_charged_and_a_receipt_is_published(t: Running) -> None:
    t.publish(orders, Order("o-1", 4200))
    t.drain()
    assert charged(t) == ["o-1"]
    assert t.payloads(receipts) == ["o-1"]


def test_the_same_order_published_twice_is_charged_once(t: Running) -> None:
    app.publish(orders, Order("o-1", 4200), id="o-1")
    assert isinstance(app.publish(orders, Order("o-1", 4200), id="o-1"), duly.RepeatDropped)
    t.drain()
    assert charged(t) == ["o-1"]


def test_a_handlers_exception_surfaces(t: Running) -> None:
    t.publish(orders, Order("refused-1", 4200))
    with pytest.raises(PaymentRefused):
        t.drain()
    assert charged(t) == []
    assert t.waiting("billing").parked == 1


def test_a_refused_payment_is_tried_for_some_minutes(t: Running) -> None:
    began = t.clock.now
    t.publish(orders, Order("refused-1", 4200))
    t.drain(advance=True, failures="expected")
    assert [failure.attempt for failure in t.failures] == [1, 2, 3, 4, 5]
    assert t.clock.now - began > timedelta(minutes=10)
    [letter] = t.dead("billing")
    assert letter.message.payload == Order("refused-1", 4200)
    assert letter.error == "PaymentRefused: refused-1"


def test_a_negative_amount_is_given_up_on_at_once(t: Running) -> None:
    t.publish(orders, Order("o-1", -1))
    t.drain()
    assert [letter.attempts for letter in t.dead("billing")] == [1]


def test_a_delay(t: Running) -> None:
    t.publish(orders, Order("o-1", 4200), delay_s=3600)
    t.drain()
    assert charged(t) == []
    t.advance(3601)
    t.drain()
    assert charged(t) == ["o-1"]


def test_mails_with_another_mailer(duly_running: RunApp) -> None:
    ours = Mailer()
    with duly_running(app, overrides={mailer: lambda: ours}) as t:
        t.publish(receipts, "o-1")
        t.drain()
    assert list(ours.sent.values()) == ["thank you for o-1"]


def test_on_the_tests_own_event_loop(duly_running: RunApp) -> None:
    async def test() -> None:
        async with duly_running(app) as t:
            await app.apublish(receipts, "o-1")
            await t.adrain()
            assert t.counts("mail").handled == 1

    asyncio.run(test())


def test_every_order_is_charged_once_or_given_up_on_in_sight(duly_faulty: RunApp) -> None:
    with duly_faulty(app) as t:
        with t.connection() as db:
            db.execute(TABLES)
        t.publish_many(orders, [Order(f"o-{number}", 100) for number in range(9)])
        t.drain(advance=True)
        dead = [letter.message.payload.number for letter in t.dead("billing")]
        assert sorted([*charged(t), *dead]) == [f"o-{number}" for number in range(9)]
        assert sorted(t.payloads(receipts)) == charged(t)


def test_a_worker_that_dies_after_the_mail_mails_no_second_time() -> None:
    ours = Mailer()
    faults = duly.testing.Faults(rate=0.0, at={("settle", 1): "die before"})
    with duly.testing.running(app, overrides={mailer: lambda: ours}, faults=faults) as t:
        t.publish(receipts, "o-1")
        t.drain()
        assert t.counts("mail").claimed == 2, "it was handled twice"
    assert list(ours.sent.values()) == ["thank you for o-1"]
