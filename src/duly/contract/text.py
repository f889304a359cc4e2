"""The contract for people to read."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from duly.contract.terms import ConsumerTerms, Contract, Flow, ScheduleTerms, TopicTerms

_WIDTH = 96


def render(contract: Contract) -> str:
    """The whole contract as plain text, a paragraph for each topic, consumer and flow."""
    return "\n".join(_lines(contract)) + "\n"


def _lines(contract: Contract) -> Iterator[str]:
    store = "none" if contract.store is None else contract.store
    yield f"broker: {contract.broker}    store: {store}"
    for note in contract.notes:
        yield from _wrapped("! ", note)
    yield from _section("topics", [_topic(terms) for terms in contract.topics])
    yield from _section("consumers", [_consumer(terms) for terms in contract.consumers])
    yield from _section("schedules", [_schedule(terms) for terms in contract.schedules])
    yield from _section("end to end", [_flow(flow) for flow in contract.flows])


def _section(title: str, paragraphs: list[list[str]]) -> Iterator[str]:
    if paragraphs:
        yield from ("", title.upper())
    for paragraph in paragraphs:
        yield from paragraph


def _topic(terms: TopicTerms) -> list[str]:
    lines = [f"  {terms.name}: {terms.guarantee}"]
    lines += _wrapped("    kept by  ", terms.provided_by)
    if terms.drops_repeats is not None:
        lines += _wrapped("    repeats  ", f"dropped by {terms.drops_repeats}")
    return lines + _limits(terms.limits)


def _consumer(terms: ConsumerTerms) -> list[str]:
    how = "" if terms.admission is None else f", admission {terms.admission}"
    lines = [f"  {terms.name} <- {', '.join(terms.topics)}: {terms.guarantee}{how}"]
    lines += _wrapped("    kept by  ", terms.provided_by)
    return lines + _limits(terms.limits)


def _schedule(terms: ScheduleTerms) -> list[str]:
    lines = [f"  {terms.name} -> {terms.topic}: {terms.when}"]
    lines += _wrapped("    kept by  ", terms.provided_by)
    return lines + _limits(terms.limits)


def _limits(limits: tuple[str, ...]) -> list[str]:
    lines: list[str] = []
    for number, limit in enumerate(limits):
        lines += _wrapped("    limits   " if number == 0 else "             ", limit)
    return lines


def _flow(flow: Flow) -> list[str]:
    word = flow.guarantee or "NONE of the three: may be lost, and may be handled twice"
    return [f"  {flow.topic} -> {flow.consumer}: {word}", *_wrapped("    ", flow.why)]


def _wrapped(start: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
    )
