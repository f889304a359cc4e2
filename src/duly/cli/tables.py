"""Tables for people: drawn on a terminal, lines with tabs where the output is piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import click
import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows below their names, on standard output."""
    if not sys.stdout.isatty():
        for row in (head, *rows):
            click.echo("\t".join(printable(cell) for cell in row))
        return
    Console().print(drawn(head, rows))


def print_json(value: Any) -> None:
    """Print a value as JSON for people and programs."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def drawn(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for a terminal."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def printable(text: str) -> str:
    """The text on one line, with nothing in it that moves a terminal's cursor or colours it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def ago(time_ms: int) -> str:
    """How long ago that was: ``12s``, ``3m``, ``5h``, ``2d``."""
    seconds = max(0.0, time.time() - time_ms / 1000)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"
