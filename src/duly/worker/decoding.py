"""From deliveries to what a handler is called with."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from duly.broker import Delivery, Span
from duly.consumer import Consumer
from duly.errors import DecodeError
from duly.guarantees import Guarantee
from duly.message import Message
from duly.worker.steps import BodyWork, Unfit, Work

_attempt = attrgetter("attempt")


def _most_attempts(claimed: Sequence[Delivery]) -> int:
    return claimed.attempt if isinstance(claimed, Span) else max(map(_attempt, claimed), default=1)


class Decoder:
    """Decodes for one consumer: payloads or `Message`, and `Unfit` for what cannot run."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._topics = {topic.name: topic for topic in consumer.topics}
        self._only = consumer.topics[0] if len(consumer.topics) == 1 else None
        self._attempts = consumer.options.retry.attempts
        self._wants_message = consumer.handler.wants_message
        # At-most-once, what cannot be decoded must be found before all is settled. And with many
        # handlers in flight each message is looked at before its handler starts.
        self._one_by_one = not (
            consumer.handler.is_batch
            or consumer.handler.wants_message
            or consumer.options.concurrency > 1
            or consumer.guarantee is Guarantee.AT_MOST_ONCE
        )

    def work(self, claimed: Sequence[Delivery]) -> Work:
        """Deliveries with the arguments their handler takes, in order."""
        if self._only is not None and _most_attempts(claimed) <= self._attempts:
            bodies = _bodies(claimed)
            decode = self._only.codec.decode_fast
            try:
                if max(map(len, bodies)) > self._only.max_body_bytes:
                    raise ValueError("one is too large")
                if self._one_by_one and isinstance(claimed, Span):
                    return BodyWork(claimed, decode, self._argument)
                payloads = [decode(body) for body in bodies]
            except Exception:  # noqa: BLE001 - whatever a damaged body does
                pass  # found, one by one, below
            else:
                if self._wants_message:
                    payloads = [
                        with_payload(d.message, p) for d, p in zip(claimed, payloads, strict=True)
                    ]
                return Work(claimed, payloads, plain=True)
        return Work(claimed, [self._argument(delivery) for delivery in claimed])

    def _argument(self, delivery: Delivery) -> Any:
        if delivery.attempt > self._attempts:
            return Unfit(
                f"given up after {delivery.attempt - 1} attempts: the worker died while it "
                "handled this message alone, or its lease ran out (consumer "
                f"{self._consumer.name!r} allows {self._attempts})"
            )
        message = delivery.message
        try:
            payload = self._payload(message)
        except DecodeError as error:
            return Unfit(str(error))
        return with_payload(message, payload) if self._wants_message else payload

    def _payload(self, message: Message[Any]) -> Any:
        topic = self._topics.get(message.topic)
        if topic is None:
            raise DecodeError(
                f"topic {message.topic!r} is not one of consumer {self._consumer.name!r}"
            )
        if not isinstance(message.body, bytes):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise DecodeError("the stored message is damaged: its body is no blob")
        if len(message.body) > topic.max_body_bytes:
            raise DecodeError(
                f"the body has {len(message.body):,} bytes and topic {topic.name!r} carries "
                f"{topic.max_body_bytes:,}: Topic(max_body_bytes=...)"
            )
        try:
            return topic.codec.decode(message.body)
        except DecodeError as error:
            raise DecodeError(f"the body cannot be decoded: {error}") from error
        except Exception as error:
            # Not its text, which may quote the data.
            kind = type(error).__name__
            raise DecodeError(f"the body cannot be decoded: {kind}") from error


def _bodies(claimed: Sequence[Delivery]) -> Sequence[bytes]:
    if isinstance(claimed, Span):
        return claimed.bodies
    return [delivery.carried.body for delivery in claimed]


def with_payload(message: Message[Any], payload: Any) -> Message[Any]:
    """The message as a handler sees it: with its payload decoded."""
    # By position and not by msgspec.structs.replace, which costs five times as much.
    return Message(
        message.topic,
        message.source,
        message.id,
        message.body,
        message.time_ms,
        message.key,
        message.headers,
        message.due_ms,
        payload,
    )
