"""A broker's or store's docs page, as far as the suite reads it.

One fenced block whose info string is ``toml conformance`` has a table for each subject: what it
can, and in ``deviations`` what its nature forces, each with the reason.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from duly.broker import Capabilities
from duly.errors import ConfigurationError
from duly.store import StoreCapabilities

DEVIATIONS: Mapping[str, str] = {
    "prefix-only": (
        "what was settled behind an unsettled message stays settled when its worker is gone."
    ),
    "lane-lost-together": (
        "when the lease of one message ends, its lane keeps the others that it has extended."
    ),
    "moves-on-join": "a lane keeps what it holds when another lane joins the subscription.",
    "due-by-elapsed-time": (
        "a due time names a moment of the wall clock, also where that is set while a message waits."
    ),
}
"""The promises that a broker's nature may force it to break, by the name of the deviation."""

NO_BOUND = "unbounded"
_BLOCK = re.compile(r"^```toml conformance\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Expected:
    """What a page says of one subject. ``can`` has capabilities by name."""

    page: Path
    name: str
    can: Mapping[str, Any]
    deviations: Mapping[str, str]


def expected_on(page: Path, name: str) -> Expected:
    """What the page says of this subject. Raises `ConfigurationError` where it says nothing, or
    names a deviation that there is none of.
    """
    tables = _tables(page)
    if name not in tables:
        there = ", ".join(tables) or "none"
        raise ConfigurationError(
            f"{page}: no table [{name}] in its conformance block; it has {there}"
        )
    table = dict(tables[name])
    deviations = table.pop("deviations", {})
    for deviation in deviations:
        if deviation not in DEVIATIONS:
            raise ConfigurationError(
                f"{page}: [{name}.deviations] names {deviation!r}; there are "
                f"{', '.join(DEVIATIONS)}. A promise that is not one of these cannot be broken."
            )
    return Expected(page, name, table, deviations)


def _tables(page: Path) -> Mapping[str, Any]:
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{page}: this page cannot be read: {error}") from error
    blocks: list[str] = _BLOCK.findall(text)
    if len(blocks) != 1:
        raise ConfigurationError(
            f"{page}: {len(blocks)} blocks that begin with ```toml conformance; it needs one, "
            "with a table for each subject and its capabilities in it"
        )
    try:
        return tomllib.loads(blocks[0])
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{page}: its conformance block is no TOML: {error}") from error


def told_of(can: Capabilities | StoreCapabilities, **more: Any) -> dict[str, Any]:
    """Capabilities as a page states them: which database it is differs from test to test."""
    told = {each.name: getattr(can, each.name) for each in fields(can)}
    if isinstance(can, Capabilities):
        told["database"] = can.database is not None
    else:
        del told["database"], told["limits"]  # the one differs, the other is for people
    return {name: NO_BOUND if value is None else value for name, value in told.items()} | more


def as_toml(name: str, told: Mapping[str, Any]) -> str:
    """The table to put into a page."""
    lines = [f"{key} = {_value(value)}" for key, value in told.items()]
    return "\n".join([f"[{name}]", *lines])


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return str(value)
