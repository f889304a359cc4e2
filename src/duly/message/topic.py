"""`Topic`: a named stream of messages with its guarantee and its type; a value."""

from __future__ import annotations

import builtins
import copy
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Generic, TypeVar, overload

from duly.codec import ENCODE_FAILURES, Codec, codec_for, not_of_type
from duly.errors import ConfigurationError, InvalidMessage, MessageTooLarge
from duly.guarantees import Guarantee, GuaranteeName, guarantee_of
from duly.identity import ids as generated
from duly.identity import new_ids
from duly.message.limits import (
    DEFAULT_MAX_BODY_BYTES,
    check_count,
    check_headers,
    check_id,
    check_key,
    check_name,
    is_number,
    is_whole,
    several,
)
from duly.message.message import NO_HEADERS, Alike, Message, now_ms
from duly.message.naming import Naming, WithoutIdentity, check_naming
from duly.versions import UnknownTypes, Upcast, Versions

T = TypeVar("T")


@dataclass(frozen=True, eq=False)  # no slots: Topic[int](...) sets an attribute of its own
class Topic(Generic[T]):
    """A named stream of messages: its Python type and its publishing guarantee.

    A value, usable without an app, so that services can share a package of topics.

    - ``key``: gives a payload's ordering key, where ``publish(key=...)`` does not.
    - ``partitions``: how many keys' streams can be worked side by side by consumers that
      order by key; fixed when the topic first meets its broker. 0: the topic has no order.
    - ``max_body_bytes``: a larger body is refused before it is sent.
    - ``retention_s``: how long a message is kept after every subscription is done with it.
    - ``identity_retention_s``: how long an exactly-once topic remembers ids, to drop repeats.
    - ``may_go_unheard``: nobody need listen. A message that no subscription takes is published all
      the same, where a broker keeps nothing for later ones and would refuse it otherwise.
    - ``dedup_by``: what names an event, the name of a header or a function of the payload. It is
      the id of what is published without one; and of what other programs publish, where a broker
      carries that, it is the identity in place of whatever id they give. The header is one of
      theirs as it stands there.
    - ``without_identity``: what becomes of a message of other programs that nothing names.
      ``"dead"``: a dead letter. ``"accept"``: an event of its own each time that it is delivered;
      exactly-once consumers of the topic are refused then.
    """

    name: str
    type: Callable[..., T] | Any
    guarantee: GuaranteeName
    key: Callable[[T], str] | None = None
    partitions: int = 0
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    retention_s: float = 0.0
    identity_retention_s: float = 7 * 86400.0
    may_go_unheard: bool = False
    dedup_by: Callable[[T], str] | str | None = None
    without_identity: WithoutIdentity = "dead"
    naming: Naming[T] | None = field(init=False, repr=False)
    codec: Codec[T] = field(init=False, repr=False)
    promise: Guarantee = field(init=False, repr=False)
    versions: Versions[T] | None = field(init=False, repr=False, default=None)

    # Two overloads, because a union (``A | B``) is no class to a type checker: annotate such a
    # topic, ``moves: Topic[A | B] = Topic("moves", A | B, ...)``.
    @overload
    def __init__(
        self,
        name: str,
        type: builtins.type[T],
        *,
        guarantee: GuaranteeName,
        key: Callable[[T], str] | None = None,
        partitions: int = 0,
        max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
        retention_s: float = 0.0,
        identity_retention_s: float = 7 * 86400.0,
        may_go_unheard: bool = False,
        dedup_by: Callable[[T], str] | str | None = None,
        without_identity: WithoutIdentity = "dead",
    ) -> None: ...
    @overload
    def __init__(
        self,
        name: str,
        type: Any,
        *,
        guarantee: GuaranteeName,
        key: Callable[[Any], str] | None = None,
        partitions: int = 0,
        max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
        retention_s: float = 0.0,
        identity_retention_s: float = 7 * 86400.0,
        may_go_unheard: bool = False,
        dedup_by: Callable[[T], str] | str | None = None,
        without_identity: WithoutIdentity = "dead",
    ) -> None: ...
    def __init__(
        self,
        name: str,
        type: Any,
        *,
        guarantee: GuaranteeName | None = None,
        key: Callable[[T], str] | None = None,
        partitions: int = 0,
        max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
        retention_s: float = 0.0,
        identity_retention_s: float = 7 * 86400.0,
        may_go_unheard: bool = False,
        dedup_by: Callable[[T], str] | str | None = None,
        without_identity: WithoutIdentity = "dead",
    ) -> None:
        check_name("topic", name)
        promise = guarantee_of(guarantee, f"topic {name!r}")
        if not is_whole(partitions) or not 0 <= partitions <= 256:
            raise ConfigurationError(f"topic {name!r}: partitions={partitions!r}; give 0 to 256")
        if not is_whole(max_body_bytes) or not 1 <= max_body_bytes <= 512 * 1024 * 1024:
            raise ConfigurationError(
                f"topic {name!r}: max_body_bytes={max_body_bytes!r}; give 1 byte to 512 MiB"
            )
        for kept_s in (retention_s, identity_retention_s):
            if not is_number(kept_s) or kept_s < 0:
                raise ConfigurationError(
                    f"topic {name!r}: a retention of {kept_s!r}; give 0 seconds or more"
                )
        if key is not None and not callable(key):
            raise ConfigurationError(
                f"topic {name!r}: key={key!r}; give a function of the payload, or publish(key=...)"
            )
        if not isinstance(may_go_unheard, bool):
            raise ConfigurationError(
                f"topic {name!r}: may_go_unheard={may_go_unheard!r}; True or False"
            )
        check_naming(name, dedup_by, without_identity)
        put = object.__setattr__
        put(self, "name", name)
        put(self, "type", type)
        put(self, "guarantee", promise.value)
        put(self, "key", key)
        put(self, "partitions", partitions)
        put(self, "max_body_bytes", max_body_bytes)
        put(self, "retention_s", retention_s)
        put(self, "identity_retention_s", identity_retention_s)
        put(self, "may_go_unheard", may_go_unheard)
        put(self, "dedup_by", dedup_by)
        put(self, "without_identity", without_identity)
        read = self.decode
        put(self, "naming", None if dedup_by is None else Naming(name, dedup_by, read))
        put(self, "codec", codec_for(type))
        put(self, "promise", promise)

    def versioned(
        self,
        type: str,
        *,
        upcast: Mapping[str, Upcast[T]] | None = None,
        unknown_type: UnknownTypes,
        look_again_s: float = 30.0,
    ) -> Topic[T]:
        """The same topic, whose messages name their type and are read by it.

        - ``type``: the CloudEvents ``type`` of what is published, such as ``shop.checkout.v2``.
        - ``upcast``: for each older type, how a body of it becomes a payload of today's. What
          was published without a type has the topic's name for one.
        - ``unknown_type``: what becomes of a message of any other type, such as one that newer
          code has published already. ``"wait"``: it is looked at again every ``look_again_s``
          seconds, by whatever worker, until one can read it; no attempt is charged.
          ``"dead"``: it becomes a dead letter.

        Raises `ConfigurationError`.
        """
        if callable(self.dedup_by):
            raise ConfigurationError(
                f"topic {self.name!r}: dedup_by is a function of the payload, and what is of "
                'another version has none that it knows: name a header, dedup_by="..."'
            )
        same = copy.copy(self)
        versions = Versions.declared(self.name, type, upcast or {}, unknown_type, look_again_s)
        object.__setattr__(same, "versions", versions)
        return same

    def decode(self, body: bytes) -> T:
        """The payload these bytes hold. Raises `DecodeError` where they are not of the type."""
        return self.codec.decode(body)

    def read(self, message: Message[Any]) -> T:
        """The payload of a stored message, of whatever version. Raises `DecodeError`."""
        if self.versions is None:
            return self.codec.decode(message.body)
        return self.versions.read(self.name, message.headers, message.body, self.codec)

    def message(
        self,
        payload: T,
        *,
        source: str,
        id: str | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        time_ms: int | None = None,
        due_ms: int | None = None,
    ) -> Message[T]:
        """One message of this topic, checked and encoded.

        Raises `InvalidMessage` or `MessageTooLarge`; nothing has been sent then.
        """
        now = now_ms()
        if id is None:
            naming = self.naming
            id = generated.one_at(now) if naming is None else naming.of_payload(payload, headers)
        else:
            check_id(self.name, id)
        if self.versions is not None:
            headers = self.versions.headers(self.name, id, headers)
        checked = NO_HEADERS if not headers else check_headers(self.name, id, headers)
        try:
            body = self.codec.encode_fast(payload)
        except ENCODE_FAILURES as error:
            raise self._not_of_type(payload, id, error) from error
        if len(body) > self.max_body_bytes:
            raise self._too_large(body, id)
        if key is None and self.key is not None:
            key = self._key_of(payload, id)
        if key is not None:
            check_key(self.name, id, key)
        return Message(self.name, source, id, body, time_ms or now, key, checked, due_ms)

    def messages(
        self,
        payloads: Iterable[T],
        *,
        source: str,
        ids: Sequence[str] | None = None,
        keys: Sequence[str | None] | None = None,
        headers: Mapping[str, str] | None = None,
        due_ms: int | None = None,
    ) -> Sequence[Message[T]]:
        """Many messages at once, in order: what `message` does, at a third of its cost.

        ``ids`` and ``keys`` are one for each payload; ``headers``, ``due_ms`` and the time are
        the same for all. Raises as `message` does, for the first that is wrong.
        """
        payloads = several(self.name, payloads)
        count = len(payloads)
        if ids is None:
            ids = self._new_ids(payloads, headers)
        else:
            check_count(self.name, "ids", ids, count)
            for id in ids:
                check_id(self.name, id)
        if count == 0:
            return []
        if self.versions is not None:
            headers = self.versions.headers(self.name, ids[0], headers)
        checked = NO_HEADERS if not headers else check_headers(self.name, ids[0], headers)
        bodies, largest = self._bodies(payloads, ids)
        now = now_ms()
        if keys is None and self.key is None and checked is NO_HEADERS and due_ms is None:
            return Alike.made(self.name, source, now, ids, bodies, largest)
        keys = self._keys(payloads, ids, keys)
        # Without a line of Python for each; ids, bodies and keys are one for each payload.
        topic, time_ms, due = repeat(self.name), repeat(now), repeat(due_ms)
        return [
            *map(Message, topic, repeat(source), ids, bodies, time_ms, keys, repeat(checked), due)
        ]

    def _new_ids(self, payloads: Sequence[T], headers: Mapping[str, str] | None) -> Sequence[str]:
        naming = self.naming
        if naming is None:
            return new_ids(len(payloads))
        return [naming.of_payload(payload, headers) for payload in payloads]

    def _keys(
        self, payloads: Sequence[T], ids: Sequence[str], given: Sequence[str | None] | None
    ) -> Sequence[str | None]:
        if given is not None:
            check_count(self.name, "keys", given, len(payloads))
        elif self.key is None:
            return [None] * len(payloads)
        else:
            given = [self._key_of(payload, id) for payload, id in zip(payloads, ids, strict=True)]
        for id, key in zip(ids, given, strict=True):
            if key is not None:
                check_key(self.name, id, key)
        return given

    def _key_of(self, payload: T, id: str) -> str:
        assert self.key is not None
        try:
            return self.key(payload)
        except Exception as error:
            raise InvalidMessage(
                f"topic {self.name!r}, message {id!r}: its key function failed: {error!r}. "
                "Nothing was sent.",
                message_id=id,
            ) from error

    def _bodies(self, payloads: Sequence[T], ids: Sequence[str]) -> tuple[list[bytes], int]:
        """The body of each, and how many bytes the largest has."""
        bodies: list[bytes] = []
        try:
            bodies.extend(map(self.codec.encode_fast, payloads))
        except ENCODE_FAILURES as error:
            at = len(bodies)
            self._check_sizes(bodies, ids)
            raise self._not_of_type(payloads[at], ids[at], error) from error
        return bodies, self._check_sizes(bodies, ids)

    def _check_sizes(self, bodies: Sequence[bytes], ids: Sequence[str]) -> int:
        limit, largest = self.max_body_bytes, max(map(len, bodies), default=0)
        if largest > limit:
            raise next(
                self._too_large(body, id)
                for id, body in zip(ids, bodies, strict=False)
                if len(body) > limit
            )
        return largest

    def _not_of_type(self, payload: T, id: str, error: Exception) -> InvalidMessage:
        return InvalidMessage(
            f"topic {self.name!r}, message {id!r}: {not_of_type(self.codec, payload, error)}. "
            "Nothing was sent.",
            message_id=id,
        )

    def _too_large(self, body: bytes, id: str) -> MessageTooLarge:
        return MessageTooLarge(
            f"topic {self.name!r}, message {id!r}: the body has {len(body):,} bytes, the "
            f"limit is {self.max_body_bytes:,}. Nothing was sent. Publish a reference to "
            "the data instead, or raise Topic(max_body_bytes=...).",
            message_id=id,
        )


def checked_topic(topic: Topic[T]) -> Topic[T]:
    """The topic. Raises `ConfigurationError` for anything else, such as a topic's name."""
    if isinstance(topic, Topic):
        return topic
    raise ConfigurationError(
        f"{reprlib.repr(topic)} is no topic. The duly.Topic comes first, then the payload."
    )
