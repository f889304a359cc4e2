"""``duly publish``: typed lines, bad ones told, nothing published twice."""

from __future__ import annotations

import json
import signal

import pytest

from tests.cli.conftest import Place, end
from tests.waiting import eventually

CHARGES = "select n, cents, note, tip from charges order by n"


def handled(place: Place, count: int, sql: str = CHARGES) -> list[tuple[object, ...]]:
    """What the consumer did, once it has done so much and was drained."""
    process = place.start("run", "shop:app")
    place.await_rows(sql, count)
    ended = end(process)
    assert ended.status == 0, ended.err
    return place.rows(sql)


def test_json_lines(shop: Place):
    shop.write("orders.jsonl", '{"order": "a", "cents": 1}\n\n{"order": "b", "cents": 2}')
    ended = shop.duly("publish", "shop:app", "orders", "--from", "orders.jsonl")
    assert (ended.status, ended.err) == (0, "topic orders: published 2\n")
    assert handled(shop, 2) == [("a", 1, None, None), ("b", 2, None, None)]


def test_csv_is_typed_by_the_topic(shop: Place):
    shop.write(
        "orders.csv",
        '\ufefforder,cents,note,tip\na,100,"two\nlines",5\nb,200,,\n"c ""quoted""",-3,x,0\n',
    )
    ended = shop.duly("publish", "shop:app", "orders", "--from", "orders.csv")
    assert (ended.status, ended.err) == (0, "topic orders: published 3\n")
    assert handled(shop, 3) == [
        ("a", 100, "two\nlines", 5),
        ("b", 200, "", None),
        ('c "quoted"', -3, "x", 0),
    ]


def test_bad_lines_are_told_and_the_good_ones_published(shop: Place):
    lines = [
        '{"order": "a", "cents": 1}',
        "not json",
        '{"order": "b", "cents": "many"}',
        '{"order": "c"}',
        "[1]",
        '{"order": "d", "cents": 4}',
    ]
    shop.write("orders.jsonl", "\n".join(lines))
    ended = shop.duly("publish", "shop:app", "orders", "--from", "orders.jsonl")
    assert ended.status == 1
    told = ended.err.splitlines()
    assert [line.split(":")[0] for line in told[:4]] == ["line 2", "line 3", "line 4", "line 5"]
    assert "missing required field `cents`" in told[2]
    assert told[4] == "topic orders: published 2, 4 bad lines left out"


def test_bad_records_of_csv(shop: Place):
    shop.write(
        "orders.csv",
        b'order,cents\na,1\nb,x\nc\n"d\ne",2\n\xff,5\nf,3,4\ng,7\n'.decode("latin-1"),
    )
    (shop.path / "orders.csv").write_bytes(
        b'order,cents\na,1\nb,x\nc\n"d\ne",2\n\xff,5\nf,3,4\ng,7\n'
    )
    ended = shop.duly("publish", "shop:app", "orders", "--from", "orders.csv")
    assert ended.status == 1
    told = [line.split(":")[0] for line in ended.err.splitlines()]
    assert told == [
        "line 3",
        "line 4",
        "line 7",
        "line 8",
        "topic orders",
        "mend the bad lines in place and run the same command again",
    ]
    assert "published 3, 4 bad lines" in ended.err
    assert handled(shop, 3) == [
        ("a", 1, None, None),
        ("d\ne", 2, None, None),
        ("g", 7, None, None),
    ]


def test_a_second_run_repeats_nothing_and_publishes_what_was_mended(shop: Place):
    good = [{"order": f"o-{n}", "cents": n} for n in range(1000)]
    # Two equal lines are two events.
    good[1] = good[0]
    lines = [json.dumps(order) for order in good]
    shop.write("orders.jsonl", "\n".join([*lines[:500], "oops", *lines[500:]]))
    publish = ("publish", "shop:app", "orders", "--from", "orders.jsonl")
    assert "published 1,000, 1 bad lines" in shop.duly(*publish).err
    again = shop.duly(*publish)
    assert "published 0, 1,000 were published before, 1 bad lines" in again.err
    mended = json.dumps({"order": "mended", "cents": 5})
    shop.write("orders.jsonl", "\n".join([*lines[:500], mended, *lines[500:]]))
    mending = shop.duly(*publish)
    assert (mending.status, mending.err) == (
        0,
        "topic orders: published 1, 1,000 were published before\n",
    )
    rows = handled(shop, 1001)
    assert len(rows) == 1001
    assert [row[0] for row in rows].count("o-0") == 2


