"""From deliveries to what a handler is called with."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from duly.broker import Delivery, Span
from duly.consumer import Consumer
from duly.message import Message
from duly.worker.steps import Unfit, Work, describe

_attempt = attrgetter("attempt")


def _most_attempts(claimed: Sequence[Delivery]) -> int:
    return claimed.attempt if isinstance(claimed, Span) else max(map(_attempt, claimed), default=1)


class Decoder:
    """Decodes for one consumer: payloads or `Message`, and `Unfit` for what cannot run."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._decoders = {topic.name: topic.codec.decode_fast for topic in consumer.topics}
        self._only = next(iter(self._decoders.values())) if len(self._decoders) == 1 else None
        self._attempts = consumer.options.retry.attempts
        self._wants_message = consumer.handler.wants_message

    def work(self, claimed: Sequence[Delivery]) -> Work:
        """Deliveries with the arguments their handler takes, in order."""
        decode = self._only
        if decode is not None and _most_attempts(claimed) <= self._attempts:
            try:
                if isinstance(claimed, Span):
                    payloads = [decode(body) for body in claimed.bodies]
                else:
                    payloads = [decode(d.carried.body) for d in claimed]
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
        name = self._consumer.name
        if delivery.attempt > self._attempts:
            return Unfit(
                f"given up after {delivery.attempt - 1} attempts: the worker died while it "
                "handled this message alone, or its lease ran out (consumer "
                f"{name!r} allows {self._attempts})"
            )
        message = delivery.message
        decode = self._decoders.get(message.topic)
        if decode is None:
            return Unfit(f"topic {message.topic!r} is not one of consumer {name!r}")
        try:
            payload = decode(message.body)
        except Exception as error:  # noqa: BLE001 - whatever a damaged body does
            return Unfit(f"the body cannot be decoded: {describe(error)}")
        return with_payload(message, payload) if self._wants_message else payload


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
