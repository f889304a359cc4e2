"""What duly writes for a publish is what the driver would write, byte by byte."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from amqp import spec
from amqp.method_framing import frame_writer
from amqp.serialization import dumps
from hypothesis import example, given
from hypothesis import strategies as st

from duly.brokers.rabbitmq.frames import Content, frames_of, id_of, written
from duly.brokers.rabbitmq.link import content
from duly.brokers.rabbitmq.wire import properties_of
from duly.message import Message

texts = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=256)
names = st.text("abcdefghij0123456789", min_size=1, max_size=64)
times = st.integers(0, 1 << 41)
FRAME_MAX = 4096


def by_the_driver(message: Any, exchange: str, key: str, *, mandatory: bool) -> bytes:
    sent = bytearray()
    connection = SimpleNamespace(frame_max=FRAME_MAX, bytes_sent=0)
    write = frame_writer(connection, SimpleNamespace(write=sent.extend))
    said = dumps("Bssbb", (0, exchange, key, mandatory, False))
    write(1, 7, spec.Basic.Publish, said, message)
    return bytes(sent)


@given(
    message=st.builds(
        Message[bytes],
        topic=names,
        source=texts,
        id=texts,
        body=st.binary(max_size=20) | st.sampled_from([4087, 4088, 4089, 9000]).map(bytes),
        time_ms=times,
        key=st.none() | texts,
        headers=st.dictionaries(names, texts, max_size=3),
        due_ms=st.none() | times,
    ),
    exchange=names,
    key=names | st.just(""),
    mandatory=st.booleans(),
)
@example(Message("t", "s" * 256, "i", b"", 1 << 41), "e", "", True)
@example(Message("t", "s", "é" * 128, b"", 1 << 41), "e", "", True)
@example(Message("t", "s", "i", b"x", (1 << 31) - 1), "e", "", True)
@example(Message("t", "s", "i", b"x", 1 << 31), "e", "", False)
def test_it_is_what_the_driver_writes(
    message: Message[bytes], exchange: str, key: str, mandatory: bool
):
    plain = content(message.body, properties_of(message))
    expected = by_the_driver(plain, exchange, key, mandatory=mandatory)
    own = written(message)
    for each in (own, plain):
        if each is not None:
            assert frames_of(each, 7, exchange, key, mandatory, FRAME_MAX) == expected
    assert id_of(own or plain) == id_of(plain)


def test_most_messages_are_written_without_the_driver():
    bare = Message[bytes]("t", "s", "i", b"", 1_700_000_000_000)
    full = Message[bytes]("t", "s", "i", b"", 1_700_000_000_000, "k", {"traceparent": "00-1-2-00"})
    assert {type(written(each)) for each in (bare, full)} == {Content}


@pytest.mark.parametrize("key", ["k" * 256, "é" * 128])
def test_what_amqp_has_no_room_for_is_refused(key: str):
    own = written(Message("t", "s", "i", b"", 1_700_000_000_000))
    with pytest.raises(Exception, match=r"255|format"):
        frames_of(own, 7, "e", key, True, FRAME_MAX)
