"""What a cluster says of its features."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from duly.brokers.kafka.address import Address, address_of
from duly.brokers.kafka.features import TRANSACTIONS, finalized, levels
from tests.kafka.work import host_of


def at(place: str) -> Address:
    return address_of(f"kafka://{place}", place)


def text(value: str) -> bytes:
    return bytes([len(value) + 1]) + value.encode()


# Two requests, one of them with something tagged; what is tagged with 0 to 2 and with what nobody
# knows yet.
REQUESTS = b"\x03" + struct.pack(">hhh", 0, 3, 11) + b"\0" + struct.pack(">hhh", 1, 4, 17)
ANSWER = (
    *(struct.pack(">ih", 1, 0), REQUESTS, b"\x01\x07\x02ab", struct.pack(">i", 0), b"\x04"),
    *(b"\x00\x01\x01", b"\x01\x08" + struct.pack(">q", 9)),
    *(b"\x02\x30\x03", text("metadata.version"), struct.pack(">hh", 30, 7), b"\x00"),
    *(text("transaction.version"), struct.pack(">hh", 2, 0), b"\x00", b"\x09\x02xy"),
)


def test_an_answer_is_read_by_what_it_says_itself():
    assert finalized(b"".join(ANSWER)) == {"metadata.version": 30, "transaction.version": 2}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (struct.pack(">ih", 1, 35), "error 35: the brokers are from before"),
        (b"".join(ANSWER)[:-60], "none of Kafka's"),
        (b"", "none of Kafka's"),
        (struct.pack(">ih", 1, 0) + b"\xff" * 30, "none of Kafka's"),
    ],
)
def test_what_is_no_answer_is_told_so(answer: bytes, said: str):
    with pytest.raises(ValueError, match=said):
        finalized(answer)


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A server that says this, whatever it is asked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_one() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(1000)
                client.sendall(answer)

        thread = threading.Thread(target=answer_one)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)


def test_whoever_is_no_broker_is_found_out():
    with (
        answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as place,
        pytest.raises(ValueError, match="bytes"),
    ):
        levels(at(place))
    with answering(b"") as place, pytest.raises(OSError, match="closed the connection"):
        levels(at(place))


def test_the_next_broker_is_asked_where_one_is_away(kafka_url: str):
    with answering(b"") as away:
        assert levels(at(f"{away},{host_of(kafka_url)}"))[TRANSACTIONS] == 2
