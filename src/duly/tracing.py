"""OpenTelemetry spans of an app's messages: ``pip install 'duly[otel]'``.

::

    import duly.tracing

    duly.tracing.watch(app)  # spans of the global tracer provider

By the semantic conventions for messaging: ``create`` where a message is made, whose context
travels in its ``traceparent`` header (CloudEvents' distributed tracing extension); ``publish``
where it becomes durable; ``receive``, ``process`` and ``settle`` where a consumer works it. Each
links to the messages it is about; where they share one creating context, that is its parent too,
so that the way of one message is one trace. The handler runs inside ``process``: its own spans
and logs belong to that, and what it publishes goes on in the same trace.

All but ``process`` are made after the fact, from `duly.events`. No guarantee depends on any.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any

from duly import events
from duly.app import App
from duly.broker import Delivery
from duly.consumer import Consumer
from duly.errors import ConfigurationError, Retry
from duly.logs import CURRENT, handling_now
from duly.message import Message

try:
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("opentelemetry"):
        raise
    raise ConfigurationError(
        "traces need the package opentelemetry-api: pip install 'duly[otel]'"
    ) from None

log = logging.getLogger("duly.tracing")

# A span with more links is cut by the SDK's default limit; making them would be lost work.
MAX_LINKS = 128
# What is claimed and not settled is remembered for its settle span. A worker holds far less;
# the bound is for what another process settles after this one lost it.
MAX_REMEMBERED = 100_000

_W3C = TraceContextTextMapPropagator()
_Origin = tuple[str, SpanContext | None]
"""A message's topic, and the context it was created in, where it carries one."""


def watch(app: App, tracer_provider: trace.TracerProvider | None = None) -> None:
    """From now on, make spans of what ``app`` does; before its worker is made.

    The provider is the global one unless another is given. Handlers then get whole messages
    claimed, which costs them what ``duly.Message`` as a parameter would.
    """
    spans = _Spans(app.name, trace.get_tracer("duly", tracer_provider=tracer_provider))
    app.stamps.append(spans.stamp)
    app.wrappers.append(spans.wrap)
    app.watchers.append(spans)


