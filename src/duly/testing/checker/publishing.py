"""Properties of the log and of publishing, under every guarantee."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator

from duly.testing.checker.case import Case, Published
from duly.testing.checker.properties import forbids
from duly.testing.history import About


def named(message: About) -> str:
    """A message, for people."""
    return f"{message.topic}/{message.id}"


@forbids("phantom")
def phantom(case: Case) -> Iterator[str]:
    """Something was delivered that nobody published."""
    unknown = {m.identity: m for _, m in case.seen() if m.identity not in case.publishes}
    for message in unknown.values():
        yield f"{named(message)} was delivered and nobody published it"


def _like(case: Case, message: About) -> list[Published]:
    return [
        each
        for each in case.publishes.get(message.identity, ())
        if each.message.content == message.content and each.message.key == message.key
    ]


def _seen_once(case: Case) -> dict[tuple[str, str, str, str | None, str], tuple[int, About]]:
    first: dict[tuple[str, str, str, str | None, str], tuple[int, About]] = {}
    for at, message in case.seen():
        first.setdefault((*message.identity, message.key, message.content), (at, message))
    return first


@forbids("aborted read")
def aborted_read(case: Case) -> Iterator[str]:
    """A message of a failed publish or a rolled-back transaction was seen."""
    for _, message in _seen_once(case).values():
        tries = _like(case, message)
        if tries and all(case.outcome(each) == "fail" for each in tries):
            yield f"{named(message)} was seen though publishing it failed or was rolled back"


@forbids("dirty read")
def dirty_read(case: Case) -> Iterator[str]:
    """A message was seen before its transaction committed."""
    for at, message in _seen_once(case).values():
        tries = _like(case, message)
        if tries and all(each.tx and not _may_stand(case, each, at) for each in tries):
            yield f"{named(message)} was seen before its transaction committed"


def _may_stand(case: Case, publish: Published, at: int) -> bool:
    tx = case.txs.get(publish.tx)
    if tx is None or tx.committing is None:
        return True  # rolled back: that is an aborted read
    return tx.committing < at


@forbids("torn transaction")
def torn_transaction(case: Case) -> Iterator[str]:
    """Part of an atomic publish was seen, the rest never."""
    seen = case.seen_contents()
    together: dict[str, list[Published]] = defaultdict(list)
    for tries in case.publishes.values():
        for each in tries:
            # Rolled back, what is seen of it is an aborted read; published again on its own, a
            # message says nothing about the transaction.
            alone = len(_like(case, each.message)) == 1
            if each.tx and alone and case.outcome(each) != "fail" and not each.repeat:
                together[each.tx].append(each)
    for tx, parts in together.items():
        missing = [
            each for each in parts if (each.message.identity, each.message.content) not in seen
        ]
        if missing and len(missing) < len(parts):
            yield (
                f"transaction {tx} published {len(parts)} messages, {named(missing[0].message)} "
                f"and {len(missing) - 1} more of them were never seen"
            )


@forbids("lost write")
def lost_write(case: Case) -> Iterator[str]:
    """A message that was certainly published is not in the log."""
    log = {message.identity for message in case.final.log}
    if not case.was_read or not case.terms.confirms_publishing:
        return
    for identity in case.must():
        if identity not in log and identity not in case.dropped:
            yield f"{identity[0]}/{identity[2]} was published and is not in the log"


@forbids("duplicate")
def duplicate(case: Case) -> Iterator[str]:
    """One id stands at two positions though publishing was idempotent, or was done once."""
    made = any(fault.kind == "duplicate" for _, fault in case.faults)
    for identity, count in case.copies().items():
        tries = case.publishes.get(identity, ())
        stored = sum(case.outcome(each) != "fail" for each in tries)
        is_input = identity[0] in case.terms.topics
        idempotent = case.terms.drops_repeats if is_input else case.terms.relays_once
        if count > 1 and (idempotent or (count > stored and not made)):
            yield f"{identity[0]}/{identity[2]} stands {count} times in the log"


@forbids("inconsistent positions")
def inconsistent_positions(case: Case) -> Iterator[str]:
    """One position of a log held two different messages."""
    at: dict[str, About] = {}
    for _, claim in [*case.claims, *case.others_claims]:
        if claim.position and claim.message is not None:
            first = at.setdefault(claim.position, claim.message)
            if first != claim.message:
                yield f"{claim.position} held {named(first)} and {named(claim.message)}"


@forbids("nonmonotonic send")
def nonmonotonic_send(case: Case) -> Iterator[str]:
    """Two messages of one publisher and key are read in another order than they were sent."""
    if not case.terms.keeps_send_order:
        return
    place: dict[tuple[str, str, str], int] = {}
    for number, message in enumerate(case.final.log):
        place.setdefault(message.identity, number)
    lines: dict[tuple[str, str, str | None], list[Published]] = defaultdict(list)
    for identity, tries in case.publishes.items():
        if len(tries) == 1 and identity in place and not tries[0].tx:
            each = tries[0]
            lines[each.who, identity[0], each.message.key].append(each)
    for line in lines.values():
        for earlier, later in itertools.pairwise(line):
            if place[earlier.message.identity] > place[later.message.identity]:
                yield f"{named(later.message)} stands before {named(earlier.message)}"


@forbids("corruption")
def corruption(case: Case) -> Iterator[str]:
    """Body, headers or key differ from what was published."""
    for _, message in _seen_once(case).values():
        if message.identity in case.publishes and not _like(case, message):
            yield f"{named(message)} is not what was published under that id"
