"""A history, indexed for the questions that the properties ask of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

from duly.guarantees import Admission, Guarantee
from duly.testing.history import (
    About,
    Admit,
    Claim,
    Commit,
    Dropped,
    Effect,
    End,
    Event,
    Fault,
    Final,
    Heal,
    Identity,
    Phase,
    Planned,
    Publish,
    Read,
    Reported,
    Settle,
    Start,
)

DEATHS = frozenset({"crash", "vanish", "hang"})
STOPS = frozenset({"stop", "pause"})
"""Kinds of faults after which a process goes on with nothing: its death is known to the others
at once, or not; or it hangs.
"""


@dataclass(frozen=True, slots=True)
class Terms:
    """What was promised, and what lies in the broker's nature (its allow-list).

    - ``topics``: those the subscription reads; messages of others are its outputs.
    - ``drops_repeats``: a repeated publish is dropped by the broker.
    - ``repeats_count``: a publish that is repeated is another message, with an effect of its own.
    - ``relays_once``: what transactions publish is stored once, whatever befalls who relays it.
    - ``confirms_publishing``: a publish that ended ok is stored, and not only sent.
    - ``keeps_send_order``: messages of one publisher and key are read in the order published.
    - ``confirms_settlement``: a message that was settled is not delivered again.
    - ``hands_out_once``: what an at-most-once subscription claims has left the broker: who dies
      with it loses it. Its queue is its own, and is given copies that no log has. A fault of the
      kinds in ``loses_waiting`` loses what waits there, and what is given back to it.
    - ``may_duplicate``: the broker may deliver a message twice by itself.
    - ``keeps_attempts``: the count of a message's starts survives whatever befalls a worker.
    - ``holds_partition``: what holds a key holds all keys of its partition.
    - ``tables``: every run that commits writes one row to each; ``has_output``: and publishes
      one message.
    - ``batch_handler``: a failed call of many is followed by one call each, in one attempt.
    - ``max_run_s``: a handler that is cancelled after so long has failed.
    - ``crash_points``: those that the run must have reached.
    """

    guarantee: Guarantee
    subscription: str = "c"
    topics: frozenset[str] = frozenset({"t"})
    admission: Admission | None = None
    order_by_key: bool = False
    hold_key_on_dead: bool = False
    attempts: int = 10
    inbox_retention_s: float | None = None
    drops_repeats: bool = False
    repeats_count: bool = False
    relays_once: bool = False
    confirms_publishing: bool = True
    keeps_send_order: bool = True
    confirms_settlement: bool = True
    hands_out_once: bool = False
    loses_waiting: frozenset[str] = frozenset()
    may_duplicate: bool = False
    keeps_attempts: bool = True
    holds_partition: bool = False
    tables: tuple[str, ...] = ()
    has_output: bool = False
    batch_handler: bool = False
    max_run_s: float = inf
    crash_points: frozenset[str] = frozenset()


@dataclass(slots=True)
class Published:
    """One try to publish one message. ``ended`` is where in the history its outcome stands."""

    who: str
    message: About
    tx: str
    invoked: int
    ended: int | None = None
    outcome: Phase = "info"
    repeat: bool = False


@dataclass(slots=True)
class Run:
    """One start of the handler. ``how`` is None for one that was killed."""

    at: int
    start: Start
    ended: int | None = None
    how: str | None = None


@dataclass(slots=True)
class Tx:
    """One transaction. ``outcome``: ok, fail or info."""

    admitted: int | None = None
    admit: Admit | None = None
    committing: int | None = None
    ended: int | None = None
    outcome: Phase = "fail"


@dataclass(slots=True)
class Case:
    """What the properties are judged on. Places are indices into ``events``."""

    events: Sequence[Event]
    terms: Terms
    final: Final = field(default_factory=Final)
    publishes: dict[Identity, list[Published]] = field(default_factory=dict)
    claims: list[tuple[int, Claim]] = field(default_factory=list)
    claim_of: dict[str, tuple[int, Claim]] = field(default_factory=dict)
    # When each was made, by token, as far as anybody can know.
    made: dict[str, int] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    run_of: dict[str, Run] = field(default_factory=dict)
    settles: dict[str, list[tuple[int, Settle]]] = field(default_factory=dict)
    txs: dict[str, Tx] = field(default_factory=dict)
    faults: list[tuple[int, Fault]] = field(default_factory=list)
    planned: set[str] = field(default_factory=set)
    effects: list[Effect] = field(default_factory=list)
    reported: list[Reported] = field(default_factory=list)
    dropped: set[Identity] = field(default_factory=set)
    was_read: bool = False
    others_claims: list[tuple[int, Claim]] = field(default_factory=list)
    asked: dict[tuple[str, int], int] = field(default_factory=dict)

    # --- what the properties ask

    def inputs(self) -> Iterator[tuple[Identity, list[Published]]]:
        """What was published to the topics that the subscription reads."""
        for identity, tries in self.publishes.items():
            if identity[0] in self.terms.topics:
                yield identity, tries

    def outcome(self, publish: Published) -> Phase:
        """How a try to publish ended; in a transaction its commit decides."""
        if not publish.tx or publish.outcome in ("fail", "ok"):
            return publish.outcome
        tx = self.txs.get(publish.tx)
        return "fail" if tx is None else tx.outcome

    def seen(self) -> Iterator[tuple[int, About]]:
        """Every message that anybody was given, with its place, and all that was read."""
        for at, claim in [*self.claims, *self.others_claims]:
            if claim.message is not None:
                yield at, claim.message
        for message in self.final.log:
            yield len(self.events), message

    def seen_contents(self) -> set[tuple[Identity, str]]:
        """What was seen; two bodies under one id are two."""
        return {(message.identity, message.content) for _, message in self.seen()}

    def must(self) -> Iterator[Identity]:
        """Messages that certainly are published: the outcome says so, or they were seen."""
        seen = self.seen_contents()
        seen_txs = {
            each.tx
            for tries in self.publishes.values()
            for each in tries
            if each.tx and (each.message.identity, each.message.content) in seen
        }
        for identity, tries in self.inputs():
            if any(self._stands(each, seen, seen_txs) for each in tries):
                yield identity

    def _stands(self, each: Published, seen: set[tuple[Identity, str]], seen_txs: set[str]) -> bool:
        outcome = self.outcome(each)
        mine = (each.message.identity, each.message.content) in seen
        return outcome == "ok" or (outcome == "info" and (mine or each.tx in seen_txs))

    def copies(self) -> Counter[Identity]:
        """How often each message stands in the log."""
        return Counter(message.identity for message in self.final.log)

    def dead(self) -> set[Identity]:
        """What the subscription gave up on."""
        mine = self.terms.subscription
        return {d.message.identity for d in self.final.dead if d.subscription == mine}

    def held(self) -> list[Identity]:
        """Each copy that waits behind a dead letter that holds its key, as it was declared to."""
        if not self.terms.hold_key_on_dead:
            return []
        dead, mine = self.dead(), [m for m in self.final.log if m.topic in self.terms.topics]
        held: list[Identity] = []
        held_keys: set[tuple[str, str | None]] = set()
        for message in mine:
            line = (message.topic, None if self.terms.holds_partition else message.key)
            if line in held_keys:
                held.append(message.identity)
            elif message.identity in dead:
                held_keys.add(line)
        return held

    def runs_by_identity(self) -> dict[Identity, list[Run]]:
        """The runs of each message, in order."""
        found: dict[Identity, list[Run]] = defaultdict(list)
        for run in self.runs:
            found[run.start.message.identity].append(run)
        return found

    def settled(self, token: str, *kinds: str) -> int | None:
        """Where the settlement of a claim was confirmed, as one of ``kinds``; None: nowhere."""
        for at, settle in self.settles.get(token, ()):
            if settle.phase == "ok" and settle.kind in kinds:
                return at
        return None

    def superseded(self, token: str, *, surely: bool = False) -> int | None:
        """Where another claim took the message of this one; None: nowhere. ``surely``: not one that
        may have been made before, and was only told of there: see `made_at`.
        """
        if token not in self.claim_of:
            return None
        at, mine = self.claim_of[token]
        assert mine.message is not None, "deliveries have messages"
        for later, other in self.claims:
            if later > at and other.message is not None and other.token != token:
                same = other.message.identity == mine.message.identity
                made = self.made.get(other.token, later) if surely else later
                if same and other.position == mine.position and made > at:
                    return later
        return None

    def made_at(self, at: int, claim: Claim) -> int:
        """When a claim was made that came back there: a process that stood still between asking and
        telling of it may have had it all the while.
        """
        asked = self.asked.get((claim.who, claim.asking), at)
        stood = any(
            asked < place < at and fault.who == claim.who and fault.kind in STOPS
            for place, fault in self.faults
        )
        return asked if stood else at

    def died(self, who: str, after: int) -> int | None:
        """Where a process died, behind a place."""
        for at, fault in self.faults:
            if at > after and fault.who == who and fault.kind in DEATHS:
                return at
        return None


def case_of(events: Iterable[Event], terms: Terms) -> Case:
    """Index a history. The final state is the last that was read."""
    case = Case(list(events), terms)
    tries = _Tries(case)
    for at, event in enumerate(case.events):
        _note(case, tries, at, event)
    return case


class _Tries:
    """Pairs the ends of publishes with their invocations."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._open: dict[tuple[str, Identity, str], Published] = {}

    def note(self, at: int, event: Publish) -> None:
        key = (event.who, event.message.identity, event.tx)
        if event.phase == "invoke":
            each = self._open[key] = Published(event.who, event.message, event.tx, at)
            self._case.publishes.setdefault(event.message.identity, []).append(each)
        elif key in self._open:
            each = self._open.pop(key)
            each.ended, each.outcome, each.repeat = at, event.phase, event.repeat


