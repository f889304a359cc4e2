"""A shop at work, for the tests of the harness."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from duly.testing import Running, running
from tests.harness import shop

Make = Callable[..., Running]


@pytest.fixture(autouse=True)
def _nothing_before() -> None:
    shop.mailed.clear()
    shop.seen.clear()


@pytest.fixture
def shopping(tmp_path: Path) -> Iterator[Running]:
    with running(shop.app, folder=tmp_path) as t:
        with t.connection() as db:
            db.execute(shop.TABLE)
        yield t