def test_a_changed_line_is_a_conflict_and_not_published(shop: Place):
    shop.write("orders.jsonl", '{"order": "a", "cents": 1}\n{"order": "b", "cents": 2}\n')
    publish = ("publish", "shop:app", "orders", "--from", "orders.jsonl")
    shop.duly(*publish)
    shop.write("orders.jsonl", '{"order": "a", "cents": 1}\n{"order": "b", "cents": 3}\n')
    ended = shop.duly(*publish)
    assert ended.status == 1
    assert ended.err.startswith("line 2: identity conflict")
    assert "published 0, 1 were published before, 1 bad lines" in ended.err


def test_an_id_field_goes_with_the_line_wherever_it_stands(shop: Place):
    shop.write("one.jsonl", '{"order": "a", "cents": 1}\n{"order": "b", "cents": 2}\n')
    shop.write("two.jsonl", '{"order": "b", "cents": 2}\n{"order": "c", "cents": 3}\n')
    publish = ("publish", "shop:app", "orders", "--id", "order", "--from")
    assert shop.duly(*publish, "one.jsonl").status == 0
    assert "published 1, 1 were published before" in shop.duly(*publish, "two.jsonl").err
    ended = shop.duly(*publish[:-2], "gone", "--from", "two.jsonl")
    assert ended.err.startswith("line 1: there is no field 'gone'\n")
    assert ended.status == 1


def test_standard_input_under_a_batch_name(shop: Place):
    publish = ("publish", "shop:app", "orders", "--from", "-", "--batch-name", "monday")
    given = '{"order": "a", "cents": 1}\n'
    assert "published 1\n" in shop.duly(*publish, input=given).err
    assert "published 0, 1 were published before" in shop.duly(*publish, input=given).err


def test_at_most_once_topics_wait_for_their_buffer(shop: Place):
    shop.write("pings.jsonl", '{"n": 1}\n' * 30_000)
    ended = shop.duly("publish", "shop:app", "pings", "--from", "pings.jsonl")
    told = ended.err.splitlines()
    assert (ended.status, told[0]) == (0, "topic pings: published 30,000")
    assert "at-most-once topic remembers no identities: run again" in told[1]


def test_going_on_from_a_line(shop: Place):
    shop.write("events.jsonl", "\n".join(json.dumps({"n": n}) for n in range(1, 11)))
    publish = ("publish", "shop:app", "events", "--from", "events.jsonl", "--from-line", "8")
    told = shop.duly(*publish).err.splitlines()
    assert told[0] == "topic events: published 3"
    assert "at-least-once topic remembers no identities: run again" in told[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_is_completed_by_running_it_again(shop: Place, number: int):
    total = 60_000
    shop.write(
        "orders.jsonl",
        "".join(f'{{"order": "o-{n:06}", "cents": {n}}}\n' for n in range(total)),
    )
    publish = ("publish", "shop:app", "orders", "--from", "orders.jsonl")
    process = shop.start(*publish)
    files = [shop.path / "shop.db", shop.path / "shop.db-wal"]
    eventually(
        lambda: sum(file.stat().st_size for file in files if file.exists()) > 1_000_000,
        "it is half-way",
    )
    ended = end(process, number)
    if number == signal.SIGINT:
        assert ended.status == 130
        assert "stopped: interrupted\nrun the same command again" in ended.err
    else:
        assert ended.status == -number
    again = shop.duly(*publish)
    assert again.status == 0
    words = again.err.replace(",", "").split()
    published, before = int(words[3]), int(words[4])
    assert published > 0
    assert before > 0
    assert published + before == total
    count = "select count(*), count(distinct n), sum(cents) from charges"
    assert handled_count(shop, count, total) == (total, total, total * (total - 1) // 2)


def handled_count(place: Place, sql: str, total: int) -> tuple[object, ...]:
    process = place.start("run", "shop:app")
    eventually(
        lambda: [row for row in place.rows(sql) if row[0] >= total], "all handled", timeout_s=60
    )
    assert end(process).status == 0
    return place.rows(sql)[0]
