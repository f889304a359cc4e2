"""``duly run --metrics``: where each worker serves what it has counted."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator

import msgspec

from duly.app import App
from duly.errors import ConfigurationError
from duly.supervisor import SLOT_VARIABLE

log = logging.getLogger("duly.metrics")


class Place(msgspec.Struct, frozen=True):
    """The address of the first worker's metrics; the others have the ports behind it."""

    host: str
    port: int


def place_of(text: str, processes: int) -> Place:
    """``9100`` or ``0.0.0.0:9100``. Raises `ConfigurationError` where that is no place for the
    metrics of so many processes, or something else is there already.
    """
    import duly.metrics  # noqa: F401 - says now, in one line, that its package is missing

    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port) <= 65536 - processes):
        raise ConfigurationError(
            f"--metrics {text}: give a port from 1 to {65536 - processes}, such as 9100, or an "
            "address and a port, such as 0.0.0.0:9100"
        )
    place = Place(host.strip("[]") or "127.0.0.1", int(port))
    for number in range(place.port, place.port + processes):
        _check_free(place.host, number)
    return place


def _check_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"--metrics: {host} port {port} cannot be served: {error.strerror or error}"
            ) from None


def count(app: App, place: Place | None) -> None:
    """Count what this worker does from now on, where its metrics are served."""
    if place is not None:
        import duly.metrics

        duly.metrics.watch(app)


@contextlib.contextmanager
def served(app: App, place: Place | None) -> Iterator[None]:
    """While this lasts, serve them. Where that fails the worker works on: nobody's message is
    to wait for a port.
    """
    if place is None:
        yield
        return
    import duly.metrics

    port = place.port + int(os.environ.get(SLOT_VARIABLE, "0"))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(duly.metrics.serve(port, place.host))
        except OSError as error:
            log.error("no metrics of %s on port %d: %s", app.name, port, error)  # noqa: TRY400
        yield
