"""Lines of a file as payloads of a topic: JSON lines, or CSV with a header."""

from __future__ import annotations

import csv
import io
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Union, get_args, get_origin, get_type_hints

import msgspec

from duly.errors import ConfigurationError, DecodeError, PublishFailed
from duly.message import Topic

# A longer line is no message of the topic anyway: even escaped, a character has six bytes.
LINE_BYTES_PER_BODY_BYTE = 6
SPARE_LINE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Line:
    """One line that can be published. ``number`` counts from 1, in the file."""

    number: int
    payload: Any
    id: str
    key: str | None


@dataclass(frozen=True, slots=True)
class BadLine:
    """One line that cannot, and why."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Reading:
    """How lines become messages: ``batch_name`` names those that have no id of their own."""

    topic: Topic[Any]
    source: str
    batch_name: str | None
    id_field: str | None
    key_field: str | None

    def line(
        self, number: int, fields: Callable[[], Any], payload: Callable[[], Any]
    ) -> Line | BadLine:
        """A line checked as publishing would check it; ``fields`` and ``payload`` decode it."""
        try:
            decoded = payload()
            named = fields() if self.id_field is not None or self.key_field is not None else None
            id = f"{self.batch_name}:{number}"
            if self.id_field is not None:
                id = _named_text(named, self.id_field)
            key = None if self.key_field is None else _named_text(named, self.key_field)
            self.topic.message(decoded, source=self.source, id=id, key=key)
        except (DecodeError, PublishFailed, *_WRONG) as error:
            return BadLine(number, str(error).removeprefix(f"topic {self.topic.name!r}, "))
        return Line(number, decoded, id, key)


_WRONG = (ValueError, TypeError, RecursionError, msgspec.MsgspecError)


def _named_text(fields: Any, name: str) -> str:
    if not isinstance(fields, dict):
        raise TypeError(f"it is no object, so that it has no field {name!r}")
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        shown = "no" if name not in fields else "no text or whole number in"
        raise ValueError(f"there is {shown} field {name!r}")
    return str(value)


# --- JSON lines


def json_lines(file: IO[bytes], reading: Reading) -> Iterator[Line | BadLine]:
    """The lines of a file of JSON values, one a line; empty lines are left out."""
    payload_of = _json_payload(reading.topic)
    limit = reading.topic.max_body_bytes * LINE_BYTES_PER_BODY_BYTE + SPARE_LINE_BYTES
    number = 0
    while line := file.readline(limit):
        number += 1
        if len(line) == limit and not line.endswith(b"\n"):
            _skip_rest(file, limit)
            yield BadLine(number, f"it is longer than {limit:,} bytes")
            continue
        text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
        if text:
            yield reading.line(
                number,
                lambda text=text: msgspec.json.decode(text),  # type: ignore[misc]
                lambda text=text: payload_of(text),  # type: ignore[misc]
            )


def _skip_rest(file: IO[bytes], limit: int) -> None:
    while (rest := file.readline(limit)) and not rest.endswith(b"\n"):
        pass


def _json_payload(topic: Topic[Any]) -> Callable[[bytes], Any]:
    if topic.type is str:
        return msgspec.json.Decoder(str).decode
    if topic.type is bytes:
        decode = msgspec.json.Decoder(str).decode
        return lambda line: decode(line).encode()
    return topic.codec.decode


# --- CSV


def csv_lines(file: IO[bytes], reading: Reading) -> Iterator[Line | BadLine]:
    """The records of a CSV file by the names in its header, numbered by their first line."""
    # Bytes that are no UTF-8 become what no text can hold, so that only their line is refused.
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(min(sys.maxsize, 1 << 30))
    rows = csv.reader(text, strict=True)
    header = next(rows, None)
    if not header:
        return
    if len(set(header)) < len(header):
        raise ConfigurationError("the CSV header names a field twice")
    payload_of = _csv_payload(reading.topic)
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield BadLine(number, f"it is not CSV: {error}")
            continue
        if row is None:
            return
        if not row:
            continue
        if len(row) != len(header):
            yield BadLine(number, f"it has {len(row)} fields, the header has {len(header)}")
            continue
        cells = dict(zip(header, row, strict=True))
        yield reading.line(
            number,
            lambda cells=cells: cells,  # type: ignore[misc]
            lambda cells=cells: payload_of(cells),  # type: ignore[misc]
        )


Cells = Mapping[str, str]


def _csv_payload(topic: Topic[Any]) -> Callable[[Cells], Any]:
    """Cells are text; the topic's type says what they stand for.

    An empty cell of a field that is no text stands for null where the field may be that, and
    for its default otherwise.
    """
    if topic.type is str or topic.type is bytes:
        raise ConfigurationError(
            f"topic {topic.name!r} is of type {topic.type.__name__}: a CSV record is an object. "
            "Use JSON lines, or a topic of dict, a dataclass or a msgspec.Struct"
        )
    validate = getattr(topic.type, "model_validate", None)
    empty = _meaning_of_empty(topic.type)

    def payload(cells: Cells) -> Any:
        typed: dict[str, Any] = {}
        for name, cell in cells.items():
            if cell or name not in empty:
                typed[name] = cell
            elif empty[name]:
                typed[name] = None
        if validate is not None:
            return validate(typed)
        try:
            return msgspec.convert(typed, topic.type, strict=False)
        except msgspec.ValidationError as error:
            raise DecodeError(f"it is not a {topic.codec.type_name}: {error}") from error

    return payload


def _meaning_of_empty(type_: Any) -> Mapping[str, bool]:
    """The fields in which an empty cell is no text: True where it is null."""
    try:
        hints = get_type_hints(type_)
    except Exception:  # noqa: BLE001 - dict, Any and unions have no fields of their own
        return {}
    named = getattr(type_, "__struct_encode_fields__", None)
    fields: Sequence[str] = getattr(type_, "__struct_fields__", tuple(hints))
    wire = dict(zip(fields, named or fields, strict=True))
    return {
        wire.get(name, name): type(None) in _choices(hint)
        for name, hint in hints.items()
        if not {str, Any, object} & _choices(hint)
    }


def _choices(hint: Any) -> set[Any]:
    origin = get_origin(hint)
    if origin is Union or origin is types.UnionType:
        return {choice for each in get_args(hint) for choice in _choices(each)}
    if hasattr(hint, "__metadata__"):  # Annotated
        return _choices(get_args(hint)[0])
    return {hint}
