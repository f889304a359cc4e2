"""Judging a round by what its processes recorded, and counting what happened in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import msgspec

from duly.testing.chaos.setup import SERVER_LOG
from duly.testing.chaos.workload import Spec, Workload
from duly.testing.checker import Anomaly, judge
from duly.testing.history import (
    Admit,
    Claim,
    Commit,
    End,
    Event,
    Fault,
    Heal,
    Publish,
    Read,
    Settle,
    Start,
    read_history,
)

# How a server says in its log that it ended a statement.
_TOLD = ("lock timeout", "statement timeout")
_AT_ONCE = (
    *("drain", "clock", "lock", "cut before COMMIT", "cut after COMMIT"),
    *("cut before publish", "cut after publish", "cut before ack", "cut after ack", "silence"),
    *("cut before transaction", "cut after transaction"),
)
# Who waited for so long when an alarm was over waited because of it.
_HELD_UP_S = 0.2


@dataclass(slots=True)
class Tally:
    """What happened in one round or in many."""

    operations: Counter[tuple[str, str]] = field(default_factory=Counter)
    struck: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    starts: Counter[str] = field(default_factory=Counter)
    dead: Counter[str] = field(default_factory=Counter)
    consumers: dict[str, str] = field(default_factory=dict)
    anomalies: list[tuple[str, str, Anomaly]] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    events: int = 0

    def add(self, other: Tally) -> None:
        """Add another's."""
        for name in ("operations", "struck", "hits", "messages", "starts", "dead", "unknown"):
            getattr(self, name).update(getattr(other, name))
        self.consumers.update(other.consumers)
        self.anomalies += other.anomalies
        self.complaints += other.complaints
        self.rounds += other.rounds
        self.events += other.events

    @property
    def is_good(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.anomalies and not self.complaints


def judged(folder: Path) -> Tally:
    """Judge the round in this folder by its histories, for each consumer."""
    events = in_token_order(read_history((folder / "histories").glob("*.jsonl")))
    tally = Tally(rounds=1, events=len(events))
    _count(tally, events)
    hits_of(tally, events)
    _hits_told(tally, folder / SERVER_LOG)
    workload = Workload.kept_in(folder)
    tally.consumers = {spec.name: spec.guarantee for spec in workload.specs}
    for spec in workload.specs:
        mine = [
            *relevant(events, spec),
            *read_history((folder / "read" / spec.name).glob("*.jsonl")),
        ]
        judgement = judge(mine, workload.terms(spec))
        tally.anomalies += [(folder.name, spec.name, each) for each in judgement.anomalies]
        tally.unknown.update(f"{spec.name}: {why}" for why in judgement.unknown)
        for event in mine:
            if isinstance(event, Read):
                tally.messages[spec.name] += sum(
                    each.topic == spec.topic.name for each in event.final.log
                )
                tally.dead[spec.name] += sum(
                    each.subscription == spec.name for each in event.final.dead
                )
    return tally


def in_token_order(events: Sequence[Event]) -> list[Event]:
    """The history with each claim no later than those whose tokens are higher.

    A process that is stopped between claiming and recording it records it late; the tokens, which
    only grow, say that it was earlier.
    """
    given = [
        (token, event)
        for event in events
        if isinstance(event, Claim) and event.phase == "ok"
        if (token := token_of(event.token)) is not None
    ]
    latest, moved = inf, dict[int, float]()
    for _, claim in sorted(given, key=lambda each: (each[0], each[1].at), reverse=True):
        latest = min(latest, claim.at)
        if latest < claim.at:
            moved[id(claim)] = latest
    placed = [msgspec.structs.replace(e, at=moved[id(e)]) if id(e) in moved else e for e in events]
    return sorted(placed, key=lambda e: e.at)


def token_of(receipt: str) -> int | None:
    """The token in a recorded receipt: the first number of a tuple. None: it has none that other
    processes' tokens could be compared with.
    """
    return int(receipt[1:].partition(",")[0]) if receipt.startswith("(") else None


def relevant(events: Iterable[Event], spec: Spec) -> Iterator[Event]:
    """What concerns one consumer: its messages, what was done to them, and every fault."""
    events = list(events)
    topics = {spec.topic.name, spec.outputs.name}
    others = {
        event.tx for event in events if isinstance(event, Admit) and event.subscription != spec.name
    }
    runs = {e.run for e in events if isinstance(e, Start) and e.subscription == spec.name}
    for event in events:
        match event:
            case Publish():
                if event.message.topic in topics:
                    yield event
            case Claim() | Start() | Settle() | Admit():
                if event.subscription == spec.name:
                    yield event
            case End():
                if event.run in runs:
                    yield event
            case Commit():
                if event.tx not in others:
                    yield event
            case _:
                yield event


def _count(tally: Tally, events: Sequence[Event]) -> None:
    ended = {e.tx: e.phase for e in events if isinstance(e, Commit) and e.phase != "invoke"}
    for event in events:
        match event:
            case Publish() | Settle() if event.tx:
                # Its commit decides; without an answer nobody knows.
                if event.phase == "invoke":
                    name = type(event).__name__.lower()
                    tally.operations[name, "invoke"] += 1
                    tally.operations[name, ended.get(event.tx, "info")] += 1
            case Publish() | Commit():
                tally.operations[type(event).__name__.lower(), event.phase] += 1
            case Claim():
                # Invocations are claims; each delivery of one is an event of its own.
                tally.operations["claim", event.phase] += 1
            case Settle():
                phase = "refused" if event.refused else event.phase
                tally.operations["settle", phase] += 1
            case Start():
                tally.operations["handler", "invoke"] += 1
                tally.starts[event.subscription] += 1
            case End():
                tally.operations["handler", event.how] += 1
            case _:
                pass


# --- which faults hit


def hits_of(tally: Tally, events: Sequence[Event]) -> None:
    """Count the faults that hit, each by what the history shows of it."""
    work = _Work()
    for event in events:
        work.note(event)
        if isinstance(event, Fault):
            hit = _hit(work, event)
            tally.hits.update([hit] if hit else [])
    tally.hits["pause"] += _pauses(events)
    tally.hits["full disk"] += sum(_failed_between(events, "fill", "room").values())
    tally.hits.update(_failed_between(events, "server down", "server up"))
    tally.hits.update(_failed_between(events, "node down", "node up"))
    tally.hits.update(_held_up(events))
    tally.hits += Counter()  # without zeros


class _Work:
    """Who is in the middle of what, at some point of a history."""

    def __init__(self) -> None:
        self.held: dict[str, set[str]] = {}
        self.publishing: Counter[str] = Counter()
        self.clock = 0
        self.worked_since_clock = False

    def note(self, event: Event) -> None:
        """Follow the history by one event."""
        match event:
            case Claim(phase="ok"):
                self.held.setdefault(event.who, set()).add(event.subscription + event.token)
            case Settle(phase="ok") | Settle(phase="fail"):
                self.held.get(event.who, set()).discard(event.subscription + event.token)
            case Settle(phase="invoke") if event.tx:
                self.held.get(event.who, set()).discard(event.subscription + event.token)
            case Publish(phase="invoke"):
                self.publishing[event.who] += 1
            case _:
                pass


def _hit(work: _Work, fault: Fault) -> str | None:
    """What a fault did, where it did it at once: a kill of a worker counts in the middle of its
    work, one of a publisher where it had published something that its successor repeats.
    """
    if fault.kind in _AT_ONCE or (fault.kind == "end session" and fault.point != "idle"):
        return fault.kind
    if fault.point == "killed by a message":
        return "kill by message"
    if fault.point == "killed" and fault.who.startswith("w") and work.held.get(fault.who):
        return "kill worker"
    if fault.point == "killed" and work.publishing[fault.who]:
        return "kill publisher"
    return None


def _pauses(events: Sequence[Event]) -> int:
    """Pauses in which somebody else was given what the one that stood still held."""
    stopped: dict[str, tuple[float, set[tuple[str, object]]]] = {}
    holds: dict[str, dict[str, tuple[str, object]]] = {}
    hit = 0
    for event in events:
        match event:
            case Claim(phase="ok") if event.message is not None:
                what = (event.subscription, event.message.identity)
                for who, (_, held) in list(stopped.items()):
                    if who != event.who and what in held:
                        hit += 1
                        del stopped[who]
                holds.setdefault(event.who, {})[event.subscription + event.token] = what
            case Settle(phase="ok"):
                holds.get(event.who, {}).pop(event.subscription + event.token, None)
            case Fault(kind="stop"):
                stopped[event.who] = (event.at, set(holds.get(event.who, {}).values()))
            case Fault(kind="go on"):
                stopped.pop(event.who, None)
            case _:
                pass
    return hit


def _failed_between(events: Sequence[Event], begins: str, ends: str) -> Counter[str]:
    """Faults that last for a while and in which something failed, by the point they name."""
    lasting: str | None = None
    failed = False
    hits: Counter[str] = Counter()
    for event in events:
        match event:
            case Fault() if event.kind == begins:
                lasting, failed = event.point, False
            case Fault() | Heal() if isinstance(event, Heal) or event.kind == ends:
                if lasting is not None and failed:
                    hits[lasting] += 1
                lasting = None
            case Publish() | Claim() | Commit() | Settle():
                failed |= event.phase in ("fail", "info")
            case _:
                pass
    return hits


def _held_up(events: Sequence[Event]) -> Counter[str]:
    """Alarms at whose end somebody still waited to publish, by their kind."""
    waiting: dict[tuple[str, object], float] = {}
    hits: Counter[str] = Counter()
    for event in events:
        match event:
            case Publish(phase="invoke", tx=""):
                waiting[event.who, event.message.identity] = event.at
            case Publish(tx=""):
                waiting.pop((event.who, event.message.identity), None)
            case Fault(kind="alarm over"):
                held = any(since + _HELD_UP_S < event.at for since in waiting.values())
                hits[event.point] += held
            case Fault(kind="crash"):
                waiting = {key: at for key, at in waiting.items() if key[0] != event.who}
            case _:
                pass
    return hits


def _hits_told(tally: Tally, log: Path) -> None:
    """What a server has written that it ended, of those who had to wait for too long."""
    if log.exists():
        text = log.read_text(errors="replace")
        for kind in _TOLD:
            tally.hits[kind] += text.count(f"canceling statement due to {kind}")
