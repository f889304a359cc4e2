"""What is simulated: a broker, a guarantee, a handler's manners, and how many take part."""

from __future__ import annotations

from random import Random
from typing import Literal, get_args

import msgspec

from duly.guarantees import GuaranteeName

Kind = Literal["database", "log", "log-inbox", "queue", "sqlite", "sqlite-inbox"]
"""The broker and how its messages are admitted: by claim, by cursor, by inbox, by inbox; and
SQLite, by claim in the broker's own file and by inbox in another."""

Manner = Literal[
    "ok",
    "fail once",
    "fail always",
    "retry",
    "reject",
    "cancel once",
    "die once",
    "die always",
    "slow",
    "undecodable",
]
"""What the handler does with a message."""

MANNERS: tuple[Manner, ...] = get_args(Manner)
MEMORY_KINDS: tuple[Kind, ...] = ("database", "log", "log-inbox", "queue")
GUARANTEES: tuple[GuaranteeName, ...] = get_args(GuaranteeName)


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One small world. ``manners`` are given to the messages in turn.

    - ``batch``: messages claimed together; ``batch_handler``: and handled in one call.
    - ``within``: some are published inside a transaction, several at once.
    - ``conflicts``: some ids are published again with another body.
    - ``horizon``: the inbox forgets before the end of the run.
    - ``preempt``: how often a process is interrupted by another between two statements.
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
        value = value.replace("_", " ") if name == "manners" else value
        given[name] = value.split("+") if name == "manners" else value
    try:
        return msgspec.convert(given, Scenario, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"{text!r} is no scenario: {error}") from None


def any_scenario(random: Random, kinds: tuple[Kind, ...] = MEMORY_KINDS) -> Scenario:
    """One that makes sense, out of all of them."""
    kind = random.choice(kinds)
    # A queue neither confirms settlements nor orders; the contract refuses what needs that.
    guarantee = random.choice(GUARANTEES[1:] if kind == "queue" else GUARANTEES)
    exactly = guarantee == "exactly-once"
    if kind in ("log-inbox", "sqlite-inbox") and not exactly:
        kind = "log" if kind == "log-inbox" else "sqlite"
    ordered = kind != "queue" and random.random() < 0.4
    rough = random.random() < 0.6
    by_inbox = kind in ("log-inbox", "queue", "sqlite-inbox") and exactly
    # The store on SQLite ages its inbox by the machine's clock, which does not pass here.
    horizon = by_inbox and kind != "sqlite-inbox" and random.random() < 0.2
    return Scenario(
        kind=kind,
        guarantee=guarantee,
        ordered=ordered,
        hold=ordered and _may_hold(kind, guarantee) and random.random() < 0.4,
        messages=random.randint(2, 8),
        workers=random.randint(1, 3),
        batch=random.choice((1, 2, 3, 10)),
        batch_handler=random.random() < 0.2,
        manners=_any_manners(random, guarantee) if rough else ("ok",),
        within=exactly and kind in ("database", "sqlite") and random.random() < 0.5,
        conflicts=exactly and kind != "log" and not horizon and random.random() < 0.2,
        horizon=horizon,
        preempt=random.choice((0.0, 0.05, 0.2)),
    )


def _any_manners(random: Random, guarantee: GuaranteeName) -> tuple[Manner, ...]:
    manners = list(MANNERS)
    if guarantee == "at-most-once":
        # A handler that cancels itself takes with it what was claimed and settled beside its
        # message; whether that may be is not for random schedules to say again and again.
        manners.remove("cancel once")
    return tuple(random.choices(manners, k=3))


def _may_hold(kind: Kind, guarantee: GuaranteeName) -> bool:
    # By cursor the dead letter is the store's, and the broker that should hold the key learns of
    # it after the commit: whoever takes over in between finds the message passed, and goes on.
    by_cursor = kind == "log" and guarantee == "exactly-once"
    return guarantee != "at-most-once" and not by_cursor
