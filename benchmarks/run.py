"""Measures duly beside raw loops and peers, and writes RESULTS.md, or that of a server.

::

    python benchmarks/run.py                          everything on SQLite, a quarter of an hour
    python benchmarks/run.py --on postgres            everything on a private PostgreSQL server
    python benchmarks/run.py --on rabbitmq            everything on a private RabbitMQ node
    python benchmarks/run.py --on kafka               everything on a private Kafka node
    python benchmarks/run.py --on postgres --only backlog --backlog 10000000
    python benchmarks/run.py --quick --only publish   some rows, fewer messages, printed only
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import counting
from machine import load, machine
from measure import Directories, Places, RowFailed, here, in_a_fresh_process, on_real_disk
from report import Result, page, write
from rows import ROWS, Ratio, Row

RESULTS = {
    "sqlite": Path(__file__).with_name("RESULTS.md"),
    "postgres": Path(__file__).with_name("RESULTS_POSTGRES.md"),
    "rabbitmq": Path(__file__).with_name("RESULTS_RABBITMQ.md"),
    "kafka": Path(__file__).with_name("RESULTS_KAFKA.md"),
}
# These machines are noisy: of a few rounds the median is anything. A server's rows take longer.
ROUNDS = {"sqlite": 9, "postgres": 5, "rabbitmq": 5, "kafka": 5}
QUICK_ROUNDS = 3


def main() -> int:
    options = arguments()
    if options.one:
        one(options)
        return 0
    file_system = on_real_disk(options.dir)
    rows = chosen(options)
    if not rows:
        print(f"no row has {options.only!r} in its name or section", file=sys.stderr)
        return 2
    busy = load()
    results = {row.name: Result(row) for row in rows}
    with places_on(options) as places:
        measure_all(results, options, places)
        head = heading(machine(options.on, file_system), busy, options.quick)
        text = page(results, head, places.counted)
    if options.json:
        print(json.dumps({name: plain(result) for name, result in results.items()}, indent=1))
    else:
        print(text)
    if not options.quick and not options.only:
        write(RESULTS[options.on], text)
    return 1 if any(result.failure for result in results.values()) else 0


def rows_on(database: str) -> list[Row]:
    """Every row; those of a server need what is not needed for SQLite."""
    if database == "sqlite":
        return ROWS
    if database == "rabbitmq":
        import rabbitmq_rows

        return rabbitmq_rows.ROWS
    if database == "kafka":
        import kafka_rows

        return kafka_rows.ROWS
    import postgres_rows

    return postgres_rows.ROWS


@contextmanager
def places_on(options: argparse.Namespace) -> Iterator[Places]:
    """Where rows run."""
    if options.on == "sqlite":
        yield Directories(options.dir)
        return
    if options.on == "rabbitmq":
        from rabbitmq_place import VirtualHosts

        with VirtualHosts(options.dir) as hosts:
            yield hosts
        return
    if options.on == "kafka":
        from kafka_place import Namespaces

        with Namespaces(options.dir) as namespaces:
            yield namespaces
        return
    from postgres_place import Databases

    with Databases(options.dir) as databases:
        yield databases


def one(options: argparse.Namespace) -> None:
    """One row, in this process."""
    place: object = options.place
    if options.on == "sqlite":
        place = Path(options.place)
        if options.count:
            counting.count_commits()
    elif options.on == "postgres" and options.count:
        from postgres_place import counted

        place = counted(options.place)
    elif options.on == "kafka" and options.count:
        from kafka_place import count_requests

        count_requests()
    here(next(r for r in rows_on(options.on) if r.name == options.one), place, options.messages)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--on", choices=list(RESULTS), default="sqlite", help="which broker and store"
    )
    parser.add_argument("--quick", action="store_true", help="fewer messages and rounds")
    parser.add_argument("--only", default="", help="rows with this in their name or section")
    parser.add_argument("--rounds", type=int, help="how often each row is measured")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--no-count", action="store_true", help="leave out what is counted")
    parser.add_argument("--backlog", type=int, help="messages of the large backlogs")
    default = Path(tempfile.gettempdir())
    parser.add_argument("--dir", type=Path, default=default, help="where databases are made")
    # What a fresh process is told; not for people.
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    parser.add_argument("--messages", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[Row]:
    return [
        row
        for row in rows_on(options.on)
        if row.there
        and options.only.lower() in f"{row.section}/{row.name}".lower()
        and not (options.quick and row.full_only)
    ]


def measure_all(results: dict[str, Result], options: argparse.Namespace, places: Places) -> None:
    """Section by section, the rows of one interleaved: A B C, A B C, ..."""
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS[options.on])
    for section in dict.fromkeys(result.row.section for result in results.values()):
        members = [result for result in results.values() if result.row.section == section]
        for n in range(rounds):
            for result in beside_each_other(members):
                if n < (result.row.rounds or rounds):
                    measure_once(result, options, places, count=False)
        for result in members:
            if result.row.count and places.counted and not options.no_count:
                measure_once(result, options, places, count=True)


def beside_each_other(members: Sequence[Result]) -> Iterable[Result]:
    """Each row followed by those that it is compared with: what else the machine does changes from
    second to second.
    """
    named = {result.row.name: result for result in members}
    order: dict[str, Result] = {}
    for name, result in named.items():
        others = [each for aim in result.row.aims if isinstance(aim, Ratio) for each in aim.against]
        order |= {each: named[each] for each in (name, *others) if each in named}
    return order.values()


def measure_once(
    result: Result, options: argparse.Namespace, places: Places, *, count: bool
) -> None:
    if result.failure is not None:
        return
    row = result.row
    messages = row.quick if options.quick or count else row.messages
    if row.backlog and options.backlog and not count:
        messages = options.backlog
    try:
        sample = in_a_fresh_process(row, messages, options.on, places, count=count)
    except RowFailed as error:
        result.failure = str(error)
        print(error, file=sys.stderr)
        return
    if count:
        result.counted = sample
    else:
        result.samples.append(sample)
        print(f"{row.name}: {sample.per_s:,.0f}/s", file=sys.stderr)


def heading(facts: list[tuple[str, str]], busy: float, quick: bool) -> list[str]:
    today = dt.datetime.now(dt.UTC).date()
    command = " ".join(["python benchmarks/run.py", *sys.argv[1:]])
    lines = [f"Measured on {today} by `{command}`.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts]
    lines.append(f"| load before | {busy:.1f} |")
    if quick:
        lines += ["", "A quick run: few messages and rounds, good for comparing changes only."]
    return lines


def plain(result: Result) -> dict[str, object]:
    return {
        "section": result.row.section,
        "samples": [asdict(sample) for sample in result.samples],
        "counted": asdict(result.counted) if result.counted else None,
        "failure": result.failure,
    }


if __name__ == "__main__":
    sys.exit(main())
