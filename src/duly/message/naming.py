"""What names an event where its message says nothing else: `Topic(dedup_by=...)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, TypeVar, get_args

from duly.errors import ConfigurationError, InvalidMessage
from duly.message.limits import check_id

T = TypeVar("T")

DedupBy = str | Callable[[T], str]
"""The name of a header, or a function of the payload."""

WithoutIdentity = Literal["dead", "accept"]


def check_naming(topic: str, dedup_by: Any, without_identity: Any) -> None:
    """Refuse what names no event. Raises `ConfigurationError`."""
    named = callable(dedup_by) or (isinstance(dedup_by, str) and dedup_by)
    if dedup_by is not None and not named:
        raise ConfigurationError(
            f"topic {topic!r}: dedup_by={dedup_by!r}; give the name of a header, or a function of "
            "the payload"
        )
    if without_identity not in get_args(WithoutIdentity):
        raise ConfigurationError(
            f'topic {topic!r}: without_identity={without_identity!r}; "dead": such a message is a '
            'dead letter, or "accept": it is an event of its own each time that it is delivered'
        )


class Naming(Generic[T]):
    """How the messages of one topic are named. ``read`` makes a payload of a body."""

    def __init__(self, topic: str, dedup_by: DedupBy[T], read: Callable[[bytes], T]) -> None:
        self._topic = topic
        self._by = dedup_by
        self._read = read

    def of_payload(self, payload: T, headers: Mapping[str, str] | None) -> str:
        """The id of what is to be published. Raises `InvalidMessage` where there is none."""
        if isinstance(self._by, str):
            id = (headers or {}).get(self._by)
        else:
            id = self._call(self._by, payload)
        if id is None:
            raise InvalidMessage(
                f"topic {self._topic!r}: dedup_by={self._by!r}, and the message has no such "
                "header. Give it, or an id. Nothing was sent."
            )
        check_id(self._topic, id)
        return id

    def of_foreign(self, headers: Mapping[str, Any], body: bytes) -> str | None:
        """The id of what another program has published, with all headers that it has there; None:
        it has none. Raises `InvalidMessage` where it cannot be told.
        """
        if isinstance(self._by, str):
            found = headers.get(self._by)
            return None if found is None else str(found)
        try:
            payload = self._read(body)
        except Exception as error:
            # Not its text, which may quote the data.
            raise InvalidMessage(
                f"topic {self._topic!r}: the body cannot be decoded, so dedup_by names no event: "
                f"{type(error).__name__}"
            ) from error
        return self._call(self._by, payload)

    def _call(self, function: Callable[[T], str], payload: T) -> str:
        try:
            return function(payload)
        except Exception as error:
            raise InvalidMessage(
                f"topic {self._topic!r}: its dedup_by function failed: {type(error).__name__}"
            ) from error
