"""A namespace on the node that tests share, and a node of a test's own."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from tests.servers.kafka import KafkaNode, in_namespace
from tests.servers.postgres import named_after

# By its latest protocol the brokers say how long a member may be silent.
QUICK = ("group.consumer.session.timeout.ms=2000", "group.consumer.heartbeat.interval.ms=400")


@pytest.fixture
def kafka_url(request: pytest.FixtureRequest) -> str:
    """The shared node, as one test has it for itself."""
    return in_namespace(f"{named_after(request.node.nodeid)}_{secrets.token_hex(4)}")


@pytest.fixture(scope="module")
def kafka_node() -> Iterator[KafkaNode]:
    """A node of this file's own, to be killed and started again."""
    with KafkaNode() as node:
        yield node


@pytest.fixture(scope="module")
def quick_node() -> Iterator[KafkaNode]:
    """A node that soon takes members of groups for dead by the latest protocol, too."""
    with KafkaNode(*QUICK) as node:
        yield node


@pytest.fixture(
    params=[
        pytest.param("", id="cooperative"),
        pytest.param("&partition.assignment.strategy=range", id="eager", marks=pytest.mark.long),
        pytest.param("&group.protocol=consumer", id="kip-848", marks=pytest.mark.long),
    ]
)
def dealt_url(request: pytest.FixtureRequest) -> str:
    """A namespace whose groups are dealt out in each of the ways that there are; who is silent for
    two seconds is taken for dead.
    """
    if "group.protocol" in request.param:
        node: KafkaNode = request.getfixturevalue("quick_node")
        return in_namespace(f"dealt{secrets.token_hex(4)}", node.url) + str(request.param)
    url: str = request.getfixturevalue("kafka_url")
    return f"{url}{request.param}&session.timeout.ms=2000&heartbeat.interval.ms=400"
