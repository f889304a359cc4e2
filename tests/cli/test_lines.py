"""Lines as payloads of a topic, and what becomes of a batch that was not plainly published."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Annotated, Any, TypedDict

import msgspec
import pydantic
import pytest

from duly import Topic
from duly.broker import Published, RepeatDropped
from duly.cli.lines import BadLine, Line, Reading, csv_lines, json_lines
from duly.cli.publishing import BATCH, REPEATS, Display, Publishing, Stopped, Tally
from duly.errors import ConfigurationError, PublishFailed, PublishIncomplete, PublishUnknown


class Flight(msgspec.Struct, rename="camel"):
    carrier: str
    dep_delay: int | None
    air_time: float = 0.0
    tail_number: str | None = None


class Model(pydantic.BaseModel):
    carrier: str
    delay: Annotated[int | None, "minutes"] = None


class Typed(TypedDict):
    carrier: str
    delay: int


def reading(type_: Any, *, id_field: str | None = None, key_field: str | None = None) -> Reading:
    topic = Topic("flights", type_, guarantee="exactly-once", max_body_bytes=10_000)
    return Reading(topic, "shop", "file", id_field, key_field)


def csv_of(text: str, type_: Any, **fields: Any) -> list[Line | BadLine]:
    return list(csv_lines(io.BytesIO(text.encode()), reading(type_, **fields)))


def payloads(lines: Sequence[Line | BadLine]) -> list[Any]:
    assert all(isinstance(line, Line) for line in lines), lines
    return [line.payload for line in lines if isinstance(line, Line)]


def test_empty_cells_are_null_a_default_or_text():
    text = "carrier,depDelay,airTime,tailNumber\nUA,,,\n,5,1.5,N1\n"
    assert payloads(csv_of(text, Flight)) == [
        Flight("UA", None, 0.0, ""),
        Flight("", 5, 1.5, "N1"),
    ]


def test_models_and_typed_dicts():
    text = "carrier,delay\nUA,7\n"
    assert payloads(csv_of(text, Model)) == [Model(carrier="UA", delay=7)]
    assert payloads(csv_of("carrier,delay\nUA,\n", Model)) == [Model(carrier="UA")]
    assert payloads(csv_of(text, Typed)) == [{"carrier": "UA", "delay": 7}]
    assert payloads(csv_of(text, dict)) == [{"carrier": "UA", "delay": "7"}]
    (bad,) = csv_of("carrier,delay\nUA,late\n", Model)
    assert isinstance(bad, BadLine)


@pytest.mark.parametrize("type_", [str, bytes])
def test_csv_needs_fields(type_: Any):
    with pytest.raises(ConfigurationError, match="a CSV record is an object"):
        csv_of("a,b\n1,2\n", type_)


def test_a_header_that_names_a_field_twice():
    with pytest.raises(ConfigurationError, match="twice"):
        csv_of("a,a\n1,2\n", dict)


def test_empty_csv():
    assert csv_of("", dict) == []
    assert csv_of("a,b\n", dict) == []


def test_ids_and_keys_from_fields():
    lines = csv_of("carrier,delay\nUA,7\n", Typed, id_field="carrier", key_field="delay")
    assert [(line.id, line.key) for line in lines if isinstance(line, Line)] == [("UA", "7")]
    (line,) = json_lines(io.BytesIO(b'{"n": 5, "x": true}'), reading(dict, id_field="n"))
    assert isinstance(line, Line)
    assert line.id == "5"
    (bad,) = json_lines(io.BytesIO(b'{"n": 5, "x": true}'), reading(dict, id_field="x"))
    assert bad == BadLine(1, "there is no text or whole number in field 'x'")


def test_text_and_bytes_are_json_strings():
    for type_, value in ((str, "grüße"), (bytes, "grüße".encode())):
        lines = list(json_lines(io.BytesIO('"grüße"\n'.encode()), reading(type_)))
        assert payloads(lines) == [value]
        assert lines[0].number == 1


def test_lines_over_the_limit_are_left_out_without_being_read_whole():
    long = b'"' + b"x" * 1_000_000 + b'"\n'
    first, second, third = json_lines(
        io.BytesIO(long + b'"short"\n"' + b"y" * 20_000 + b'"'), reading(str)
    )
    assert isinstance(first, BadLine)
    assert "longer than" in first.reason
    assert isinstance(second, Line)
    assert second.number == 2
    assert isinstance(third, BadLine)
    assert "the limit is 10,000" in third.reason


# --- batches


class StubApp:
    """Answers each `publish_many` with the next of its answers, for every message alike."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.ids: list[Sequence[str]] = []

    def publish_many(self, topic: Any, payloads: Any, *, ids: Any, keys: Any) -> Any:
        self.ids.append(ids)
        answer = self.answers.pop(0)
        outcomes = [answer(id) for id in ids]
        if any(isinstance(outcome, Exception) for outcome in outcomes):
            raise PublishIncomplete("some", outcomes)
        return outcomes


def unknown(id: str) -> PublishUnknown:
    return PublishUnknown("no answer", message_id=id)


def failed(id: str) -> PublishFailed:
    return PublishFailed("disk full", message_id=id)


def publishing(app: StubApp, guarantee: Any = "exactly-once") -> tuple[Publishing, Tally]:
    tally = Tally()
    topic = Topic("orders", dict, guarantee=guarantee)
    run = Publishing(app, topic, tally, Display(None, io.BytesIO(), None))  # type: ignore[arg-type]
    return run, tally


LINES = [Line(n, {}, f"file:{n}", None) for n in range(1, 4)]


def test_an_unknown_outcome_is_repeated_under_the_same_ids():
    app = StubApp(unknown, unknown, RepeatDropped)
    run, tally = publishing(app)
    run.all(iter(LINES), 1)
    assert app.ids == [["file:1", "file:2", "file:3"]] * 3
    assert (tally.published, tally.repeats, tally.last_line) == (0, 3, 3)


def test_an_outcome_that_stays_unknown_stops_the_run():
    run, _ = publishing(StubApp(*[unknown] * REPEATS))
    with pytest.raises(Stopped, match="line 1 "):
        run.all(iter(LINES), 1)


def test_where_nothing_drops_repeats_an_unknown_outcome_is_not_repeated():
    app = StubApp(unknown)
    run, _ = publishing(app, "at-least-once")
    with pytest.raises(Stopped, match="no answer"):
        run.all(iter(LINES), 1)
    assert len(app.ids) == 1


def test_a_broker_that_takes_no_more_stops_the_run():
    run, tally = publishing(StubApp(Published, failed))
    many = [Line(n, {}, f"file:{n}", None) for n in range(1, BATCH + 2)]
    with pytest.raises(Stopped, match="disk full"):
        run.all(iter(many), 1)
    assert (tally.published, tally.last_line) == (BATCH, BATCH)
