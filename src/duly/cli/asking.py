"""Asking before something is destroyed or repeated, and the progress of what takes long."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import Progress

from duly.errors import ConfigurationError


def ask(question: str, *, yes: bool) -> None:
    """Go on where the answer is yes, or was given with ``--yes``; else the command is aborted.

    Raises `ConfigurationError` where there is no terminal to ask at.
    """
    if yes:
        return
    # None: the process was started without one.
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigurationError(f"{question} There is no terminal to ask at: add --yes")
    click.confirm(question, abort=True, err=True)


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Shown on a terminal while this lasts; what it gives is told how many more are done."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(what, total=total)
        yield lambda count: shown.update(task, advance=count)
