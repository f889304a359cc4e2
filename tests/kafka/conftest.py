"""A namespace on the node that tests share, and a node of a test's own."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from tests.servers.kafka import KafkaNode, in_namespace
from tests.servers.postgres import named_after


@pytest.fixture
def kafka_url(request: pytest.FixtureRequest) -> str:
    """The shared node, as one test has it for itself."""
    return in_namespace(f"{named_after(request.node.nodeid)}_{secrets.token_hex(4)}")


@pytest.fixture(scope="module")
def kafka_node() -> Iterator[KafkaNode]:
    """A node of this file's own, to be killed and started again."""
    with KafkaNode() as node:
        yield node
