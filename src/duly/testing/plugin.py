"""The pytest plugin: the fixtures ``duly_running`` and ``duly_faulty``.

It is loaded wherever duly and pytest are installed, so nothing is imported here that costs time:
what the fixtures need they import when a test asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from duly import App
    from duly.testing.harness import Faults, RunApp, Running

# Seeds of a test with faults, where nothing else is asked for: enough to find what often goes
# wrong, few enough that nobody leaves such tests out.
SEEDS = 5
# A small test makes few calls: more seldom, and most seeds would hit nothing.
RATE = 0.1


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options for tests with faults."""
    group = parser.getgroup("duly", "messaging under faults (the fixture duly_faulty)")
    group.addoption(
        "--duly-seeds",
        type=int,
        default=SEEDS,
        metavar="N",
        help=f"run each test that uses duly_faulty with so many seeds (default: {SEEDS})",
    )
    group.addoption(
        "--duly-seed",
        type=int,
        default=None,
        metavar="SEED",
        help="run it with this seed only: what a failed test printed",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with faults is run once for each seed."""
    if "duly_seed" not in metafunc.fixturenames:
        return
    only: int | None = metafunc.config.getoption("--duly-seed")
    count: Any = metafunc.config.getoption("--duly-seeds")
    if only is None and count < 1:
        raise pytest.UsageError(f"--duly-seeds={count}: give 1 or more")
    seeds = range(count) if only is None else [only]
    metafunc.parametrize("duly_seed", seeds, ids=[f"seed{seed}" for seed in seeds])


@pytest.fixture
def duly_running(tmp_path: Path) -> RunApp:
    """`duly.testing.running`, its files in the test's own ``tmp_path``.

    ::

        def test_billing(duly_running):
            with duly_running(app) as t:
                t.publish(orders, Order("o-1"))
                t.drain()
    """
    from duly.testing.harness import running

    def run(app: App, **options: Any) -> Running:
        return running(app, **{"folder": tmp_path, **options})

    return run


@pytest.fixture
def duly_faulty(tmp_path: Path, duly_seed: int) -> Iterator[RunApp]:
    """`duly_running` with faults at broker and store, once for each of ``--duly-seeds`` seeds.

    ``rate``, ``kinds``, ``at`` and ``most`` are those of `duly.testing.Faults`. Where the test
    fails, pytest shows what hit and how to replay it.
    """
    from duly.testing.harness import Faults, running

    made: list[Faults] = []

    def run(app: App, **options: Any) -> Running:
        given: dict[str, Any] = {"rate": RATE}
        given |= {name: options.pop(name) for name in _OF_FAULTS if name in options}
        made.append(options.setdefault("faults", Faults(duly_seed, **given)))
        return running(app, **{"folder": tmp_path, "seed": duly_seed, **options})

    yield run
    print(f"replay with --duly-seed={duly_seed}")  # noqa: T201 - shown where the test failed
    for faults in made:
        print(f"faults that hit (call, its name, fault): {faults.hits}")  # noqa: T201


_OF_FAULTS = ("rate", "kinds", "at", "most")
