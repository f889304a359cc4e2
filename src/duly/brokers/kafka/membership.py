"""Whether what the driver tells of a group is about a member of it."""

from __future__ import annotations

import sys

from duly.errors import BrokerUnusable

_MAGIC = b"CGMDv2:"


def is_member(group: bytes | None) -> bool:
    """Whether what the driver calls its group metadata is that of a member of the group: it has a
    generation, and a name that the coordinator gave it. Raises `BrokerUnusable` where that cannot
    be told.
    """
    if not group:
        return False
    if not group.startswith(_MAGIC):
        raise BrokerUnusable(
            "this version of confluent-kafka tells group metadata in a form that duly does not "
            f"know ({group[:8]!r}); whether a commit is fenced could not be told"
        )
    told = group[len(_MAGIC) :]
    generation = int.from_bytes(told[:4], sys.byteorder, signed=True)
    _, _, member = told[4:].partition(b"\0")
    return generation > 0 and not member.startswith(b"\0")
