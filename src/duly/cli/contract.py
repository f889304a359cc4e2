"""``duly contract``: what is promised, what keeps it, and within which limits."""

from __future__ import annotations

import click
import msgspec

from duly.cli.loading import load_app
from duly.contract import Run, contract_on, render
from duly.schedules import ticking


def print_contract(spec: str, *, as_json: bool, processes: int) -> int:
    """Print the app's contract as ``duly run`` would have it; returns the exit status."""
    app = load_app(spec)
    broker, store = app.backends()
    try:
        run = Run(supervised=True, processes=processes)
        contract = contract_on(broker, store, app.topics, app.consumers, run, app.schedules)
        if app.schedules:
            ticking(broker, app.schedules)
    finally:
        app.close()
    if as_json:
        text = msgspec.json.format(msgspec.json.encode(contract), indent=2).decode()
        click.echo(text)
    else:
        click.echo(render(contract), nl=False)
    return 0
