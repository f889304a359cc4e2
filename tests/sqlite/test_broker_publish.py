"""Publishing: durable, in order, each identity once; and what refuses or is unknown says so."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from duly.broker import Published, RepeatDropped
from duly.brokers.sqlite import SQLiteBroker
from duly.brokers.sqlite import broker as broker_module
from duly.errors import (
    BrokerUnavailable,
    CommitUnknown,
    ConfigurationError,
    IdentityConflict,
    MessageTooLarge,
    PublishFailed,
    PublishUnknown,
)
from duly.guarantees import Done
from duly.message import Topic
from tests.sqlite.brokers import (
    KEYED,
    ONCE,
    PLAIN,
    bodies,
    claim,
    drain,
    execute,
    messages,
    opened,
    options,
    publish,
)


def test_what_is_published_comes_back_whole(db_path: Path):
    broker = opened(db_path)
    sent = [
        PLAIN.message(b"one", source="shop", id="a", key="k", headers={"tenant": "blå"}),
        PLAIN.message(b"\x00\xff", source="other", id="ø", time_ms=12),
        PLAIN.message(b"", source="shop", due_ms=17),
    ]
    assert broker.publish(sent) == [Published(m.id) for m in sent]
    lane = broker.subscribe([PLAIN], "s", options())
    got = claim(lane)
    assert [d.message for d in got] == sent
    assert [(d.attempt, d.repeated, d.alone, d.position) for d in got] == [
        (1, False, False, None)
    ] * 3


def test_messages_survive_the_process(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(3))
    broker.close()
    assert drain(opened(db_path).subscribe([PLAIN], "s", options())) == ["0", "1", "2"]


def test_one_batch_for_several_topics_answers_in_order(db_path: Path):
    broker = opened(db_path)
    mixed = [m for i in range(3) for topic in (PLAIN, ONCE, KEYED) for m in messages(topic, [i])]
    undeclared = Topic("nowhere", bytes, guarantee="at-least-once").message(b"x", source="shop")
    outcomes = broker.publish([*mixed[:4], undeclared, *mixed[4:]])
    failed = outcomes.pop(4)  # type: ignore[attr-defined]
    assert isinstance(failed, PublishFailed)
    assert failed.message_id == undeclared.id
    assert "nowhere" in str(failed)
    assert outcomes == [Published(m.id) for m in mixed]
    for topic in (PLAIN, ONCE):
        lane = broker.subscribe([topic], f"of-{topic.name}", options())
        assert drain(lane) == ["0", "1", "2"]


@pytest.mark.parametrize("count", [1, 9, 10, 99, 100, 101, 257])
def test_batches_of_any_size_keep_every_message(db_path: Path, count: int):
    broker = opened(db_path)
    for given in ({}, {"key": "k"}, {"due_ms": 0}, {"headers": {"tenant": "a"}}):
        sent = messages(PLAIN, range(count), **given)
        assert broker.publish(sent) == [Published(m.id) for m in sent]
        got = claim(broker.subscribe([PLAIN], "s", options()), count)
        assert [d.message for d in got] == sent
        broker.subscribe([PLAIN], "s", options()).settle([Done(d.receipt) for d in got])


@pytest.mark.parametrize("again", [0, 99, 100, 150, 256])
def test_one_repeat_in_a_large_batch_is_the_only_one_dropped(db_path: Path, again: int):
    broker = opened(db_path)
    sent = [ONCE.message(b"x", source="shop", id=str(n)) for n in range(257)]
    broker.publish([sent[again]])
    outcomes = broker.publish(sent)
    assert [i for i, o in enumerate(outcomes) if isinstance(o, RepeatDropped)] == [again]
    assert len(drain(broker.subscribe([ONCE], "s", options()))) == 257


def test_publishing_nothing_is_nothing(db_path: Path):
    broker = opened(db_path)
    before = broker.file.stats.commits
    assert broker.publish([]) == []
    assert broker.file.stats.commits == before


def test_keys_keep_to_one_partition_in_order(db_path: Path):
    broker = opened(db_path, KEYED)
    for i in range(40):
        publish(broker, KEYED, [i], key=f"k{i % 8}")
    rows = execute(broker, "select key, position >> 40, body from duly_messages order by position")
    assert len({stream for _, stream, _ in rows}) == 2
    streams = {key: {s for k, s, _ in rows if k == key} for key, _, _ in rows}
    assert all(len(found) == 1 for found in streams.values())
    for key in streams:
        numbers = [int(body) for k, _, body in rows if k == key]
        assert numbers == sorted(numbers)


# --- identities -----------------------------------------------------------------------------------


def test_a_repeat_is_dropped_and_said_to_be(db_path: Path):
    broker = opened(db_path)
    sent = messages(ONCE, range(4))
    assert broker.publish(sent) == [Published(m.id) for m in sent]
    more = messages(ONCE, ["new"])
    assert broker.publish([sent[2], *more, sent[0]]) == [
        RepeatDropped(sent[2].id),
        Published(more[0].id),
        RepeatDropped(sent[0].id),
    ]
    assert drain(broker.subscribe([ONCE], "s", options())) == ["0", "1", "2", "3", "new"]
    assert broker.incident_counts() == {("once", "repeat-dropped"): 2}


def test_a_used_id_with_another_body_is_refused(db_path: Path):
    broker = opened(db_path)
    [first] = messages(ONCE, ["body"], id="o-1")
    [other] = messages(ONCE, ["another"], id="o-1")
    assert broker.publish([first]) == [Published("o-1")]
    [outcome] = broker.publish([other])
    assert isinstance(outcome, IdentityConflict)
    assert outcome.message_id == "o-1"
    assert "o-1" in str(outcome)
    assert "once" in str(outcome)
    assert drain(broker.subscribe([ONCE], "s", options())) == ["body"]
    assert broker.incident_counts() == {("once", "identity-conflict"): 1}


def test_the_same_id_twice_in_one_batch(db_path: Path):
    broker = opened(db_path)
    a, b = messages(ONCE, ["a", "a"], id="x")
    [c] = messages(ONCE, ["c"], id="x")
    [y] = messages(ONCE, ["y"])
    outcomes = broker.publish([y, a, b, c])
    assert outcomes[:3] == [Published(y.id), Published("x"), RepeatDropped("x")]
    assert isinstance(outcomes[3], IdentityConflict)
    assert drain(broker.subscribe([ONCE], "s", options())) == ["y", "a"]


def test_one_id_of_two_sources_or_topics_is_two_events(db_path: Path):
    other = Topic("once-too", bytes, guarantee="exactly-once")
    broker = opened(db_path, ONCE, other)
    sent = [
        ONCE.message(b"1", source="shop", id="x"),
        ONCE.message(b"2", source="bank", id="x"),
        other.message(b"3", source="shop", id="x"),
    ]
    assert broker.publish(sent) == [Published("x")] * 3


def test_an_equal_body_under_another_id_is_another_event(db_path: Path):
    broker = opened(db_path)
    publish(broker, ONCE, ["same", "same"])
    assert drain(broker.subscribe([ONCE], "s", options())) == ["same", "same"]


def test_at_least_once_topics_remember_no_identities(db_path: Path):
    broker = opened(db_path)
    [message] = messages(PLAIN, ["x"], id="x")
    assert broker.publish([message, message]) == [Published("x")] * 2
    assert execute(broker, "select count(*) from duly_identities") == [(0,)]


def test_refused_messages_leave_no_gap(db_path: Path):
    broker = opened(db_path)
    sent = messages(ONCE, range(5))
    broker.publish(sent[:3])
    broker.publish(sent)
    positions = [p for (p,) in execute(broker, "select position from duly_messages")]
    assert positions == list(range(positions[0], positions[0] + 5))


REPEAT = """
import sys
from tests.sqlite.brokers import ONCE, opened
broker = opened(sys.argv[1])
sent = [ONCE.message(str(i).encode(), source="shop", id=f"o-{i}") for i in range(300)]
for start in range(0, 300, 7):
    for outcome in broker.publish(sent[start:start + 7]):
        print(type(outcome).__name__)
