"""What Kafka forgets at times: the end of a transaction in one of its partitions.

So stands a log after the only node has restarted for longer than a transaction may last: the
coordinator has aborted it, and the partition was not told.
"""

from __future__ import annotations

import struct
from pathlib import Path

from tests.servers.kafka import KafkaNode

_HEAD = struct.Struct(">qiibIhiqqqhii")
_CONTROL = 0x20
# Where the one record of such a batch says what it is: behind five numbers of a byte each, and the
# version of its key.
_ENDING = struct.Struct(">h")
_ENDING_AT = _HEAD.size + 5 + 2
_ABORT = 0


def forget_the_end(node: KafkaNode, topic: str) -> int:
    """Kill the node, cut off what says at last in this topic's partitions that a transaction was
    aborted, with all that follows, and start it again; how often. ``topic`` may be a pattern.
    """
    node.kill()
    count = 0
    for folder in (node.folder / "data").glob(f"{topic}-*"):
        for path in folder.glob("*.log"):
            count += _cut(path)
        # Made anew from the log.
        for path in [*folder.glob("*.snapshot"), *folder.glob("*.*index")]:
            path.unlink()
    node.start()
    return count


def _cut(path: Path) -> bool:
    data = path.read_bytes()
    start, last = 0, -1
    while start + _HEAD.size <= len(data):
        head = _HEAD.unpack_from(data, start)
        if head[1] <= 0:
            break
        if head[5] & _CONTROL:
            is_abort = _ENDING.unpack_from(data, start + _ENDING_AT)[0] == _ABORT
            last = start if is_abort else -1
        start += 12 + head[1]
    if last < 0:
        return False
    with path.open("r+b") as file:
        file.truncate(last)
    return True
