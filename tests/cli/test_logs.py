"""Every record says what it is about; for people and for machines."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from duly import Topic, logs
from duly.broker import Delivery

MESSAGE = Topic("orders", dict, guarantee="at-least-once").message({}, source="shop", id="o-1")
DELIVERY = Delivery(MESSAGE, receipt=1, attempt=2)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Where logs go while the root logger has no handlers, pytest's own among them."""
    root, factory = logging.getLogger(), logging.getLogRecordFactory()
    level = root.level

    class Bare(list[logging.Handler]):
        """Takes what `configure` adds; what pytest adds at the start of a test stays away."""

        def append(self, handler: logging.Handler) -> None:
            if not type(handler).__module__.startswith("_pytest"):
                super().append(handler)

    monkeypatch.setattr(root, "handlers", Bare())
    yield io.StringIO()
    root.setLevel(level)
    logging.setLogRecordFactory(factory)


def test_records_of_a_handler_say_which_message(stream: io.StringIO):
    logs.configure("json", stream=stream)
    logs.CURRENT.set(("billing", DELIVERY))
    logging.getLogger("shop").info("charged %d", 5, extra={"cents": 5})
    logs.CURRENT.set(None)
    logging.getLogger("shop").info("idle")
    charged, idle = map(json.loads, stream.getvalue().splitlines())
    assert charged["message"] == "charged 5"
    assert charged["cents"] == 5
    assert charged["level"] == "info"
    assert (charged["duly_consumer"], charged["duly_message_id"]) == ("billing", "o-1")
    assert charged["duly_attempt"] == 2
    assert "duly_consumer" not in idle


def test_a_batch_handlers_records_name_the_first_and_how_many(stream: io.StringIO):
    logs.configure("json", stream=stream)
    logs.CURRENT.set(("billing", [DELIVERY, DELIVERY, DELIVERY]))
    logging.getLogger("shop").info("loaded")
    logs.CURRENT.set(None)
    line = json.loads(stream.getvalue())
    assert (line["duly_message_id"], line["duly_batch"]) == ("o-1", 3)


def test_an_exception_stays_one_line_of_json(stream: io.StringIO):
    logs.configure("json", stream=stream)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("shop").exception("failed", extra={"odd": object()})
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: two\nlines" in json.loads(line)["exception"]


def test_lines_for_people(stream: io.StringIO):
    logs.configure("human", stream=stream)
    logs.CURRENT.set(("billing", DELIVERY))
    logging.getLogger("shop").warning("slow")
    logs.CURRENT.set(None)
    assert stream.getvalue().endswith("WARNING shop: slow  [billing o-1 attempt 2]\n")


def test_what_an_application_configured_is_left_alone(stream: io.StringIO):
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s %(duly_message_id)s"))
    logging.getLogger().addHandler(handler)
    logs.configure("json", stream=io.StringIO())
    logs.CURRENT.set(("billing", DELIVERY))
    logging.getLogger("shop").error("charged")
    logs.CURRENT.set(None)
    assert stream.getvalue() == "charged o-1\n"


def test_installing_twice_changes_nothing(stream: io.StringIO):
    logs.install()
    once = logging.getLogRecordFactory()
    logs.install()
    assert logging.getLogRecordFactory() is once


def test_auto_is_human_on_a_terminal_only():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert logs.chosen("auto", Terminal()) == "human"
    assert logs.chosen("auto", io.StringIO()) == "json"
    assert logs.chosen("json", Terminal()) == "json"
