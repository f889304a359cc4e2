"""From deliveries to what a handler is called with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from duly.broker import Delivery, Span
from duly.consumer import Consumer
from duly.errors import DecodeError, UnknownType
from duly.message import Message
from duly.worker.steps import BodyWork, Unfit, Work

log = logging.getLogger("duly.worker")

_attempt = attrgetter("attempt")


def _most_attempts(claimed: Sequence[Delivery]) -> int:
    return claimed.attempt if isinstance(claimed, Span) else max(map(_attempt, claimed), default=1)


class Decoder:
    """Decodes for one consumer: payloads or `Message`, and `Unfit` for what cannot run."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._topics = {topic.name: topic for topic in consumer.topics}
        # Bodies alone do not tell of which version they are.
        simple = len(consumer.topics) == 1 and consumer.topics[0].versions is None
        self._only = consumer.topics[0] if simple else None
        self._unknown: set[str] = set()
        self._attempts = consumer.options.retry.attempts
        self._wants_message = consumer.handler.wants_message
        # With many handlers in flight each message is looked at before its handler starts.
        self._when_called = not (consumer.handler.wants_message or consumer.options.concurrency > 1)

    def work(self, claimed: Sequence[Delivery]) -> Work:
        """Deliveries with the arguments their handler takes, in order."""
        if self._only is not None and _most_attempts(claimed) <= self._attempts:
            bodies = _bodies(claimed)
            decode = self._only.codec.decode_fast
            try:
                if _any_exceeds(self._only.max_body_bytes, claimed, bodies):
                    raise ValueError("one is too large")
                if self._when_called and isinstance(claimed, Span):
                    return BodyWork(claimed, decode, self._argument)
                payloads = [*map(decode, bodies)]
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
        try:
            message = delivery.message
        except LookupError:
            return Unfit("a person erased the message while it was claimed")
        try:
            payload = self._payload(message)
        except UnknownType as error:
            return self._unread(message, str(error))
        except DecodeError as error:
            return Unfit(str(error))
        return with_payload(message, payload) if self._wants_message else payload

    def _unread(self, message: Message[Any], why: str) -> Unfit:
        """What becomes of a message whose type this code does not know."""
        versions = self._topics[message.topic].versions
        if versions is None or versions.unknown_type == "dead":
            return Unfit(why)
        if why not in self._unknown:
            self._unknown.add(why)
            log.warning(
                "consumer %s: message %s of topic %s waits for newer code, and so do others like "
                "it: %s",
                self._consumer.name, message.id, message.topic, why,
            )  # fmt: skip
        return Unfit(why, versions.look_again_s)

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
            return topic.read(message)
        except UnknownType:
            raise
        except DecodeError as error:
            raise DecodeError(f"the body cannot be decoded: {error}") from error
        except Exception as error:
            # Not its text, which may quote the data.
            kind = type(error).__name__
            raise DecodeError(f"the body cannot be decoded: {kind}") from error


def _any_exceeds(limit: int, claimed: Sequence[Delivery], bodies: Sequence[bytes]) -> bool:
    if isinstance(claimed, Span) and claimed.largest <= limit:
        return False
    return max(map(len, bodies)) > limit


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
