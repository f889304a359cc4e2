"""Payloads to bytes and back, by the topic's Python type.

`bytes` and `str` travel as they are; everything else as JSON by msgspec: JSON values,
dataclasses, `msgspec.Struct` (tagged unions too), `TypedDict`, `datetime`, `Decimal`, and
pydantic models when pydantic is installed. Data never names a Python class.

What is encoded is decoded once before it is sent, so that a body which no consumer could read
is refused at its publisher. That costs less than comparing the payload with its type would:
0.2 µs for a small struct, 0.4 µs for a dataclass (measured), and it is the very judge that
consumers have.
"""

from __future__ import annotations

import json
import math
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import msgspec
import msgspec.inspect

from duly.errors import ConfigurationError, DecodeError, InvalidMessage

T = TypeVar("T")

JSON = "application/json"
TEXT = "text/plain"
BINARY = "application/octet-stream"

# A RecursionError comes from nesting deeper than the interpreter's stack: data, not a defect.
ENCODE_FAILURES = (TypeError, ValueError, RecursionError, OverflowError, msgspec.MsgspecError)
DECODE_FAILURES = (ValueError, RecursionError, msgspec.MsgspecError)


class Codec(Generic[T]):
    """How payloads of one type become bytes and come back.

    ``encode`` raises `InvalidMessage`; ``decode`` raises `DecodeError`. The ``_fast`` ones are
    bare, for loops that catch once per batch: they raise any of `ENCODE_FAILURES` and
    `DECODE_FAILURES`.
    """

    __slots__ = ("content_type", "decode_fast", "encode_fast", "type_name")

    def __init__(
        self,
        content_type: str,
        type_name: str,
        encode: Callable[[T], bytes],
        decode: Callable[[bytes], T],
    ) -> None:
        self.content_type = content_type
        self.type_name = type_name
        self.encode_fast = encode
        self.decode_fast = decode

    def encode(self, payload: T) -> bytes:
        """The payload as bytes. Raises `InvalidMessage` where it is not of the type."""
        try:
            return self.encode_fast(payload)
        except ENCODE_FAILURES as error:
            raise InvalidMessage(not_of_type(self, payload, error)) from error

    def decode(self, body: bytes) -> T:
        """The payload these bytes hold. Raises `DecodeError` where they are not of the type."""
        try:
            return self.decode_fast(body)
        except DECODE_FAILURES as error:
            raise DecodeError(f"the body is not a {self.type_name}: {_reason(error)}") from error


def not_of_type(codec: Codec[Any], payload: Any, error: Exception) -> str:
    """What was wrong with a payload, in words."""
    reason = _reason(error)
    if "got `null`" in reason:
        reason += " (a NaN and an infinity have no form in JSON)"
    return f"this payload ({type(payload).__name__}) is not a {codec.type_name}: {reason}"


def _reason(error: Exception) -> str:
    """The error in one line, without the data: a payload may hold what no log may."""
    errors: Any = getattr(error, "errors", None)
    if not callable(errors):
        return str(error)
    found: Any = errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(
        f"{each['msg']} - at `{'.'.join(str(part) for part in each['loc']) or '$'}`"
        for each in found[:5]
    )


def codec_for(type_: Any) -> Codec[Any]:
    """The codec of a payload type. Raises `ConfigurationError` for a type that has none."""
    name = _named(type_)
    if type_ is bytes:
        return Codec(BINARY, "bytes", _bytes, bytes)
    if type_ is str:
        return Codec(TEXT, "str", _text, bytes.decode)
    try:
        facts = _facts(type_)
    except (TypeError, NameError) as error:
        raise ConfigurationError(
            f"duly cannot carry payloads of type {name}: {error}. Use bytes, str, JSON values, "
            "a dataclass, a msgspec.Struct or a pydantic model."
        ) from error
    if not facts.foreign:
        decode = msgspec.json.Decoder(type_).decode
        encode = msgspec.json.Encoder(order="deterministic").encode
        return Codec(JSON, name, _checked(type_, encode, decode, facts), decode)
    pydantic = sys.modules.get("pydantic")  # a model's class cannot exist without it
    if pydantic is not None and all(_is_model(pydantic, each) for each in facts.foreign):
        return _pydantic_codec(pydantic, type_, name)
    raise ConfigurationError(
        f"duly cannot carry payloads of type {name}: JSON has nothing for "
        f"{', '.join(_named(each) for each in facts.foreign)}. Use bytes, str, JSON values, a "
        "dataclass, a msgspec.Struct or a pydantic model."
    )


