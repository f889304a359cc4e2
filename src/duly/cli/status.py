"""``duly status``: what each consumer has before it, what became of the rest, and who works."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live

from duly.app import App
from duly.broker import Broker
from duly.cli.loading import load_app
from duly.cli.tables import ago, drawn, print_json, print_table
from duly.errors import ConfigurationError
from duly.inspection import Holder, Inspection, Observing
from duly.inspection.counting import Counting, Queueing
from duly.inspection.graves import Buries
from duly.inspection.steering import Steering
from duly.message import now_ms
from duly.schedules import Ticking
from duly.store import Store, Waiting, outbox_of, parked_beside, with_parked

# The incidents of a consumer, and those of a topic, with the names that people see.
_OF_CONSUMER = {
    "retries": "retry",
    "redelivered": "redelivery",
    "repeats_suppressed": "repeat-suppressed",
    "stale_settles": "stale-settle",
    "replayed": "replayed",
    "discarded": "discarded",
}
_OF_TOPIC = {
    "dropped": "dropped",
    "repeats_dropped": "repeat-dropped",
    "conflicts": "identity-conflict",
}


@dataclass(frozen=True, slots=True)
class Status:
    """What was found. Each consumer's row counts one of its topics; incidents are its own.

    ``delayed``: what waits for its time, where the broker cannot say for whom.
    """

    consumers: Sequence[Mapping[str, Any]]
    topics: Sequence[Mapping[str, Any]]
    schedules: Sequence[Mapping[str, Any]]
    workers: Sequence[Holder]
    outbox: Mapping[str, Any] | None
    delayed: int | None = None


def show_status(spec: str, *, as_json: bool) -> int:
    """Print it once."""
    with load_app(spec) as app:
        status = look(app)
    if as_json:
        print_json(asdict(status))
        return 0
    for number, (head, rows) in enumerate(_tables(status)):
        if number:
            click.echo()
        print_table(head, rows)
    return 0


def watch_status(spec: str) -> int:
    """Draw it again every second, until interrupted."""
    console = Console()
    if not console.is_terminal:
        raise ConfigurationError("--watch draws on a terminal, and this is none: leave it out")
    with load_app(spec) as app, Live(console=console, auto_refresh=False) as live:
        before, since = look(app), time.monotonic()
        while True:
            time.sleep(1.0)
            now, at = look(app), time.monotonic()
            shown = with_rates(before, now, at - since)
            live.update(Group(*(drawn(*table) for table in _tables(shown))), refresh=True)
            before, since = now, at


def with_rates(before: Status, now: Status, seconds: float) -> Status:
    """The later of two looks, with what went through a second in between."""

    def rated(
        name: str, keys: Sequence[str], old: Sequence[Mapping[str, Any]], row: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        was = next((each for each in old if all(each[k] == row[k] for k in keys)), row)
        if row.get(name) is None or was.get(name) is None:
            return row
        return {**row, f"{name}_per_s": round((row[name] - was[name]) / seconds)}

    of = ("consumer", "topic")
    return replace(
        now,
        consumers=[rated("passed", of, before.consumers, row) for row in now.consumers],
        topics=[rated("published", of[1:], before.topics, row) for row in now.topics],
    )


def look(app: App) -> Status:
    """Read all of it. Raises `ConfigurationError` where the broker cannot tell."""
    broker, store = app.look()
    parked = parked_beside(broker, store)
    waiting = () if parked is None else parked.waiting()
    if isinstance(broker, Queueing):
        named = [{"topic": topic.name} for topic in app.topics]
        outbox = _outbox(broker, store)
        consumers = _queued(broker, waiting)
        return Status(consumers, named, _schedules(app, broker), [], outbox, broker.delayed())
    if not isinstance(broker, Inspection):
        raise ConfigurationError(f"{broker.capabilities.name} cannot look inside itself")
    counts = broker.incident_counts()
    oldest: Mapping[tuple[str, str], int] = {}
    oldest = broker.oldest() if isinstance(broker, Observing) else oldest
    published: Mapping[str, int] = {}
    published = broker.published() if isinstance(broker, Counting) else published
    steered = {}
    if isinstance(broker, Steering):
        steered = {each.subscription: each.state for each in broker.steered()}
    consumers = [
        {
            "consumer": state.name,
            "topic": state.topic,
            "backlog": state.backlog,
            "in_flight": state.in_flight,
            "parked": state.parked,
            "dead": state.dead,
            "oldest_ms": oldest.get((state.name, state.topic)),
            "state": steered.get(state.name, "working"),
            # Settled or given up on, or before its start: only its growth means something.
            "passed": published[state.topic] - state.backlog - state.in_flight - state.parked
            if state.topic in published
            else None,
            **{name: counts.get((state.name, kind), 0) for name, kind in _OF_CONSUMER.items()},
        }
        for state in with_parked(broker.subscriptions(), waiting)
    ]
    topics = [
        {
            "topic": topic.name,
            "published": published.get(topic.name),
            **{name: counts.get((topic.name, kind), 0) for name, kind in _OF_TOPIC.items()},
        }
        for topic in app.topics
    ]
    schedules = _schedules(app, broker)
    workers: list[Holder] = [*broker.holders()] if isinstance(broker, Observing) else []
    if isinstance(broker, Counting):
        busy = {holder.worker for holder in workers}
        workers += [Holder(w, True, "-", "-", 0) for w in broker.workers() if w not in busy]
    return Status(consumers, topics, schedules, workers, _outbox(broker, store))


def _outbox(broker: Broker, store: Store | None) -> Mapping[str, Any] | None:
    # Where the broker is the store's own database nothing goes through the outbox.
    apart = store is not None and store.capabilities.database != broker.capabilities.database
    outbox = outbox_of(store) if store is not None and apart else None
    return None if outbox is None else asdict(outbox.backlog())


def _queued(broker: Queueing, waiting: Sequence[Waiting]) -> Sequence[Mapping[str, Any]]:
    """What a broker can count that cannot look inside itself, and what waits in the store."""
    kept = {(each.consumer, each.topic): each for each in waiting}
    dead: Mapping[tuple[str, str], int] = {}
    if isinstance(broker, Buries):
        broker.carry()
        dead = broker.graveyard.count()
    return [
        {
            "consumer": state.subscription,
            "topic": state.topic,
            "backlog": state.backlog,
            "in_flight": None,
            "parked": None if found is None else found.parked + found.in_flight,
            "parked_since_ms": None if found is None else found.oldest_ms,
            "dead": dead.get((state.subscription, state.topic), 0),
            "workers": state.workers,
        }
        for state in broker.queued()
        for found in [kept.get((state.subscription, state.topic))]
    ]


def _schedules(app: App, broker: Broker) -> Sequence[Mapping[str, Any]]:
    ticked = broker.ticked() if isinstance(broker, Ticking) else {}
    rows = []
    for schedule in app.schedules:
        last, following = schedule.around(ticked.get(schedule.key(app.name)), now_ms())
        row = {"schedule": schedule.name, "topic": schedule.topic.name}
        rows.append({**row, "last_tick_ms": last, "next_tick_ms": following})
    return rows


_Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def _tables(status: Status) -> Sequence[_Table]:
    tables = [
        _table(("consumer", "topic", "backlog", "in_flight", "parked", "parked_since_ms", "dead",
                "oldest_ms",
                "state", "passed", "passed_per_s", "workers", *_OF_CONSUMER), status.consumers),
        _table(("topic", "published", "published_per_s", *_OF_TOPIC), status.topics),
    ]  # fmt: skip
    if status.schedules:
        heads = ("schedule", "topic", "last_tick_ms", "next_tick_ms")
        tables.append(_table(heads, status.schedules))
    workers = [{**asdict(h), "alive": "yes" if h.alive else "no"} for h in status.workers]
    if workers:
        tables.append(_table(("worker", "alive", "subscription", "topic", "messages"), workers))
    if status.delayed is not None:
        tables.append(_table(("delayed",), [{"delayed": status.delayed}]))
    if status.outbox is not None:
        tables.append(_table(("unsent", "given_up", "oldest_ms"), [status.outbox]))
    return tables


def _table(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> _Table:
    # Rates are there after two looks only, and then say more than the totals.
    rated = {name.removesuffix("_per_s") for row in rows for name in row if name.endswith("_per_s")}
    # And not every broker can tell everything.
    told = {name for row in rows for name in row} or {*names}
    names = [
        name
        for name in names
        if name not in rated and (name in told if "_per_s" not in name else name[:-6] in rated)
    ]
    head = [name.removesuffix("_ms").replace("_per_s", "/s").replace("_", " ") for name in names]
    return head, [[_cell(name, row.get(name)) for name in names] for row in rows]


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("_tick_ms"):
        return f"{datetime.fromtimestamp(value / 1000, UTC):%Y-%m-%d %H:%M:%SZ}"
    if name.endswith("_ms"):
        return ago(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