def _note(case: Case, tries: _Tries, at: int, event: Event) -> None:  # noqa: C901, PLR0912 - one case an event
    mine = case.terms.subscription
    match event:
        case Publish():
            tries.note(at, event)
        case Claim():
            if event.phase == "invoke":
                case.asked[event.who, event.asking] = at
            elif event.phase == "ok" and event.subscription == mine:
                case.made[event.token] = case.made_at(at, event)
                case.claims.append((at, event))
                case.claim_of[event.token] = (at, event)
            elif event.phase == "ok":
                case.others_claims.append((at, event))
        case Start():
            if event.subscription == mine:
                run = Run(at, event)
                case.runs.append(run)
                case.run_of[event.run] = run
        case End():
            if event.run in case.run_of:
                run = case.run_of[event.run]
                run.ended = at
                run.how = None if event.how == "killed" else event.how
        case Settle():
            if event.subscription == mine:
                case.settles.setdefault(event.token, []).append((at, event))
        case Admit():
            tx = case.txs.setdefault(event.tx, Tx())
            tx.admitted, tx.admit = at, event
        case Commit():
            _note_commit(case.txs.setdefault(event.tx, Tx()), at, event)
        case Fault():
            case.faults.append((at, event))
        case Planned():
            case.planned.add(event.kind)
        case Effect():
            case.effects.append(event)
        case Reported():
            case.reported.append(event)
        case Dropped():
            case.dropped.add(event.message.identity)
        case Read():
            case.final, case.was_read = event.final, True
        case Heal():
            pass


def _note_commit(tx: Tx, at: int, event: Commit) -> None:
    if event.phase == "invoke":
        # Unknown until its end says otherwise; a process that dies here leaves it so.
        tx.committing, tx.outcome = at, "info"
    elif tx.ended is None:
        tx.ended, tx.outcome = at, event.phase
