"""What a cluster says of its features to whoever connects, which the driver does not tell.

The request is ``ApiVersions`` in its third version, the first that every client may send before it
has logged in, and the first whose answer has the features that are finalized (KIP-35, KIP-584).
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Mapping

from duly.brokers.kafka.address import Address

TRANSACTIONS = "transaction.version"

_ANSWERS_S = 5.0
_API_VERSIONS, _VERSION = 18, 3
_FINALIZED = 2
# An answer has a hundred requests of seven bytes, and a few names.
_LONGEST = 1 << 20


def levels(address: Address) -> Mapping[str, int]:
    """The levels of the features that the cluster has finalized, by their names. Raises `OSError`
    where no broker can be asked, and `ValueError` where one answers something else.
    """
    failed: OSError = OSError("no broker is named")
    for place in address.bootstrap.split(","):
        host, _, port = place.rpartition(":")
        host = host.strip("[]")
        try:
            with socket.create_connection((host, int(port)), _ANSWERS_S) as plain:
                return _asked(plain, host, address)
        except OSError as error:
            failed = error
    raise failed


def _asked(plain: socket.socket, host: str, address: Address) -> Mapping[str, int]:
    if not address.is_encrypted:
        return _ask(plain)
    with _context(address.options).wrap_socket(plain, server_hostname=host) as secret:
        return _ask(secret)


def _context(options: Mapping[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=options.get("ssl.ca.location"))
    if options.get("ssl.endpoint.identification.algorithm", "https").lower() != "https":
        context.check_hostname = False
    if certificate := options.get("ssl.certificate.location"):
        context.load_cert_chain(certificate, options.get("ssl.key.location"))
    return context


def _ask(connection: socket.socket) -> Mapping[str, int]:
    head = struct.pack(">hhih", _API_VERSIONS, _VERSION, 1, -1) + b"\0"
    body = b"".join(_compact(text) for text in (b"duly", b"0")) + b"\0"
    connection.sendall(struct.pack(">i", len(head + body)) + head + body)
    (size,) = struct.unpack(">i", _exactly(connection, 4))
    if not 0 < size < _LONGEST:
        raise ValueError(f"an answer of {size} bytes is none of Kafka's")
    return finalized(_exactly(connection, size))


def _compact(text: bytes) -> bytes:
    return bytes([len(text) + 1]) + text


def _exactly(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        piece = connection.recv(count - len(found))
        if not piece:
            raise OSError("the broker has closed the connection")
        found += piece
    return found


def finalized(answer: bytes) -> Mapping[str, int]:
    """The finalized features in an answer, which begins with its number. Raises `ValueError`."""
    try:
        return _Reading(answer).features()
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"an answer that is none of Kafka's: {error}") from error


class _Reading:
    """Reads what stands in an answer, from its beginning."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._at = 4

    def features(self) -> Mapping[str, int]:
        code = self._number(">h")
        if code:
            raise ValueError(f"error {code}: the brokers are from before Kafka 2.4")
        for _ in range(self._varint() - 1):
            self._at += 6
            self._skip_tagged()
        self._at += 4
        found = {}
        for _ in range(self._varint()):
            tag, size = self._varint(), self._varint()
            end = self._at + size
            if tag == _FINALIZED:
                for _ in range(self._varint() - 1):
                    name = self._text()
                    found[name] = self._number(">h")
                    self._at += 2
                    self._skip_tagged()
            self._at = end
        return found

    def _number(self, form: str) -> int:
        (number,) = struct.unpack_from(form, self._answer, self._at)
        self._at += struct.calcsize(form)
        return int(number)

    def _varint(self) -> int:
        number = shift = 0
        while True:
            byte = self._answer[self._at]
            self._at += 1
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
            shift += 7

    def _text(self) -> str:
        size = self._varint() - 1
        text = self._answer[self._at : self._at + size]
        self._at += size
        return text.decode()

    def _skip_tagged(self) -> None:
        for _ in range(self._varint()):
            _, size = self._varint(), self._varint()
            self._at += size
