"""Fixtures: the zygote, scenes, and a way to run many scenes side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.scene import ROOT, Nursery, Scene

PROGRAM = "tests.faults.program:run"
MakeScene = Callable[..., Scene]


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery(PROGRAM, ROOT)
    yield nursery
    nursery.close()


@pytest.fixture
def make_scene(nursery: Nursery, tmp_path: Path) -> Iterator[MakeScene]:
    """Make a scene in a folder of its own; at the end nobody is left in it."""
    made: list[Scene] = []

    def make(name: str = "scene", **orders: Any) -> Scene:
        made.append(Scene(nursery, tmp_path / name, **orders))
        return made[-1]

    yield make
    for scene in made:
        scene.end()
