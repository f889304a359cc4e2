"""Messages: identity, attributes, limits, ids, and batches of them."""

from __future__ import annotations

import os
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import duly
from duly.identity import Ids, new_ids
from duly.message import MAX_DELAY_S, Alike, due_ms, largest_of, topics_of

topic = duly.Topic("orders", dict, guarantee="at-least-once")
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class TestNaming:
    def test_a_function_of_the_payload_gives_the_id(self):
        named = duly.Topic(
            "o", dict[str, str], guarantee="at-least-once", dedup_by=lambda o: o["number"]
        )
        assert named.message({"number": "o-1"}, source="shop").id == "o-1"
        assert named.message({"number": "o-1"}, source="shop", id="other").id == "other"
        several = named.messages([{"number": "a"}, {"number": "b"}], source="shop")
        assert [message.id for message in several] == ["a", "b"]

    def test_a_header_gives_the_id(self):
        named = duly.Topic("o", dict, guarantee="at-least-once", dedup_by="number")
        assert named.message({}, source="shop", headers={"number": "o-1"}).id == "o-1"
        with pytest.raises(duly.InvalidMessage, match="no such header"):
            named.message({}, source="shop")

    @pytest.mark.parametrize("wrong", [lambda _: "", lambda _: 7, lambda o: o["none"]])
    def test_what_names_nothing_is_refused(self, wrong: Any):
        named: duly.Topic[Any] = duly.Topic("o", dict, guarantee="at-least-once", dedup_by=wrong)
        with pytest.raises(duly.InvalidMessage):
            named.message({}, source="shop")

    def test_a_function_knows_one_version_only(self):
        named = duly.Topic(
            "o", dict[str, str], guarantee="at-least-once", dedup_by=lambda o: o["number"]
        )
        with pytest.raises(duly.ConfigurationError, match="name a header"):
            named.versioned("o.v2", unknown_type="wait")
        by_header = duly.Topic("o", dict, guarantee="at-least-once", dedup_by="number")
        assert by_header.versioned("o.v2", unknown_type="wait").naming is not None