def _named(type_: Any) -> str:
    return type_.__name__ if isinstance(type_, type) else str(type_)


def _is_model(pydantic: Any, type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, pydantic.BaseModel)


def _bytes(payload: Any) -> bytes:
    if not isinstance(payload, bytes):
        raise TypeError("expected bytes")
    return payload


def _text(payload: Any) -> bytes:
    if not isinstance(payload, str):
        raise TypeError("expected str")
    return payload.encode()


class _Facts(typing.NamedTuple):
    """What decides which checks a type needs. ``foreign`` are classes msgspec knows not."""

    foreign: tuple[Any, ...]
    floats: bool


def _facts(type_: Any) -> _Facts:
    seen: set[int] = set()
    waiting: list[Any] = [msgspec.inspect.type_info(type_)]
    foreign, floats = list[Any](), False
    while waiting:
        info = waiting.pop()
        if id(info) in seen:
            continue
        seen.add(id(info))
        if isinstance(info, msgspec.inspect.CustomType):
            foreign.append(info.cls)
        elif isinstance(info, (msgspec.inspect.AnyType, msgspec.inspect.FloatType)):
            floats = True
        if isinstance(info, (msgspec.inspect.Type, msgspec.inspect.Field)):
            waiting.extend(_parts(getattr(info, name) for name in info.__struct_fields__))
    return _Facts(tuple(foreign), floats)


def _parts(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found.extend(value if isinstance(value, tuple) else [value])
    return found


def _checked(
    type_: Any,
    encode: Callable[[Any], bytes],
    decode: Callable[[bytes], Any],
    facts: _Facts,
) -> Callable[[Any], bytes]:
    # TypedDict and (from 3.11) Any are classes that no instance can be asked about.
    by_class = isinstance(type_, type) and type_ is not Any and not typing.is_typeddict(type_)
    expected: Any = type_ if by_class else object
    # What these encode to, they decode from.
    decodes = type_ not in (Any, object, dict, list)
    floats = facts.floats

    def encode_checked(payload: Any) -> bytes:
        if not isinstance(payload, expected):
            raise TypeError(f"expected {expected.__name__}")
        body = encode(payload)
        if decodes:
            decode(body)
        # JSON has no NaN and no infinity, and the encoder writes null in their place.
        if floats and b"null" in body:
            _refuse_non_finite(payload)
        return body

    return encode_checked


def _refuse_non_finite(payload: Any) -> None:
    waiting = [msgspec.to_builtins(payload)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError(f"JSON cannot carry {value}; send None, or leave it out")
        elif isinstance(value, Mapping):
            waiting.extend(value.keys())
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting.extend(value)


def _pydantic_codec(pydantic: Any, type_: Any, name: str) -> Codec[Any]:
    adapter = pydantic.TypeAdapter(type_)
    expected = type_ if isinstance(type_, type) else object

    def encode(payload: Any) -> bytes:
        if not isinstance(payload, expected):
            raise TypeError(f"expected {name}")
        # by_alias: what is read back by alias is written by alias.
        body: bytes = adapter.dump_json(payload, by_alias=True, warnings="none")
        adapter.validate_json(body)
        if b"null" in body:
            json.dumps(adapter.dump_python(payload, mode="json"), allow_nan=False)
        return body

    return Codec(JSON, name, encode, adapter.validate_json)
