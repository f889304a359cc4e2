"""Whatever others publish: what is read of it can be written again, as retries are."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import duly
from duly.brokers.kafka.wire import headers_of, message_in, read_headers
from duly.errors import InvalidMessage
from duly.message import Message, now_ms

T = duly.Topic("t", bytes, guarantee="at-least-once")

STAMP_MS = 1_700_000_000_000
texts = st.text(max_size=300)


def again(message: Message[bytes]) -> Message[bytes]:
    """Written, and read back."""
    key = None if message.key is None else message.key.encode()
    return message_in(T, read_headers(headers_of(message)), key, message.body, STAMP_MS)


@example(id="0", source="", time=None, key=None, stamp_ms=8_975_044_746_272)
@given(
    id=texts, source=texts, time=st.none() | texts | st.datetimes().map(str),
    key=st.none() | st.binary(max_size=20), stamp_ms=st.integers(-(1 << 63), (1 << 63) - 1),
)  # fmt: skip
def test_what_was_read_is_written_and_read_the_same(
    id: str, source: str, time: str | None, key: bytes | None, stamp_ms: int
):
    headers = {"ce_id": id, "ce_source": source}
    if time is not None:
        headers["ce_time"] = time
    try:
        message = message_in(T, headers, key, b"body", stamp_ms)
    except InvalidMessage:
        return
    assert again(message) == message


@pytest.mark.parametrize(
    "time",
    [
        "9999-12-31T23:59:59-14:00", "9999-12-31T23:59:59.9999", "0001-01-01T00:00:00+14:00",
        "1969-12-31T23:59:59Z", "yesterday",
    ],
)  # fmt: skip
def test_a_time_that_no_calendar_has_is_that_of_the_record(time: str):
    message = message_in(T, {"ce_id": "1", "ce_time": time}, None, b"", STAMP_MS)
    assert message.time_ms == STAMP_MS
    assert again(message) == message


@pytest.mark.parametrize("stamp_ms", [-1, 10**17])
def test_a_record_without_a_time_is_of_now(stamp_ms: int):
    before_ms = now_ms()
    message = message_in(T, {"ce_id": "1"}, None, b"", stamp_ms)
    assert before_ms <= message.time_ms <= now_ms()
