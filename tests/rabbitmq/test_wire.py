"""What duly publishes reads the same by the short way as by the long one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import duly
from duly.brokers.rabbitmq.wire import message_in, properties_of
from duly.errors import InvalidMessage
from duly.message import Message

T = duly.Topic("t", bytes, guarantee="at-least-once")
NAMED = duly.Topic("t", dict, guarantee="at-least-once", dedup_by="order")

texts = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=256)


@given(source=texts, id=texts, time_ms=st.integers(0, 1 << 41), body=st.binary(max_size=50))
def test_there_and_back_either_way(source: str, id: str, time_ms: int, body: bytes):
    message = Message[bytes]("t", source, id, body, time_ms)
    properties = properties_of(message)
    longer = {**properties["application_headers"], "somebody-elses": 1}
    for declared in (T, NAMED):
        assert message_in(declared, body, properties) == message
        assert message_in(declared, body, {**properties, "application_headers": longer}) == message


@given(key=texts, due_ms=st.none() | st.integers(0, 1 << 41), tenant=texts)
def test_with_key_due_time_and_attributes(key: str, due_ms: int | None, tenant: str):
    message = Message[bytes]("t", "s", "i", b"", 1, key, {"tenant": tenant}, due_ms)
    assert message_in(T, b"", properties_of(message)) == message


@pytest.mark.parametrize("id", ["", "a\nb", "x" * 5000])
def test_an_id_that_is_none_is_refused_by_the_short_way_too(id: str):
    with pytest.raises(InvalidMessage):
        message_in(T, b"", {"message_id": id, "application_headers": {"duly-time-ms": 1}})


@pytest.mark.parametrize("time", ["9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00"])
@pytest.mark.parametrize("own", [{}, {"duly-time-ms": 1 << 62}, {"duly-time-ms": -5}])
def test_a_time_that_no_calendar_has_is_that_of_the_record(time: str, own: dict[str, int]):
    properties = {
        "message_id": "1", "timestamp": 1_700_000_000,
        "application_headers": {"cloudEvents:time": time, **own},
    }  # fmt: skip
    message = message_in(T, b"", properties)
    assert message.time_ms == 1_700_000_000_000
    assert message_in(T, b"", properties_of(message)) == message
