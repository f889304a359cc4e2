"""A node that has only just begun: it answers, and knows of no broker yet, not even itself.

As much of Kafka's protocol as a client needs to ask what there is (kafka.apache.org/protocol).
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from duly.brokers.kafka.address import address_of
from duly.brokers.kafka.admin import Admin

_METADATA, _API_VERSIONS = 3, 18
_UNDERSTOOD = [(_METADATA, 0, 4), (_API_VERSIONS, 0, 3)]
_FLEXIBLE = 3
CLUSTER = "the-cluster"


class Beginning:
    """Answers these of the questions what there is (1: the first) as one that knows nothing yet.
    ``port`` is where.
    """

    def __init__(self, in_vain: Sequence[int]) -> None:
        self._in_vain = in_vain
        self._asked = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._server.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection, connection.makefile("rb") as requests:
            while size := requests.read(4):
                request = requests.read(struct.unpack(">i", size)[0])
                key, version, correlation = struct.unpack(">hhi", request[:8])
                answer = _versions(version) if key == _API_VERSIONS else self._metadata()
                answer = struct.pack(">i", correlation) + answer
                connection.sendall(struct.pack(">i", len(answer)) + answer)

    def _metadata(self) -> bytes:
        self._asked += 1
        knows = self._asked not in self._in_vain
        itself = struct.pack(">i", 1) + _text("127.0.0.1") + struct.pack(">ih", self.port, -1)
        return b"".join(
            (
                struct.pack(">ii", 0, int(knows)),  # throttled for no time; brokers
                itself if knows else b"",
                _text(CLUSTER),
                struct.pack(">ii", 1 if knows else -1, 0),  # controller; topics
            )
        )


def _versions(version: int) -> bytes:
    is_flexible = version >= _FLEXIBLE
    tags = b"\0" if is_flexible else b""
    each = b"".join(struct.pack(">hhh", *one) + tags for one in _UNDERSTOOD)
    count = struct.pack(">B", len(_UNDERSTOOD) + 1) if is_flexible else struct.pack(">i", 2)
    throttled = struct.pack(">i", 0) if version else b""
    return struct.pack(">h", 0) + count + each + throttled + tags


def _text(text: str) -> bytes:
    return struct.pack(">h", len(text)) + text.encode()


if __name__ == "__main__":
    node = Beginning([int(number) for number in sys.argv[1:]])
    sys.stdout.write(Admin(address_of(f"kafka://127.0.0.1:{node.port}", "")).cluster)
