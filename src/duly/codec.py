"""Payloads to bytes and back, by the topic's Python type.

`bytes` and `str` travel as they are; everything else as JSON by msgspec: JSON values,
dataclasses, `msgspec.Struct` (tagged unions too), `TypedDict`, `datetime`, `Decimal`, and
pydantic models when pydantic is installed. Data never names a Python class.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from duly.errors import ConfigurationError, DecodeError, InvalidMessage

T = TypeVar("T")

JSON = "application/json"
TEXT = "text/plain"
BINARY = "application/octet-stream"


class Codec(Generic[T]):
    """How payloads of one type become bytes and come back.

    ``encode`` raises `InvalidMessage`; ``decode`` raises `DecodeError`. ``decode_fast`` is the
    bare decoder, whose errors are any of ``failures``: for loops that catch once per batch.
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
            raise InvalidMessage(
                f"this payload ({type(payload).__name__}) is not a {self.type_name}: {error}"
            ) from error

    def decode(self, body: bytes) -> T:
        """The payload these bytes hold. Raises `DecodeError` where they are not of the type."""
        try:
            return self.decode_fast(body)
        except DECODE_FAILURES as error:
            raise DecodeError(f"the body is not a {self.type_name}: {error}") from error


# A RecursionError comes from nesting deeper than the interpreter's stack: data, not a defect.
ENCODE_FAILURES = (TypeError, ValueError, RecursionError, OverflowError, msgspec.MsgspecError)
DECODE_FAILURES = (ValueError, RecursionError, msgspec.MsgspecError)


def codec_for(type_: Any) -> Codec[Any]:
    """The codec of a payload type. Raises `ConfigurationError` for a type that has none."""
    name = getattr(type_, "__name__", None) or str(type_)
    if type_ is bytes:
        return Codec(BINARY, "bytes", _exactly(bytes), bytes)
    if type_ is str:
        encode = _exactly(str)
        return Codec(TEXT, "str", lambda p: encode(p).encode(), lambda b: b.decode())
    pydantic = sys.modules.get("pydantic")  # a model's class cannot exist without it
    if pydantic is not None and isinstance(type_, type) and issubclass(type_, pydantic.BaseModel):
        return _pydantic_codec(pydantic, type_, name)
    try:
        decoder = msgspec.json.Decoder(type_)
    except TypeError as error:
        raise ConfigurationError(
            f"duly cannot carry payloads of type {name}: {error}. Use bytes, str, JSON values, "
            "a dataclass, a msgspec.Struct or a pydantic model."
        ) from error
    return Codec(JSON, name, _json_encoder(type_), decoder.decode)


def _exactly(type_: type[T]) -> Callable[[T], T]:
    def check(payload: T) -> T:
        if not isinstance(payload, type_):
            raise TypeError(f"expected {type_.__name__}")
        return payload

    return check


def _json_encoder(type_: Any) -> Callable[[Any], bytes]:
    # A payload of another class would be stored and then dead-lettered by every consumer, so
    # it is refused here. For unions and generics the check is what decoding would do: convert.
    encode = msgspec.json.Encoder().encode
    if isinstance(type_, type):

        def encode_instance(payload: Any) -> bytes:
            if not isinstance(payload, type_):
                raise TypeError(f"expected {type_.__name__}")
            return encode(payload)

        return encode_instance
    if type_ is Any:
        return encode

    def encode_checked(payload: Any) -> bytes:
        msgspec.convert(payload, type_, from_attributes=False)
        return encode(payload)

    return encode_checked


def _pydantic_codec(pydantic: Any, model: Any, name: str) -> Codec[Any]:
    def encode(payload: Any) -> bytes:
        if not isinstance(payload, model):
            raise TypeError(f"expected {name}")
        return payload.__pydantic_serializer__.to_json(payload)  # type: ignore[no-any-return]

    return Codec(JSON, name, encode, model.model_validate_json)