class TestIds:
    def test_are_uuids_of_version_7_that_grow(self):
        ids = [topic.message({}, source="shop").id for _ in range(2000)] + new_ids(2000)
        assert ids == sorted(set(ids))
        parsed = [uuid.UUID(id) for id in ids]
        assert {(each.version, each.variant) for each in parsed} == {(7, uuid.RFC_4122)}
        now = time.time_ns() // 1_000_000
        assert all(0 <= now - (each.int >> 80) < 60_000 for each in parsed)

    def test_grow_when_the_clock_is_set_back(self, monkeypatch):
        ids = Ids()
        before = ids.one()
        real = time.time_ns
        monkeypatch.setattr(time, "time_ns", lambda: real() - 3_600_000_000_000)
        assert before < ids.one() < ids.take(1)[0]

    def test_are_unique_over_threads(self):
        found: list[list[str]] = []
        threads = [
            threading.Thread(target=lambda: found.append([new_ids(1)[0] for _ in range(5000)]))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert all(ids == sorted(ids) for ids in found)
        assert len({id for ids in found for id in ids}) == 40_000

    def test_a_forked_child_does_not_count_on_from_its_parents(self):
        read, write = os.pipe()
        new_ids(1)
        pid = os.fork()
        if pid == 0:
            os.write(write, "\n".join(new_ids(1000)).encode())
            os._exit(0)
        mine = new_ids(1000)
        os.close(write)
        with os.fdopen(read) as pipe:
            theirs = pipe.read().split("\n")
        assert os.waitpid(pid, 0)[1] == 0
        assert len(theirs) == 1000
        assert not set(mine) & set(theirs)


class TestOne:
    def test_its_parts(self):
        message = topic.message(
            {"a": 1}, source="shop", id="o-1", key="ann", headers={"traceparent": TRACE}
        )
        assert message.body == b'{"a":1}'
        assert (message.topic, message.source, message.id, message.key) == (
            "orders", "shop", "o-1", "ann"
        )  # fmt: skip
        assert message.size == 7
        assert message.idempotency_key == "shop/orders/o-1"
        assert abs(message.time - datetime.now(UTC)) < timedelta(minutes=1)

    def test_its_cloudevents_attributes(self):
        message = topic.message(
            {},
            source="shop",
            id="o-1",
            key="ann",
            headers={"traceparent": TRACE, "type": "com.example.order", "tenant": "blue"},
            time_ms=1_700_000_000_123,
        )
        assert message.attributes() == {
            "specversion": "1.0",
            "id": "o-1",
            "source": "shop",
            "type": "com.example.order",
            "time": "2023-11-14T22:13:20.123000Z",
            "partitionkey": "ann",
            "traceparent": TRACE,
            "tenant": "blue",
        }
        assert topic.message({}, source="shop").attributes()["type"] == "orders"

    def test_the_topic_gives_the_key(self):
        keyed = duly.Topic("k", dict, guarantee="at-least-once", key=lambda each: each["k"])
        assert keyed.message({"k": "a"}, source="s").key == "a"
        assert keyed.message({"k": "a"}, source="s", key="b").key == "b"
        assert [m.key for m in keyed.messages([{"k": "a"}, {"k": "b"}], source="s")] == ["a", "b"]

    def test_a_key_function_that_fails(self):
        keyed = duly.Topic("k", dict, guarantee="at-least-once", key=lambda each: each["k"])
        with pytest.raises(duly.InvalidMessage, match="key function"):
            keyed.message({}, source="s")
        with pytest.raises(duly.InvalidMessage, match="key function"):
            keyed.messages([{"k": "a"}, {}], source="s")

    def test_cannot_be_rewritten(self):
        headers = {"tenant": "blue"}
        message = topic.message({}, source="shop", headers=headers)
        headers["tenant"] = "red"
        assert message.headers == {"tenant": "blue"}
        with pytest.raises(AttributeError):
            message.id = "other"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(TypeError):
            message.headers["tenant"] = "red"  # type: ignore[index]  # pyright: ignore[reportIndexIssue]

    def test_a_payload_is_there_once_decoded(self):
        message = topic.message({"a": 1}, source="shop")
        with pytest.raises(AttributeError, match="not decoded"):
            _ = message.payload
        assert topic.decode(message.body) == {"a": 1}

    @pytest.mark.parametrize("id", ["", "x" * 257, "a\nb", "a\x00b", "\ud800", 7, b"x"])
    def test_ids_that_are_none(self, id: Any):
        with pytest.raises(duly.InvalidMessage, match="id"):
            topic.message({}, source="shop", id=id)
        with pytest.raises(duly.InvalidMessage, match="id"):
            topic.messages([{}], source="shop", ids=[id])

    @pytest.mark.parametrize("key", ["x" * 257, "a\nb", "\ud800", 7])
    def test_keys_that_are_none(self, key: Any):
        with pytest.raises(duly.InvalidMessage, match="key"):
            topic.message({}, source="shop", key=key)
        with pytest.raises(duly.InvalidMessage, match="key"):
            topic.messages([{}], source="shop", keys=[key])

    @pytest.mark.parametrize(
        "headers",
        [
            {"Trace-Parent": "x"},
            {"": "x"},
            {"id": "x"},
            {"specversion": "1.0"},
            {"a": "line\nbreak"},
            {"a": 7},
            {7: "a"},
            {f"h{n}": "x" for n in range(65)},
            {"a": "x" * 20_000},
        ],
        ids=lambda headers: str(headers)[:30],
    )
    def test_headers_that_are_none(self, headers: Any):
        with pytest.raises(duly.InvalidMessage, match="header"):
            topic.message({}, source="shop", headers=headers)

    def test_a_body_over_the_limit(self):
        small = duly.Topic("s", bytes, guarantee="at-least-once", max_body_bytes=10)
        assert small.message(b"x" * 10, source="shop").size == 10
        for make in (
            lambda: small.message(b"x" * 11, source="shop", id="m-1"),
            lambda: small.messages([b"x", b"x" * 11], source="shop", ids=["m-0", "m-1"]),
        ):
            with pytest.raises(duly.MessageTooLarge, match="11 bytes") as error:
                make()
            assert error.value.message_id == "m-1"


class TestMany:
    @given(st.lists(st.tuples(st.text(min_size=1), st.none() | st.text()), max_size=5))
    def test_are_what_one_by_one_gives(self, given_):
        printable = [
            (id[:256], key and key[:256])
            for id, key in given_
            if id.isprintable() and (key is None or key.isprintable())
        ]
        ids, keys = [id for id, _ in printable], [key for _, key in printable]
        payloads = [{"n": n} for n in range(len(ids))]
        many = topic.messages(payloads, source="shop", ids=ids, keys=keys, headers={"a": "b"})
        for message, payload, id, key in zip(many, payloads, ids, keys, strict=True):
            one = topic.message(
                payload, source="shop", id=id, key=key, headers={"a": "b"}, time_ms=message.time_ms
            )
            assert message == one

    def test_what_is_alike_is_said_once_for_all(self):
        """And of nothing that differs in more than its id and body."""
        payloads = [{"n": n} for n in (1, 1000, 10)]
        alike = topic.messages(payloads, source="shop", ids=["a", "b", "c"])
        assert isinstance(alike, Alike)
        assert (topics_of(alike), largest_of(alike)) == ({"orders"}, len(b'{"n":1000}'))
        rows = [*zip(alike.ids, alike.bodies, strict=True)]
        assert rows == [(message.id, message.body) for message in alike]
        for message, payload in zip(alike, payloads, strict=True):
            one = topic.message(payload, source=alike.source, id=message.id, time_ms=alike.time_ms)
            assert message == one
        assert not isinstance(alike[:2], Alike)
        assert (topics_of(alike[:2]), largest_of(alike[:2])) == ({"orders"}, len(b'{"n":1000}'))
        more: Any
        for more in ({"keys": ["k"] * 3}, {"headers": {"a": "b"}}, {"due_ms": 1}):
            assert not isinstance(topic.messages(payloads, source="shop", **more), Alike)

    def test_from_an_iterator(self):
        messages = topic.messages(({"n": n} for n in range(3)), source="shop")
        assert [message.body for message in messages] == [b'{"n":0}', b'{"n":1}', b'{"n":2}']
        assert topic.messages([], source="shop", headers={"a": "b"}) == []

    def test_ids_and_keys_pair_with_the_payloads(self):
        with pytest.raises(duly.ConfigurationError, match="1 ids for 2 payloads"):
            topic.messages([{}, {}], source="shop", ids=["a"])
        with pytest.raises(duly.ConfigurationError, match="keys"):
            topic.messages([{}, {}], source="shop", keys="ab")

    def test_the_first_wrong_payload_is_named(self):
        wrong: Any = [{}, 7, {}]
        with pytest.raises(duly.InvalidMessage) as error:
            topic.messages(wrong, source="shop", ids=["a", "b", "c"])
        assert error.value.message_id == "b"


class TestDue:
    def test_in_seconds_or_at_a_time(self):
        now = time.time() * 1000
        assert due_ms("t", None) is None
        assert abs((due_ms("t", 2.5) or 0) - now - 2500) < 60_000
        due = datetime.now(UTC) + timedelta(hours=1)
        assert abs((due_ms("t", None, due) or 0) - due.timestamp() * 1000) < 1000
        assert abs((due_ms("t", None, datetime(2020, 1, 1, tzinfo=UTC)) or 0) - now) < 60_000

    @pytest.mark.parametrize(
        "delay_s", [-1, -0.001, float("nan"), float("inf"), MAX_DELAY_S + 1, "5", True]
    )
    def test_delays_that_are_none(self, delay_s: Any):
        with pytest.raises(duly.InvalidMessage, match="delay_s"):
            due_ms("t", delay_s)

    @pytest.mark.parametrize(
        "due",
        [datetime(2030, 1, 1), datetime.max.replace(tzinfo=UTC), "tomorrow", 5],  # noqa: DTZ001
    )
    def test_times_that_are_none(self, due: Any):
        with pytest.raises(duly.InvalidMessage):
            due_ms("t", None, due)

    def test_not_both(self):
        with pytest.raises(duly.InvalidMessage, match="not both"):
            due_ms("t", 1, datetime.now(UTC))


def test_a_topic_may_be_made_with_its_type_in_brackets() -> None:
    assert duly.Topic[int]("numbers", int, guarantee="at-least-once").name == "numbers"