"""


def test_processes_that_publish_the_same_events_store_each_once(db_path: Path):
    opened(db_path).close()
    command = [sys.executable, "-c", REPEAT, str(db_path)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = Counter(line for run in runs for line in run.communicate(timeout=60)[0].split())
    assert said == {"Published": 300, "RepeatDropped": 600}
    lane = opened(db_path).subscribe([ONCE], "s", options())
    assert sorted(map(int, drain(lane))) == list(range(300))


# --- many at once ---------------------------------------------------------------------------------


def test_concurrent_publishers_lose_and_double_nothing(db_path: Path):
    broker = opened(db_path)
    ready = threading.Barrier(8)

    def run(name: int) -> None:
        ready.wait(timeout=30)
        for i in range(25):
            publish(broker, PLAIN, [f"{name}-{i}", f"{name}-{i}+"])

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    seen = drain(broker.subscribe([PLAIN], "s", options()))
    assert sorted(seen) == sorted(
        body for n in range(8) for i in range(25) for body in (f"{n}-{i}", f"{n}-{i}+")
    )
    for n in range(8):  # of one publisher, in the order published
        mine = [body.rstrip("+") for body in seen if body.startswith(f"{n}-")]
        assert mine == sorted(mine, key=lambda body: int(body.split("-")[1]))
    assert broker.file.stats.fsyncs < 8 * 25


# --- refused and unknown --------------------------------------------------------------------------


def test_a_message_over_the_brokers_limit_is_refused_before_it_is_written(
    db_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(broker_module, "MAX_MESSAGE_BYTES", 10)
    broker = opened(db_path)
    small, big, last = messages(PLAIN, ["a", "b" * 11, "c"])
    outcomes = broker.publish([small, big, last])
    assert isinstance(outcomes[1], MessageTooLarge)
    assert outcomes[1].message_id == big.id
    assert [outcomes[0], outcomes[2]] == [Published(small.id), Published(last.id)]
    assert drain(broker.subscribe([PLAIN], "s", options())) == ["a", "c"]


def test_an_unavailable_file_fails_each_message(db_path: Path, monkeypatch: pytest.MonkeyPatch):
    broker = opened(db_path)

    def locked(*_: object, **__: object) -> None:
        raise BrokerUnavailable("locked")

    monkeypatch.setattr(broker.file, "write_items", locked)
    sent = messages(PLAIN, range(2))
    outcomes = broker.publish(sent)
    assert [type(outcome) for outcome in outcomes] == [PublishFailed, PublishFailed]
    assert [o.message_id for o in outcomes] == [m.id for m in sent]


def test_a_commit_without_answer_is_unknown(db_path: Path, monkeypatch: pytest.MonkeyPatch):
    broker = opened(db_path)

    def silent(*_: object, **__: object) -> None:
        raise CommitUnknown("no answer")

    sent = messages(ONCE, range(2))
    with monkeypatch.context() as patch:
        patch.setattr(broker.file, "write_items", silent)
        outcomes = broker.publish(sent)
    assert [type(outcome) for outcome in outcomes] == [PublishUnknown, PublishUnknown]
    assert [o.message_id for o in outcomes] == [m.id for m in sent]
    assert broker.publish(sent) == [Published(m.id) for m in sent]


def test_publishing_in_a_transaction_of_the_caller(db_path: Path):
    from duly.sql import log
    from duly.sql.sqlite.driver import StatementRunner

    broker = opened(db_path)
    connection = sqlite3.connect(db_path, isolation_level=None)
    catalog = StatementRunner(connection).run(log.declare([ONCE]))
    for end in ("rollback", "commit"):
        connection.execute("begin immediate")
        sent = messages(ONCE, [end], id="x")
        outcomes = StatementRunner(connection).run(log.publish(catalog, sent, 1))
        assert outcomes == [Published("x")]
        connection.execute(end)
    connection.close()
    assert drain(broker.subscribe([ONCE], "s", options())) == ["commit"]


# --- declaring ------------------------------------------------------------------------------------


def test_declaring_again_is_harmless(db_path: Path):
    broker = opened(db_path)
    publish(broker, KEYED, range(3), key="k")
    broker.declare([PLAIN, ONCE, KEYED])
    publish(broker, KEYED, range(3, 6), key="k")
    assert drain(broker.subscribe([KEYED], "s", options())) == ["0", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Topic("keyed", bytes, guarantee="at-least-once", partitions=3), ["partitions=2", "=3"]),
        (Topic("once", bytes, guarantee="at-least-once"), ["exactly-once", "at-least-once"]),
        (Topic("plain", bytes, guarantee="exactly-once"), ["exactly-once", "plain"]),
    ],
)
def test_other_fixed_properties_are_refused(db_path: Path, other: Topic[bytes], said: list[str]):
    opened(db_path).close()
    broker = SQLiteBroker(db_path)
    with pytest.raises(ConfigurationError) as refused:
        broker.declare([other])
    assert all(words in str(refused.value) for words in said)


def test_a_guarantee_without_identities_may_change(db_path: Path):
    broker = opened(db_path)
    broker.declare([Topic("plain", bytes, guarantee="at-most-once")])
    publish(broker, PLAIN, ["x"])
    assert bodies(claim(broker.subscribe([PLAIN], "s", options()))) == ["x"]
