"""Spans by the messaging conventions, linked through what travels with the message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import duly
import duly.tracing
from duly.testing.harness import Running
from tests.observing.city import City


class Spans:
    """What was exported, by name."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("test")

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        there = [span.name for span in self._exporter.get_finished_spans()]
        assert there.count(name) == 1, (name, there)
        return self.named(name)[0]


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def linked(span: ReadableSpan) -> list[int]:
    return [link.context.span_id for link in span.links]


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture
def city(spans: Spans) -> City:
    made = City()
    duly.tracing.watch(made.app, spans.provider)
    return made


@pytest.fixture
def t(city: City, duly_running: Any) -> Iterator[Running]:
    with duly_running(city.app) as running:
        yield running


def test_the_way_of_a_message_is_one_trace(t: Running, city: City, spans: Spans):
    with spans.tracer.start_as_current_span("POST /orders") as request:
        city.app.publish(city.orders, "o-1", id="1")
    t.drain()

    create = spans.one("create orders")
    publish, process = spans.one("publish orders"), spans.one("process orders")
    assert parent_of(create) == request.get_span_context().span_id
    assert parent_of(publish) == request.get_span_context().span_id
    assert linked(publish) == linked(process) == [id_of(create)]
    assert parent_of(process) == id_of(create)
    for name in ("receive orders", "settle orders"):
        assert linked(spans.one(name)) == [id_of(create)], name

    # What the handler published within its transaction goes on in the same trace.
    further = spans.one("create receipts")
    assert parent_of(further) == id_of(process)
    assert linked(spans.one("process receipts")) == [id_of(further)]
    assert linked(spans.one("settle receipts")) == [id_of(further)]
    traces = {
        span.context.trace_id
        for name in ("orders", "receipts")
        for operation in ("create", "receive", "process", "settle")
        for span in spans.named(f"{operation} {name}")
        if span.context is not None
    }
    assert traces == {request.get_span_context().trace_id}


def test_what_a_coroutine_publishes_within_its_transaction_goes_on_in_its_trace(
    t: Running, city: City, spans: Spans
):
    async def request() -> None:
        async with city.app.atransaction() as tx:
            with spans.tracer.start_as_current_span("one"):
                await city.app.apublish(city.orders, "o-1", within=tx)
            with spans.tracer.start_as_current_span("many"):
                await city.app.apublish_many(city.orders, ["o-2", "o-3"], within=tx)

    asyncio.run(request())
    made = spans.named("create orders")
    assert [parent_of(span) for span in made] == [
        id_of(spans.one("one")),
        id_of(spans.one("many")),
    ]
    t.drain()
    assert {parent_of(span) for span in spans.named("process orders")} == {*map(id_of, made)}


def test_the_spans_say_what_the_conventions_ask_for(t: Running, city: City, spans: Spans):
    city.app.publish(city.orders, "o-1", id="1")
    t.drain()
    expected: dict[str, tuple[SpanKind, str, bool]] = {
        "create": (SpanKind.PRODUCER, "create", False),
        "publish": (SpanKind.CLIENT, "send", False),
        "receive": (SpanKind.CLIENT, "receive", True),
        "process": (SpanKind.CONSUMER, "process", True),
        "settle": (SpanKind.CLIENT, "settle", True),
    }
    for operation, (kind, type_, consumes) in expected.items():
        span = spans.one(f"{operation} orders")
        about = attributes(span)
        assert span.kind is kind
        assert about["messaging.system"] == "duly"
        assert about["messaging.client.id"] == "city"
        assert about["messaging.operation.name"] == operation
        assert about["messaging.operation.type"] == type_
        assert about["messaging.destination.name"] == "orders"
        assert about.get("messaging.consumer.group.name") == ("billing" if consumes else None)
    process = attributes(spans.one("process orders"))
    assert process["messaging.message.id"] == "1"
    assert process["duly.attempt"] == 1


def test_a_batch_links_to_every_message(spans: Spans, duly_running: Any):
    rows = duly.Topic("rows", str, guarantee="at-least-once")
    app = duly.App("city", broker="sqlite:///city.db")
    app.batch_consumer(rows, name="load", guarantee="at-least-once")(lambda batch: None)
    duly.tracing.watch(app, spans.provider)
    with duly_running(app) as t:
        for row in "abc":
            app.publish(rows, row)
        t.drain()
    made = [id_of(span) for span in spans.named("create rows")]
    for operation in ("receive", "process", "settle"):
        span = spans.one(f"{operation} rows")
        assert linked(span) == made
        assert span.parent is None
        assert attributes(span)["messaging.batch.message_count"] == 3


def test_each_failed_attempt_is_a_span_with_its_error(t: Running, city: City, spans: Spans):
    city.app.publish(city.orders, "bad")
    t.drain(advance=True, failures="expected")
    failed = spans.named("process orders")
    assert [attributes(span)["duly.attempt"] for span in failed] == [1, 2]
    for span in failed:
        assert span.status.status_code is StatusCode.ERROR
        assert attributes(span)["error.type"] == "ValueError"
        assert [event.name for event in span.events] == ["exception"]
    settled = [attributes(span) for span in spans.named("settle orders")]
    assert [about.get("duly.settled.retry") for about in settled] == [1, None]
    assert [about.get("duly.settled.dead") for about in settled] == [None, 1]


