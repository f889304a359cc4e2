"""Versions of a topic's payload: the type that messages name, and how older ones are read.

A message says what it is by the CloudEvents attribute ``type``, which duly writes where a topic
declares it (`Topic.versioned`); without one, its type is the topic's name. What a type means is
looked up in the declaration and nowhere else: no class named by a message is ever imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeVar, get_args

from duly.codec import Codec, codec_for
from duly.errors import ConfigurationError, DecodeError, InvalidMessage, UnknownType

Old = TypeVar("Old")
New = TypeVar("New")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

UnknownTypes = Literal["wait", "dead"]

MAX_TYPE_CHARS = 128


class Upcast(Generic[T_co]):
    """How payloads of an older type become the present one: ``Upcast(OrderV1, order_of_v1)``.

    ``old`` is the Python type that such bodies hold, ``function`` makes a newer payload of one.
    ``then`` goes on from there, so that each function knows two neighbouring versions only:
    ``Upcast(OrderV1, v2_of_v1).then(v3_of_v2)``. Functions are pure: they run at every attempt.
    Raises `ConfigurationError` for a type that duly cannot carry.
    """

    __slots__ = ("_codec", "_functions")

    def __init__(self, old: type[Old], function: Callable[[Old], T_co]) -> None:
        if not callable(function):
            raise ConfigurationError(f"Upcast({old!r}, {function!r}): give a function of the old")
        self._codec: Codec[Any] = codec_for(old)
        self._functions: tuple[Callable[[Any], Any], ...] = (function,)

    def then(self, function: Callable[[T_co], New]) -> Upcast[New]:
        """The same, and this function of what it gives."""
        if not callable(function):
            raise ConfigurationError(f"Upcast.then({function!r}): give a function of the newer")
        further: Upcast[Any] = Upcast.__new__(Upcast)
        further._codec, further._functions = self._codec, (*self._functions, function)
        return further

    def read(self, body: bytes) -> T_co:
        """The newer payload of an older body. Raises `DecodeError`, and what a function raises."""
        payload = self._codec.decode(body)
        for function in self._functions:
            payload = function(payload)
        return payload  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Versions(Generic[T]):
    """What a topic declares of its types.

    ``type`` is that of what is published, ``upcast`` says how older ones are read. What is
    neither ``"wait"``\\ s, looked at again every ``look_again_s`` seconds, or is ``"dead"``.
    """

    type: str
    # Functions have no equality worth the name.
    upcast: Mapping[str, Upcast[T]] = field(compare=False, repr=False)
    unknown_type: UnknownTypes
    look_again_s: float

    @classmethod
    def declared(
        cls,
        topic: str,
        type: Any,
        upcast: Mapping[str, Upcast[T]],
        unknown_type: Any,
        look_again_s: Any,
    ) -> Versions[T]:
        """Checked. Raises `ConfigurationError` for what is no such declaration."""
        where = f"topic {topic!r}, versioned({type!r})"
        for name in (type, *upcast):
            if not isinstance(name, str) or not _is_type(name):
                raise ConfigurationError(
                    f"{where}: type {name!r}: a CloudEvents type is a non-empty str of at most "
                    f"{MAX_TYPE_CHARS} printable characters, such as shop.checkout.v2"
                )
        if type in upcast:
            raise ConfigurationError(f"{where}: upcast has {type!r}, which is the present type")
        for name, one in upcast.items():
            if not isinstance(one, Upcast):
                raise ConfigurationError(
                    f"{where}: upcast[{name!r}] is {one!r}; give duly.Upcast(OldType, function)"
                )
        if unknown_type not in get_args(UnknownTypes):
            raise ConfigurationError(
                f"{where}: unknown_type={unknown_type!r}; a message of a type that this code does "
                'not know yet can "wait" until newer code reads it, or be "dead": a dead letter'
            )
        number = isinstance(look_again_s, int | float) and not isinstance(look_again_s, bool)
        if not number or not isfinite(look_again_s) or look_again_s <= 0:
            raise ConfigurationError(
                f"{where}: look_again_s={look_again_s!r}; give seconds, more than 0"
            )
        return cls(type, MappingProxyType(dict(upcast)), unknown_type, float(look_again_s))

    def headers(self, topic: str, id: str, given: Mapping[str, str] | None) -> Mapping[str, str]:
        """A message's headers with its type. Raises `InvalidMessage` where they name another."""
        named = self.type if given is None else given.get("type", self.type)
        if named != self.type:
            raise InvalidMessage(
                f"topic {topic!r}, message {id!r}: header type={named!r}, and the topic is "
                f"versioned({self.type!r}). Leave the header out; nothing was sent.",
                message_id=id,
            )
        return {**(given or {}), "type": self.type}

    def read(self, topic: str, headers: Mapping[str, str], body: bytes, codec: Codec[T]) -> T:
        """The payload of a stored message as the topic's present type.

        Raises `UnknownType`, and `DecodeError` where the body is not what its type says.
        """
        named = headers.get("type", topic)
        if named == self.type:
            return codec.decode(body)
        upcast = self.upcast.get(named)
        if upcast is None:
            known = ", ".join(map(repr, (self.type, *self.upcast)))
            raise UnknownType(f"its type is {named[:MAX_TYPE_CHARS]!r}; this code knows {known}")
        try:
            return upcast.read(body)
        except DecodeError as error:
            raise DecodeError(f"of type {named!r}: {error}") from error
        except Exception as error:
            # Not its text, which may quote the data.
            kind = type(error).__name__
            raise DecodeError(f"its upcast from {named!r} failed with {kind}") from error


def _is_type(name: str) -> bool:
    return 0 < len(name) <= MAX_TYPE_CHARS and name.isprintable()
