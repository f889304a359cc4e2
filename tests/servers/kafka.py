"""Kafka for tests: one node a session, or one of a test's own that it may kill.

``DULY_TEST_KAFKA=host:port`` names another for the first.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NoReturn

import pytest

from duly.testing.conformance.plugin import in_ci
from duly.testing.kafka import NoNode, PrivateNode

OTHER = "DULY_TEST_KAFKA"


def missing(reason: str) -> NoReturn:
    """Skip on a laptop, fail in CI: there what is not tested is not promised."""
    if in_ci():
        pytest.fail(f"{reason}, and CI is set: make servers", pytrace=False)
    pytest.skip(f"{reason}. Install it with: make servers (or set {OTHER}=host:port)")


class KafkaNode(PrivateNode):
    """A node of the tests' own; skips where there is none."""

    def __init__(self, *settings: str, **more: Any) -> None:
        try:
            super().__init__(*settings, **more)
        except NoNode as error:
            missing(str(error).partition(":")[0])


@functools.cache
def shared_url() -> str:
    """The node that tests share, each in a namespace of its own; skips where there is none."""
    if named := os.environ.get(OTHER):
        return f"kafka://{named}"
    return KafkaNode().start().url


def in_namespace(name: str, url: str = "", **options: object) -> str:
    """The shared node, as one test has it for itself."""
    more = "".join(f"&{option}={value}" for option, value in options.items())
    return f"{url or shared_url()}?namespace={name}{more}"
