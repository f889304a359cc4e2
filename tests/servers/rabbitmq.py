"""RabbitMQ for tests: one node a session, or one of a test's own that it may kill.

``DULY_TEST_RABBITMQ=URL`` names another for the first; its user must be allowed to declare, write
and read everything in its virtual host.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, NoReturn, Self

import amqp
import pytest

from duly.testing.conformance.plugin import in_ci
from duly.testing.rabbitmq import NoNode, PrivateNode

OTHER = "DULY_TEST_RABBITMQ"


def missing(reason: str) -> NoReturn:
    """Skip on a laptop, fail in CI: there what is not tested is not promised."""
    if in_ci():
        pytest.fail(f"{reason}, and CI is set: make servers", pytrace=False)
    pytest.skip(f"{reason}. Install it with: make servers (or set {OTHER}=URL)")


class RabbitMQNode(PrivateNode):
    """A node of the tests' own; skips where there is none."""

    def __init__(self, *settings: str, **more: Any) -> None:
        try:
            super().__init__(*settings, **more)
        except NoNode as error:
            missing(str(error).partition(":")[0])

    def start_again(self) -> None:
        """Start, unless it runs."""
        if not self.is_running:
            self.start()

    def restart(self) -> Self:
        """Shut down and start."""
        self.stop()
        return self.start()

    def remembers(self, queue: str) -> bool:
        """Whether a quorum queue is on disk, and the files that say so are whole."""
        files = [path.read_bytes() for path in self.folder.glob("mnesia/*/quorum/*/*.dets")]
        # What says that a file is whole: the third word of its header.
        whole = all(int.from_bytes(file[8:12]) == 1 for file in files)
        return whole and any(queue.encode() in file for file in files)


@functools.cache
def shared_url() -> str:
    """The virtual host that tests share, each in a namespace of its own; skips where there is
    none.
    """
    if named := os.environ.get(OTHER):
        return named
    return RabbitMQNode().start().url


def in_namespace(name: str, url: str = "") -> str:
    """The shared virtual host, as one test has it for itself."""
    url = url or shared_url()
    mark = "&" if "?" in url else "?"
    return f"{url}{mark}namespace={name}"


def with_option(url: str, name: str, value: object) -> str:
    """A URL with an option that it may have already, with another value."""
    place, _, query = url.partition("?")
    others = [pair for pair in query.split("&") if pair and not pair.startswith(f"{name}=")]
    return f"{place}?{'&'.join([*others, f'{name}={value}'])}"


@contextlib.contextmanager
def channel(url: str = "") -> Iterator[Any]:
    """A channel of a test's own, to look at what duly made and to be a stranger."""
    from duly.brokers.rabbitmq.address import address_of

    address = address_of(url or shared_url(), "the tests' URL")
    host, port = address.hosts[0]
    connection = amqp.Connection(
        f"{host}:{port}",
        userid=address.user,
        password=address.password,
        virtual_host=address.vhost,
        ssl=address.tls_for(host),
    )
    connection.connect()
    try:
        yield connection.channel()
    finally:
        connection.close()
