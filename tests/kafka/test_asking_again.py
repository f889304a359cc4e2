"""Where partitions go on is asked again, as long as somebody can still use the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from duly.brokers.kafka.assigned import Beginnings
from duly.errors import BrokerUnavailable, BrokerUnusable

_MEMBER = b"CGMDv2:\x03\x00\x00\x00group\x00member\x00\x01"


class Member:
    """A driver's consumer, as far as it is asked whether it belongs to its group."""

    def __init__(self) -> None:
        self.group = _MEMBER

    def consumer_group_metadata(self) -> bytes:
        return self.group


class Asked(Beginnings):
    """Is answered with these in turn, and then with what it was asked for."""

    def __init__(self, *answers: Exception) -> None:
        super().__init__(*[None] * 8)  # type: ignore[arg-type]
        self.told: list[str] = []
        self._answers = list(answers)
        self.unblocked = 0

    def of(self, consumer: Any, given: Any) -> Any:
        if self._answers:
            raise self._answers.pop(0)
        return given

    def takers(self, given: Any) -> list[str]:
        return []

    def unblock(self, *_: Any) -> None:
        self.unblocked += 1

    def ask(self, member: Member, asks: Callable[[], bool] = lambda: True) -> Any:
        return self.at_last(member, ["it"], self, asks, self.told.append, lambda _: None)  # type: ignore[list-item,arg-type]


def said(code: int, *, fatal: bool = False) -> KafkaException:
    return KafkaException(KafkaError(code, fatal=fatal))


def test_what_nobody_answers_is_asked_again_and_told():
    asked = Asked(said(KafkaError._TIMED_OUT), BrokerUnavailable("away"), KeyError("orders"))
    assert asked.ask(Member()) == ["it"]
    assert "Timed out" in asked.told[0]
    assert asked.told[1:] == ["asking again: away", "asking again: topic 'orders' is not there"]
    assert asked.unblocked == 1


@pytest.mark.parametrize(
    "refusal",
    [
        said(KafkaError.GROUP_AUTHORIZATION_FAILED),
        said(KafkaError.TOPIC_AUTHORIZATION_FAILED),
        said(KafkaError._FATAL, fatal=True),
        BrokerUnusable("another topic"),
    ],
)
def test_what_does_not_mend_itself_ends_it(refusal: Exception):
    with pytest.raises(BrokerUnusable):
        Asked(refusal).ask(Member())


def test_who_was_thrown_out_asks_no_more():
    """It would wait for what comes only once it has come back."""
    member = Member()
    member.group = b""
    asked = Asked(said(KafkaError._TIMED_OUT), said(KafkaError._TIMED_OUT))
    assert asked.ask(member) == []
    assert asked.unblocked == 0


def test_who_is_to_stop_asks_no_more():
    answers = iter((True, False, False))
    assert Asked(said(KafkaError._TIMED_OUT)).ask(Member(), lambda: next(answers)) == []
