"""``duly status``: what each consumer has before it, what became of the rest, and who works."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click
import msgspec
from rich.console import Console, Group
from rich.live import Live

from duly.app import App
from duly.cli.loading import load_app
from duly.cli.tables import ago, drawn, print_table
from duly.errors import ConfigurationError
from duly.inspection import Holder, Inspection, Observing
from duly.store import outbox_of

# The incidents of a consumer, and those of a topic, with the names that people see.
_OF_CONSUMER = {
    "retries": "retry",
    "redelivered": "redelivery",
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
    """What was found. Each consumer's row counts one of its topics; incidents are its own."""

    consumers: Sequence[Mapping[str, Any]]
    topics: Sequence[Mapping[str, Any]]
    workers: Sequence[Holder]
    outbox: Mapping[str, Any] | None


def show_status(spec: str, *, as_json: bool) -> int:
    """Print it once."""
    with load_app(spec) as app:
        status = look(app)
    if as_json:
        encoded = msgspec.json.encode(asdict(status))
        click.echo(msgspec.json.format(encoded, indent=2).decode())
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
        while True:
            live.update(Group(*(drawn(*table) for table in _tables(look(app)))), refresh=True)
            time.sleep(1.0)


def look(app: App) -> Status:
    """Read all of it. Raises `ConfigurationError` where the broker cannot tell."""
    broker, store = app.backends()
    if not isinstance(broker, Inspection):
        raise ConfigurationError(f"{broker.capabilities.name} cannot look inside itself")
    counts = broker.incident_counts()
    oldest: Mapping[tuple[str, str], int] = {}
    oldest = broker.oldest() if isinstance(broker, Observing) else oldest
    consumers = [
        {
            "consumer": state.name,
            "topic": state.topic,
            "backlog": state.backlog,
            "in_flight": state.in_flight,
            "parked": state.parked,
            "dead": state.dead,
            "oldest_ms": oldest.get((state.name, state.topic)),
            **{name: counts.get((state.name, kind), 0) for name, kind in _OF_CONSUMER.items()},
        }
        for state in broker.subscriptions()
    ]
    topics = [
        {
            "topic": topic.name,
            **{name: counts.get((topic.name, kind), 0) for name, kind in _OF_TOPIC.items()},
        }
        for topic in app.topics
    ]
    workers = broker.holders() if isinstance(broker, Observing) else ()
    # Where the broker is the store's own database nothing goes through the outbox.
    apart = store is not None and store.capabilities.database != broker.capabilities.database
    outbox = outbox_of(store) if store is not None and apart else None
    return Status(consumers, topics, workers, None if outbox is None else asdict(outbox.backlog()))


_Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def _tables(status: Status) -> Sequence[_Table]:
    tables = [
        _table(("consumer", "topic", "backlog", "in_flight", "parked", "dead", "oldest_ms",
                *_OF_CONSUMER), status.consumers),
        _table(("topic", *_OF_TOPIC), status.topics),
    ]  # fmt: skip
    workers = [{**asdict(h), "alive": "yes" if h.alive else "no"} for h in status.workers]
    if workers:
        tables.append(_table(("worker", "alive", "subscription", "topic", "messages"), workers))
    if status.outbox is not None:
        tables.append(_table(("unsent", "given_up", "oldest_ms"), [status.outbox]))
    return tables


def _table(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> _Table:
    head = [name.removesuffix("_ms").replace("_", " ") for name in names]
    return head, [[_cell(name, row[name]) for name in names] for row in rows]


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("_ms"):
        return ago(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
