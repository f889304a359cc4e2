"""``duly run --metrics``: real processes, asked over the loopback interface."""

from __future__ import annotations

import os
import signal
import socket
import urllib.error
import urllib.request

import pytest

from tests.cli.conftest import Place, children, end, place, shop
from tests.waiting import eventually

__all__ = ["place", "shop"]

PUBLISH = "orders.jsonl"


def free_ports(count: int) -> int:
    """The first of so many neighbouring ports that nobody uses."""
    for _ in range(100):
        probes: list[socket.socket] = []
        try:
            probes.append(socket.create_server(("127.0.0.1", 0)))
            first = int(probes[0].getsockname()[1])
            neighbours = range(first + 1, first + count)
            probes.extend(socket.create_server(("127.0.0.1", number)) for number in neighbours)
            return first
        except (OSError, OverflowError):
            continue
        finally:
            for probe in probes:
                probe.close()
    raise AssertionError("no free ports")


def scraped(port: int) -> str:
    """What is served there; nothing while nobody serves."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return str(answer.read(), "utf-8")
    except (urllib.error.URLError, ConnectionError):
        return ""


def value(text: str, sample: str) -> float:
    """The value of a sample, 0 where it is not there."""
    lines = [line for line in text.splitlines() if line.startswith(sample + " ")]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0


def test_each_worker_serves_what_it_did(shop: Place):
    shop.write(PUBLISH, "".join(f'{{"order": "o-{n}", "cents": 1}}\n' for n in range(20)))
    port = free_ports(2)
    running = shop.start("run", "shop:app", "--processes", "2", "--metrics", str(port))
    eventually(lambda: scraped(port) and scraped(port + 1), "both workers serve")
    shop.duly("publish", "shop:app", "orders", "--from", PUBLISH)
    shop.await_rows("select * from charges", 20)
    sample = 'duly_settled_total{app="shop",as="done",consumer="billing"}'
    eventually(
        lambda: sum(value(scraped(each), sample) for each in (port, port + 1)) == 20,
        "twenty settled, by both together",
        lambda: scraped(port) + scraped(port + 1),
    )
    seconds = 'duly_handler_seconds_total{app="shop",consumer="billing"}'
    assert value(scraped(port), seconds) + value(scraped(port + 1), seconds) > 0
    backlog = 'duly_backlog{app="shop",consumer="billing",topic="orders"}'
    assert backlog in scraped(port)
    assert backlog in scraped(port + 1)

    [first, *_] = children(running.pid)
    os.kill(first, signal.SIGKILL)
    eventually(lambda: first not in children(running.pid), "the killed one is gone")
    eventually(lambda: scraped(port) and scraped(port + 1), "its successor serves")
    assert end(running).status == 0


@pytest.mark.parametrize("given", ["x", "0", "99999", "127.0.0.1:", "65536"])
def test_what_is_no_port_is_said(shop: Place, given: str):
    ended = shop.duly("run", "shop:app", "--metrics", given)
    assert ended.status == 2
    assert f"--metrics {given}: give a port" in ended.err


def test_a_port_that_is_taken_is_said_before_anything_starts(shop: Place):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = shop.duly("run", "shop:app", "--metrics", str(port))
    assert ended.status == 2
    assert f"port {port} cannot be served" in ended.err
    assert not (shop.path / "shop.db").exists()
