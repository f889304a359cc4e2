"""Headers that are added to whatever an app publishes, such as ``traceparent``.

A stamp only adds: what the publisher gave itself stays, and one that fails is logged and adds
nothing. No guarantee may ever depend on one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

log = logging.getLogger("duly")

Headers = Mapping[str, str] | None
Stamp = Callable[[str, Mapping[str, str]], Mapping[str, str]]
"""Given a topic's name and the headers so far, the headers to add. Called once for each call of
``publish``, ``publish_many`` or ``tx.publish``, on the caller's thread."""


def stamped(stamps: Iterable[Stamp], topic: str, headers: Headers) -> Headers:
    """The headers with what the stamps add."""
    merged = dict(headers or {})
    for stamp in stamps:
        try:
            merged = {**stamp(topic, merged), **merged}
        except Exception:
            log.exception("a stamp failed on a message to topic %s", topic)
    return merged
