"""What an app does is counted, and what it has before it is read at each scrape."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

import duly
import duly.metrics
from duly.testing.harness import Running
from tests.observing.city import City


class Scrape:
    """Values by name and labels."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def __call__(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(f"duly_{name}", {"app": "city", **labels})


@pytest.fixture
def city() -> City:
    return City()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def t(city: City, registry: CollectorRegistry, duly_running: Any) -> Any:
    duly.metrics.watch(city.app, registry)
    with duly_running(city.app) as running:
        yield running


@pytest.fixture
def scrape(registry: CollectorRegistry) -> Scrape:
    return Scrape(registry)


def test_what_an_app_does_is_counted(t: Running, city: City, scrape: Scrape):
    city.app.publish_many(city.orders, ["o-1", "o-2", "bad"], ids=["1", "2", "3"])
    city.app.publish(city.orders, "o-1", id="1")
    t.drain(advance=True, failures="expected")
    assert scrape("published_total", topic="orders") == 3
    assert scrape("publish_repeats_total", topic="orders") == 1
    billing = {"consumer": "billing"}
    assert scrape("failures_total", **billing, then="retry") == 1
    assert scrape("failures_total", **billing, then="dead") == 1
    assert scrape("settled_total", **billing, **{"as": "done"}) == 2
    assert scrape("settled_total", **billing, **{"as": "dead"}) == 1
    assert (scrape("commit_published_total", **billing) or 0) >= 2
    assert (scrape("commits_total", **billing) or 0) >= 1
    assert (scrape("rollbacks_total", **billing) or 0) >= 1
    assert scrape("handler_seconds_total", **billing) == 0, "the harness's clock stands still"
    mail = {"consumer": "mail"}
    assert scrape("claimed_total", **mail) == 2
    assert scrape("handled_total", **mail) == 2
    assert scrape("settled_total", **mail, **{"as": "done"}) == 2


def test_what_an_app_has_before_it_is_read_when_somebody_scrapes(
    t: Running, city: City, scrape: Scrape
):
    t.publish_many(city.orders, ["o-1", "bad"])
    t.publish(city.receipts, "o-0")
    flow = {"consumer": "mail", "topic": "receipts"}
    assert scrape("readable") == 1
    assert scrape("backlog", **flow) == 1
    assert (scrape("oldest_age_seconds", **flow) or -1) >= 0
    t.drain(advance=True, failures="expected")
    assert scrape("backlog", **flow) == 0
    assert scrape("oldest_age_seconds", **flow) is None
    assert scrape("dead_letters", consumer="billing", topic="orders") == 1
    assert scrape("incidents", of="billing", kind="dead-letter") == 1


def test_a_failure_at_most_once_loses_the_message(t: Running, city: City, scrape: Scrape):
    t.publish_many(city.readings, [20.0, 40.0])
    t.drain(failures="expected")
    assert scrape("failures_total", consumer="alarm", then="lost") == 1
    assert scrape("failures_total", consumer="alarm", then="dead") is None
    assert scrape("handled_total", consumer="alarm") == 1


def test_a_batch_handler_counts_messages_and_not_calls(
    registry: CollectorRegistry, scrape: Scrape, duly_running: Any
):
    rows = duly.Topic("rows", str, guarantee="at-least-once")
    app = duly.App("city", broker="sqlite:///city.db")
    app.batch_consumer(rows, name="load", guarantee="at-least-once")(lambda batch: None)
    duly.metrics.watch(app, registry)
    with duly_running(app) as t:
        t.publish_many(rows, ["a", "b", "c"])
        t.drain()
    assert scrape("handled_total", consumer="load") == 3


def test_at_most_once_messages_are_counted_when_they_are_stored(
    city: City, registry: CollectorRegistry, scrape: Scrape
):
    app = duly.App("city", broker="memory://")
    duly.metrics.watch(app, registry)
    for celsius in (1.0, 2.0):
        app.publish(city.readings, celsius)
    app.close()
    app.publish(city.readings, 3.0)
    app.close()
    assert scrape("published_total", topic="readings") == 3


def test_a_refused_publish_is_counted(t: Running, city: City, scrape: Scrape):
    city.app.publish(city.orders, "o-1", id="1")
    with pytest.raises(duly.IdentityConflict):
        city.app.publish(city.orders, "another", id="1")
    assert scrape("publish_errors_total", topic="orders") == 1


def test_a_broker_that_cannot_be_asked_fails_no_scrape(
    registry: CollectorRegistry, scrape: Scrape, caplog: pytest.LogCaptureFixture
):
    app = duly.App("city", broker="sqlite:////no/such/folder/x.db")
    duly.metrics.watch(app, registry)
    assert b"duly_readable" in generate_latest(registry)
    assert scrape("readable") == 0
    assert "could not be asked" in caplog.text


def test_watching_again_counts_nothing_twice(
    t: Running, city: City, registry: CollectorRegistry, scrape: Scrape
):
    duly.metrics.watch(city.app, registry)
    city.app.publish(city.receipts, "o-1")
    assert scrape("published_total", topic="receipts") == 1


def test_two_apps_share_a_registry(t: Running, city: City, registry: CollectorRegistry):
    other = duly.App("other", broker="memory://")
    duly.metrics.watch(other, registry)
    city.app.publish(city.receipts, "o-1")
    value = registry.get_sample_value
    assert value("duly_published_total", {"app": "city", "topic": "receipts"}) == 1
    assert value("duly_published_total", {"app": "other", "topic": "receipts"}) is None


def test_a_registry_holds_no_app_that_is_gone(registry: CollectorRegistry):
    city = City("gone")
    duly.metrics.watch(city.app, registry)
    held = weakref.ref(city.app)
    del city
    gc.collect()
    assert held() is None
    assert b'app="gone"' not in generate_latest(registry)
