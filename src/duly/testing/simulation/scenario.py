"""What is simulated: a broker, a guarantee, a handler's manners, and how many take part."""

from __future__ import annotations

from random import Random
from typing import Literal, get_args

import msgspec

from duly.guarantees import GuaranteeName

Kind = Literal[
    "database",
    "log",
    "log-inbox",
    "queue",
    "sqlite",
    "sqlite-inbox",
    "sqlite-cursor",
    "postgres",
    "postgres-inbox",
    "postgres-cursor",
]
"""The broker and how its messages are admitted: by claim, by cursor, by inbox, by inbox; a store
on SQLite: by claim in the broker's own file, by inbox beside a SQLite broker, by cursor beside a
log in memory; and a store on a PostgreSQL server, by claim in the broker's own schema, by inbox
beside a queue in memory and by cursor beside a log."""

Manner = Literal[
    "ok",
    "fail once",
    "fail always",
    "retry",
    "reject",
    "reject once",
    "cancel once",
    "die once",
    "die always",
    "slow",
    "hang once",
    "lose once",
    "undecodable",
]
"""What the handler does with a message. ``hang once``: it never returns. ``lose once``: the
database rolls the transaction back inside it, and it goes on as if nothing had happened."""

MANNERS: tuple[Manner, ...] = get_args(Manner)
ALL_KINDS: tuple[Kind, ...] = get_args(Kind)
POSTGRES_KINDS: tuple[Kind, ...] = ("postgres", "postgres-inbox", "postgres-cursor")
# Those that need no server.
KINDS: tuple[Kind, ...] = tuple(kind for kind in ALL_KINDS if kind not in POSTGRES_KINDS)
MEMORY_KINDS: tuple[Kind, ...] = tuple(kind for kind in KINDS if not kind.startswith("sqlite"))
SQLITE_KINDS: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind.startswith("sqlite"))
GUARANTEES: tuple[GuaranteeName, ...] = get_args(GuaranteeName)


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One small world. ``manners`` are given to the messages in turn.

    - ``batch``: messages claimed together; ``batch_handler``: and handled in one call.
    - ``within``: some are published inside a transaction, several at once.
    - ``conflicts``: some ids are published again with another body.
    - ``horizon``: the inbox forgets before the end of the run.
    - ``preempt``: how often a process is interrupted by another between two statements.
    - ``payloads``: the handler takes payloads, so that the broker need not fetch more.
    - ``asynchronous``: the handler is a coroutine; ``concurrency``: so many of them at once.
    - ``key_lanes``: so many in each partition of a log.
    """

    kind: Kind = "database"
    guarantee: GuaranteeName = "at-least-once"
    ordered: bool = False
    hold: bool = False
    messages: int = 3
    workers: int = 1
    batch: int = 10
    batch_handler: bool = False
    manners: tuple[Manner, ...] = ("ok",)
    within: bool = False
    conflicts: bool = False
    horizon: bool = False
    preempt: float = 0.0
    payloads: bool = False
    asynchronous: bool = False
    concurrency: int = 1
    key_lanes: int = 1

    def text(self) -> str:
        """The scenario as one word for the command line."""
        parts = []
        for name, value in msgspec.structs.asdict(self).items():
            if value != getattr(PLAIN, name):
                shown = "+".join(value) if isinstance(value, tuple) else str(value)
                parts.append(f"{name}={shown.replace(' ', '_')}")
        return ",".join(parts) or "kind=database"


PLAIN = Scenario()


def scenario_of(text: str) -> Scenario:
    """The scenario that `Scenario.text` wrote. Raises ValueError."""
    given: dict[str, object] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name in given:
            raise ValueError(f"{text!r} is no scenario: it says {name} twice")
        value = value.replace("_", " ") if name == "manners" else value
        given[name] = value.split("+") if name == "manners" else value
    try:
        scenario = msgspec.convert(given, Scenario, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"{text!r} is no scenario: {error}") from None
    _check(scenario, text)
    return scenario


def _check(scenario: Scenario, text: str) -> None:
    for name in ("messages", "workers", "batch", "concurrency", "key_lanes"):
        if getattr(scenario, name) < 1:
            raise ValueError(f"{text!r} is no scenario: {name} is 1 or more")
    if not scenario.manners:
        raise ValueError(f"{text!r} is no scenario: manners has at least one")
    if not 0.0 <= scenario.preempt <= 1.0:
        raise ValueError(f"{text!r} is no scenario: preempt is a probability")
    if scenario.kind == "queue" and (scenario.ordered or scenario.guarantee == "at-most-once"):
        raise ValueError(
            f"{text!r} is no scenario: a queue neither orders by key nor confirms settlements, and "
            "the contract refuses what needs that"
        )


def any_scenario(random: Random, kinds: tuple[Kind, ...]) -> Scenario:
    """One that makes sense, out of all of them."""
    # Files are some eight times as slow as memory: fewer of them, and more of all.
    kind = random.choices(kinds, [1 if each in SQLITE_KINDS else 4 for each in kinds])[0]
    # A queue neither confirms settlements nor orders; the contract refuses what needs that.
    guarantee = random.choice(GUARANTEES[1:] if kind == "queue" else GUARANTEES)
    if kind in ("postgres-inbox", "postgres-cursor"):
        guarantee = "exactly-once"  # only a store is there
    return any_of(random, kind, guarantee)


def any_of(random: Random, kind: Kind, guarantee: GuaranteeName) -> Scenario:
    """One of a kind and guarantee; without exactly-once there is nothing to admit."""
    exactly = guarantee == "exactly-once"
    if not exactly:
        kind = _WITHOUT_STORE.get(kind, kind)
    ordered = kind not in ("queue", "postgres-inbox") and random.random() < 0.4
    rough = random.random() < 0.6
    by_inbox = exactly and kind in ("log-inbox", "queue", "sqlite-inbox", "postgres-inbox")
    by_cursor = exactly and kind in ("log", "sqlite-cursor", "postgres-cursor")
    horizon = by_inbox and random.random() < 0.2
    batch_handler = random.random() < 0.2
    asynchronous = random.random() < 0.3
    many = asynchronous and not exactly and not batch_handler and random.random() < 0.7
    hold = ordered and guarantee != "at-most-once" and random.random() < 0.4
    # What is held waits behind its partition's dead letter, or its lane's.
    cut = exactly and not hold and kind in _LOGS and random.random() < 0.4
    return Scenario(
        kind=kind,
        guarantee=guarantee,
        ordered=ordered,
        hold=hold,
        messages=random.randint(2, 8),
        workers=random.randint(1, 3),
        batch=random.choice((1, 2, 3, 10)),
        batch_handler=batch_handler,
        manners=tuple(random.choices(MANNERS, k=3)) if rough else ("ok",),
        within=exactly and kind in ("database", "sqlite", "postgres") and random.random() < 0.5,
        conflicts=exactly and not by_cursor and not horizon and random.random() < 0.2,
        horizon=horizon,
        preempt=random.choice((0.0, 0.05, 0.2)),
        asynchronous=asynchronous,
        concurrency=random.choice((2, 4)) if many else 1,
        key_lanes=random.choice((2, 3)) if cut else 1,
    )


_LOGS: tuple[Kind, ...] = ("log", "log-inbox", "sqlite-cursor", "postgres-cursor")

_WITHOUT_STORE: dict[Kind, Kind] = {
    "log-inbox": "log",
    "sqlite-inbox": "sqlite",
    "sqlite-cursor": "log",
}
