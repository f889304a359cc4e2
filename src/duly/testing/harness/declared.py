"""What a test names has to be there: a misspelt expectation must not pass for one that holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from duly.app import App
from duly.dependencies.factories import Factory, Use, name_of, uses_of
from duly.errors import ConfigurationError
from duly.inspection import KINDS
from duly.message import Topic


def check_topic(app: App, topic: Topic[Any], published: Iterable[str]) -> None:
    """Refuse a topic that the app neither consumes nor declares, and that nobody published to."""
    known = {each.name: each for each in app.topics}
    if topic.name in known:
        app.declare(topic)  # the same, or refused
        return
    if topic.name not in {*published}:
        raise ConfigurationError(
            f"app {app.name!r} has nothing to do with a topic {topic.name!r}: no consumer reads "
            f"it, and nothing was published to it; there are {_names(known)}. A topic that is "
            "only published to is named by app.declare(...)"
        )


def check_consumer(worked: Iterable[str], name: str) -> None:
    """Refuse the name of a consumer that does not work in this test."""
    if name not in worked:
        raise ConfigurationError(
            f"no consumer {name!r} is worked here; there are {_names(sorted(worked))}"
        )


def check_kind(kind: str) -> None:
    """Refuse a kind of incident that there is none of."""
    if kind not in KINDS:
        raise ConfigurationError(f"{kind!r} is no kind of incident; there are {_names(KINDS)}")


def check_overrides(app: App, overrides: Mapping[Factory, Factory]) -> None:
    """Refuse a replacement for what no consumer of the app uses, itself or through another."""
    used: set[Factory] = set()
    for consumer in app.consumers:
        # Both: what is used only by what is replaced may be replaced with it.
        for replaced in ({}, {**app.overrides, **overrides}):
            used.update(_used(consumer.handler.uses, replaced, frozenset()))
    for factory in overrides:
        if factory not in used:
            there = ", ".join(sorted(map(name_of, used))) or "nothing"
            raise ConfigurationError(
                f"overrides has {name_of(factory)}, which no consumer of app {app.name!r} uses; "
                f"they use {there}. Name the very function that stands in duly.use(...)"
            )


def _used(
    uses: Mapping[str, Use], replaced: Mapping[Factory, Factory], open_: frozenset[Factory]
) -> Iterator[Factory]:
    for use in uses.values():
        yield use.factory
        factory: Callable[..., Any] = replaced.get(use.factory, use.factory)
        if factory not in open_:  # a circle is refused where the worker is made
            needed = uses_of(factory, f"the dependency {name_of(factory)}")
            yield from _used(needed, replaced, open_ | {factory})


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
