"""``duly run``: a supervisor, its worker processes, and what a person sees of them."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from duly import logs
from duly.cli.loading import split
from duly.cli.metering import Place
from duly.cli.progress import Progress
from duly.cli.worker import Orders
from duly.errors import ConfigurationError
from duly.supervisor import Patience, Supervisor

log = logging.getLogger("duly.supervisor")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of ``duly run``."""

    app: str
    processes: int
    consumers: Sequence[str] | None
    drain_s: float
    log_format: logs.Format
    reload: bool
    metrics: Place | None = None


def run_app(options: RunOptions) -> int:
    """Supervise workers until a signal; returns the exit status."""
    # The app itself is imported by the workers only, so that --reload sees it change.
    split(options.app)
    log_format = logs.chosen(options.log_format, sys.stderr)
    orders = Orders(
        options.app,
        options.consumers,
        # The workers' own deadline comes first: what they cannot finish they give back.
        max(options.drain_s * 0.8, options.drain_s - 2.0),
        log_format,
        options.processes,
        options.metrics,
    )
    on_terminal = log_format == "human" and sys.stderr.isatty()
    with Progress.on_terminal() if on_terminal else _no_progress() as progress:
        logs.configure(log_format, stream=sys.stderr if progress is None else progress)
        supervisor = Supervisor(
            orders.command(),
            options.processes,
            Patience(drain_s=options.drain_s),
            report=None if progress is None else progress.count,
            show=None if progress is None else progress.show,
            patient=options.reload,
        )
        with _reloading(supervisor) if options.reload else _no_reload():
            status = supervisor.run()
    if supervisor.refusal is not None and not options.reload:
        click.echo(f"duly: {supervisor.refusal}", err=True)
    return status


@contextmanager
def _no_progress() -> Iterator[None]:
    yield None


@contextmanager
def _no_reload() -> Iterator[None]:
    yield


@contextmanager
def _reloading(supervisor: Supervisor) -> Iterator[None]:
    """While this lasts, a change of a source file below the current directory reloads."""
    try:
        from watchfiles import PythonFilter, watch
    except ModuleNotFoundError:
        raise ConfigurationError(
            "--reload needs the package watchfiles: pip install 'duly[reload]'"
        ) from None
    stop = threading.Event()

    def look() -> None:
        for changes in watch(
            Path.cwd(), watch_filter=PythonFilter(), stop_event=stop, raise_interrupt=False
        ):
            names = sorted({Path(path).name for _, path in changes})
            log.info("changed: %s", ", ".join(names))
            supervisor.reload()

    thread = threading.Thread(target=look, name="duly-reload", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5.0)