class _Spans:
    """The spans of one app; its stamp, its wrapper and its watcher."""

    def __init__(self, app: str, tracer: trace.Tracer) -> None:
        self._app = app
        self._tracer = tracer
        self._lock = threading.Lock()
        self._claimed: OrderedDict[Any, _Origin] = OrderedDict()

    # --- where messages are made

    def stamp(self, topic: str, headers: Mapping[str, str]) -> Mapping[str, str]:
        """The headers that carry the context of a new ``create`` span."""
        if "traceparent" in headers:
            return {}
        span = self._tracer.start_span(
            f"create {topic}", kind=SpanKind.PRODUCER, attributes=self._about("create", topic)
        )
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, trace.set_span_in_context(span))
        span.end()
        return carrier

    # --- around the handler

    def wrap(self, consumer: Consumer, call: Callable[..., Any]) -> Callable[..., Any]:
        """The handler inside its ``process`` span."""
        if consumer.handler.is_async:

            @wraps(call)
            async def traced_async(*args: Any) -> Any:
                with self._processing():
                    return await call(*args)

            return traced_async

        @wraps(call)
        def traced(*args: Any) -> Any:
            with self._processing():
                return call(*args)

        return traced

    @contextlib.contextmanager
    def _processing(self) -> Iterator[None]:
        span = self._process_span()
        if span is None:
            yield
            return
        with trace.use_span(
            span, end_on_exit=True, record_exception=False, set_status_on_exception=False
        ):
            try:
                yield
            except Exception as error:
                span.record_exception(error)
                if not isinstance(error, Retry):  # "not yet" is an answer, not a failure
                    _mark_failed(span, error)
                raise

    def _process_span(self) -> Span | None:
        try:
            handling = CURRENT.get()
            if handling is None:
                return None
            consumer, running = handling_now(handling)
            deliveries = [running] if isinstance(running, Delivery) else list(running)
            origins = [_origin(delivery.message) for delivery in deliveries]
            about = self._about("process", _only(origins), consumer, len(deliveries))
            if isinstance(running, Delivery):
                about["messaging.message.id"] = running.message_id
                about["duly.attempt"] = running.attempt
            return self._start("process", SpanKind.CONSUMER, origins, about)
        except Exception:
            log.exception("a process span could not be started; the handler runs without")
            return None

    # --- after the fact

    def __call__(self, event: events.Event) -> None:
        """Make the span of an event, where it has one."""
        match event:
            case events.Published(topic, _, repeats, seconds, messages):
                about = self._about("publish", topic, None, len(messages), type_="send")
                about["duly.repeats"] = repeats
                self._past("publish", [_origin(m) for m in messages], about, seconds)
            case events.PublishErred(topic, messages, error, seconds):
                about = self._about("publish", topic, None, len(messages), type_="send")
                self._past("publish", [_origin(m) for m in messages], about, seconds, error)
            case events.Claimed(consumer, deliveries):
                self._received(consumer, deliveries)
            case events.Settled():
                self._settled(event)
            case events.LeaseLost(_, receipts):
                self._forget(receipts)
            case _:
                pass

    def _received(self, consumer: str, deliveries: Sequence[Delivery]) -> None:
        origins = [_origin(delivery.message) for delivery in deliveries]
        about = self._about("receive", _only(origins), consumer, len(origins))
        self._past("receive", origins, about)
        with self._lock:
            for delivery, origin in zip(deliveries, origins, strict=True):
                self._claimed[delivery.receipt] = origin
            while len(self._claimed) > MAX_REMEMBERED:
                self._claimed.popitem(last=False)

    def _settled(self, event: events.Settled) -> None:
        kinds = Counter(type(settlement).__name__.lower() for settlement in event.settlements)
        origins = self._forget([settlement.receipt for settlement in event.settlements])
        about = self._about("settle", _only(origins), event.consumer, len(event.settlements))
        about.update({f"duly.settled.{kind}": count for kind, count in kinds.items()})
        if event.refused:
            about["duly.settled.refused"] = len(event.refused)
        self._past("settle", origins, about, event.seconds)

    def _forget(self, receipts: Iterable[Any]) -> list[_Origin]:
        with self._lock:
            found = [self._claimed.pop(receipt, None) for receipt in receipts]
        return [origin for origin in found if origin is not None]

    # --- spans

    def _about(
        self,
        operation: str,
        topic: str | None,
        consumer: str | None = None,
        count: int = 1,
        *,
        type_: str | None = None,
    ) -> dict[str, str | int]:
        about: dict[str, str | int] = {
            "messaging.system": "duly",
            "messaging.client.id": self._app,
            "messaging.operation.name": operation,
            "messaging.operation.type": type_ or operation,
        }
        if topic is not None:
            about["messaging.destination.name"] = topic
        if consumer is not None:
            about["messaging.consumer.group.name"] = consumer
        if count != 1:
            about["messaging.batch.message_count"] = count
        return about

    def _start(
        self,
        operation: str,
        kind: SpanKind,
        origins: Sequence[_Origin],
        about: Mapping[str, str | int],
        start_ns: int | None = None,
    ) -> Span:
        given = [context for _, context in origins if context is not None]
        contexts = list({(each.trace_id, each.span_id): each for each in given}.values())
        parent = None
        if len(contexts) == 1 and not trace.get_current_span().get_span_context().is_valid:
            parent = trace.set_span_in_context(trace.NonRecordingSpan(contexts[0]))
        destination = about.get("messaging.destination.name")
        return self._tracer.start_span(
            operation if destination is None else f"{operation} {destination}",
            context=parent,
            kind=kind,
            attributes=about,
            links=[Link(context) for context in contexts[:MAX_LINKS]],
            start_time=start_ns,
        )

    def _past(
        self,
        operation: str,
        origins: Sequence[_Origin],
        about: Mapping[str, str | int],
        seconds: float = 0.0,
        error: Exception | None = None,
    ) -> None:
        """A span that ended just now, and began ``seconds`` before."""
        now_ns = time.time_ns()
        start_ns = now_ns - int(seconds * 1e9)
        span = self._start(operation, SpanKind.CLIENT, origins, about, start_ns)
        if error is not None:
            _mark_failed(span, error)
        span.end(now_ns)


def _mark_failed(span: Span, error: Exception) -> None:
    # Not the error's text: that is in the recorded exception, or in the log, and may hold data.
    span.set_status(Status(StatusCode.ERROR, type(error).__name__))
    span.set_attribute("error.type", type(error).__qualname__)


def _origin(message: Message[Any]) -> _Origin:
    if "traceparent" not in message.headers:
        return message.topic, None
    context = trace.get_current_span(_W3C.extract(message.headers, Context()))
    made_in = context.get_span_context()
    return message.topic, made_in if made_in.is_valid else None


def _only(origins: Sequence[_Origin]) -> str | None:
    """The topic, where all are of one."""
    topics = {topic for topic, _ in origins}
    return topics.pop() if len(topics) == 1 else None
