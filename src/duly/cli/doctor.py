"""``duly doctor`` and ``duly init``: what endangers an app, and making what it needs."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version

import click
from rich.console import Console

from duly.app import App
from duly.cli.loading import load_app
from duly.cli.tables import print_json, print_table, printable
from duly.contract import Run, contract_on
from duly.errors import DulyError
from duly.inspection import Inspection
from duly.inspection.health import Finding
from duly.operating.health import examine
from duly.schedules import ticking
from duly.worker.process import subscribe_options


def examine_app(spec: str, *, as_json: bool) -> int:
    """Print every finding; 1 where one is wrong."""
    with load_app(spec) as app:
        findings = list(_findings(app))
    wrong = sum(finding.level == "wrong" for finding in findings)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        _show(findings)
    return 1 if wrong else 0


def _findings(app: App) -> Iterator[Finding]:
    yield Finding("ok", "duly", f"{version('duly')} on Python {platform.python_version()}")
    try:
        backends = app.look()
    except DulyError as error:
        yield Finding("wrong", "broker or store", f"cannot be used: {error}")
        return
    yield from examine(backends, app.topics, app.consumers, app.schedules)


_COLOURS = {"ok": "green", "warning": "yellow", "wrong": "bold red"}


def _show(findings: list[Finding]) -> None:
    console = Console(highlight=False)
    for finding in findings:
        if console.is_terminal:
            console.print(f"{finding.level:8}", style=_COLOURS[finding.level], end="")
        else:
            click.echo(f"{finding.level}\t", nl=False)
        click.echo(printable(f"{finding.what}: {finding.found}"))
        if finding.remedy:
            click.echo(f"{' ' * 8}{printable(finding.remedy)}")


def make_ready(spec: str, *, as_json: bool) -> int:
    """Make schema, topics and subscriptions; work nothing."""
    with load_app(spec) as app:
        broker, store = app.backends()
        run = Run(supervised=True)
        contract = contract_on(broker, store, app.topics, app.consumers, run, app.schedules)
        if app.schedules:
            ticking(broker, app.schedules)
        before: set[str] = set()
        if isinstance(broker, Inspection):
            before = {state.name for state in broker.subscriptions()}
        rows: list[tuple[str, str, str, str]] = [
            ("topic", topic.name, str(topic.guarantee), "there") for topic in app.topics
        ]
        for consumer in app.consumers:
            asked = subscribe_options(consumer, contract.consumer(consumer.name).admission)
            broker.subscribe(consumer.topics, consumer.name, asked).close()
            state = "there" if consumer.name in before else "made"
            rows.append(("subscription", consumer.name, consumer.guarantee.value, state))
        if not broker.capabilities.durable:
            click.echo(f"{broker.capabilities.name} forgets all of it with this process", err=True)
    head = ("what", "name", "guarantee", "state")
    if as_json:
        print_json([dict(zip(head, row, strict=True)) for row in rows])
    else:
        print_table(head, rows)
    return 0
