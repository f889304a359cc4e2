"""Processes that are started through a zygote, and signalled as soon as they are there."""

from __future__ import annotations

import signal
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

from duly.testing.chaos.processes import Nursery

ROOT = Path(__file__).parent.parent.parent
LASTS_S = 60.0


def lasts(_orders: dict[str, Any]) -> int:
    """What a child runs: longer than anybody here waits."""
    threading.Event().wait(LASTS_S)
    return 0


def test_a_child_told_to_end_before_it_is_itself_ends(tmp_path: Path):
    """Its parent ignores the signal, and so does it at first."""
    with closing(Nursery("tests.chaos.test_processes:lasts", ROOT)) as nursery:
        for number in range(50):
            child = nursery.start({"log": str(tmp_path / f"{number}.log")})
            child.signal(signal.SIGTERM)
            assert child.wait() == -signal.SIGTERM, child.said()