def test_asking_for_another_time_is_no_error(spans: Spans, duly_running: Any):
    rows = duly.Topic("rows", str, guarantee="at-least-once")
    app = duly.App("city", broker="sqlite:///city.db")
    policy = duly.RetryPolicy(attempts=2)

    @app.consumer(rows, name="load", guarantee="at-least-once", retry=policy)
    def later(row: str) -> None:
        raise duly.Retry("not yet", in_s=1)

    duly.tracing.watch(app, spans.provider)
    with duly_running(app) as t:
        app.publish(rows, "a")
        t.drain(advance=True)
    assert {span.status.status_code for span in spans.named("process rows")} == {StatusCode.UNSET}


def test_a_refused_publish_is_an_error(t: Running, city: City, spans: Spans):
    city.app.publish(city.orders, "o-1", id="1")
    with pytest.raises(duly.IdentityConflict):
        city.app.publish(city.orders, "another", id="1")
    refused = spans.named("publish orders")[1]
    assert refused.status.status_code is StatusCode.ERROR
    assert attributes(refused)["error.type"] == "IdentityConflict"


def test_spans_and_logs_of_the_handler_belong_to_its_span(spans: Spans, duly_running: Any):
    rows = duly.Topic("rows", str, guarantee="at-least-once")
    app = duly.App("city", broker="sqlite:///city.db")
    inside: list[int] = []

    def work(row: str) -> None:
        inside.append(trace.get_current_span().get_span_context().span_id)
        with spans.tracer.start_as_current_span("select"):
            pass

    app.consumer(rows, name="load", guarantee="at-least-once")(work)
    duly.tracing.watch(app, spans.provider)
    with duly_running(app) as t:
        app.publish(rows, "a")
        t.drain()
    process = spans.one("process rows")
    assert inside == [id_of(process)]
    assert parent_of(spans.one("select")) == id_of(process)


def test_a_context_that_was_given_is_kept(t: Running, city: City, spans: Spans):
    given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    city.app.publish(city.receipts, "o-1", headers={"traceparent": given})
    [message] = t.published(city.receipts)
    assert message.headers["traceparent"] == given
    t.drain()
    assert spans.named("create receipts") == []
    assert parent_of(spans.one("process receipts")) == 0xB7AD6B7169203331


@pytest.mark.parametrize("given", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_what_is_no_context_costs_no_message(t: Running, city: City, spans: Spans, given: str):
    city.app.publish(city.receipts, "o-1", headers={"traceparent": given})
    t.drain()
    assert city.mailed == ["o-1"]
    assert linked(spans.one("process receipts")) == []


def test_a_message_without_a_context_is_processed_in_a_trace_of_its_own(
    t: Running, city: City, spans: Spans
):
    t.publish(city.receipts, "o-1")
    t.drain()
    process = spans.one("process receipts")
    assert process.parent is None
    assert linked(process) == []


class Broken(trace.NoOpTracer):
    """A tracer that fails wherever it can."""

    def start_span(self, *args: Any, **kwargs: Any) -> trace.Span:
        raise RuntimeError("the tracer is broken")


class BrokenProvider(trace.NoOpTracerProvider):
    def get_tracer(self, *args: Any, **kwargs: Any) -> trace.Tracer:
        return Broken()


def test_a_broken_tracer_costs_no_message(duly_running: Any, caplog: pytest.LogCaptureFixture):
    city = City()
    duly.tracing.watch(city.app, BrokenProvider())
    with duly_running(city.app) as t:
        city.app.publish(city.orders, "o-1")
        t.drain()
        with t.connection() as db:
            assert db.execute("select id from charges").fetchall() == [("o-1",)]
    assert city.mailed == ["o-1"]
    assert "the tracer is broken" in caplog.text


def test_without_a_provider_nothing_is_added(duly_running: Any):
    city = City()
    duly.tracing.watch(city.app, trace.NoOpTracerProvider())
    with duly_running(city.app) as t:
        city.app.publish(city.receipts, "o-1")
        [message] = t.published(city.receipts)
        assert not message.headers
        t.drain()
    assert city.mailed == ["o-1"]


PUBLISHES: dict[str, Callable[[City], object]] = {
    "publish": lambda city: city.app.publish(city.receipts, "o-1"),
    "publish_many": lambda city: city.app.publish_many(city.receipts, ["o-1"]),
}


@pytest.mark.parametrize("how", PUBLISHES)
def test_every_way_of_publishing_carries_a_context(t: Running, city: City, how: str):
    PUBLISHES[how](city)
    with city.app.transaction() as tx:
        tx.publish(city.receipts, "o-2")
    assert len(t.published(city.receipts)) == 2
    for message in t.published(city.receipts):
        assert message.headers["traceparent"].startswith("00-")
