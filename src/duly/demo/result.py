"""`Result`: what a run showed, weighed: was every promise kept, and was it put to the test?"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from duly.demo.verdict import Judgement, Verdict

KEPT, BROKEN, NOT_SHOWN = 0, 1, 3
"""Exit statuses. 2 is the command line's own, for wrong use."""

_STATUSES: Mapping[Verdict, int] = {"valid": KEPT, "invalid": BROKEN, "unknown": NOT_SHOWN}

# In work: claims that the killer saw in the stopped victim's hands, and that the database shows
# were given out again because this worker died.
_IN_WORK = """
select count(*) from book.kills k
where exists (select 1 from book.held h where h.kill = k.number) and exists (
    select 1 from shop.duly_incidents i where i.kind = 'redelivery' and i.worker = k.worker
)
"""


@dataclass(frozen=True, slots=True)
class Deaths:
    """How many workers were killed, how many of them in work, and with a transaction open."""

    kills: int
    in_work: int
    in_transaction: int

    @classmethod
    def of(cls, evidence: sqlite3.Connection) -> Deaths:
        """As the database shows it."""
        (kills, in_transaction) = evidence.execute(
            "select count(*), coalesce(sum(in_transaction), 0) from book.kills"
        ).fetchone()
        (in_work,) = evidence.execute(_IN_WORK).fetchone()
        return cls(kills, in_work, in_transaction)


@dataclass(frozen=True, slots=True)
class Flow:
    """One flow with its verdict. ``why`` says what was broken, or what was not shown."""

    judgement: Judgement
    messages_per_s: float
    verdict: Verdict
    why: Sequence[str]


@dataclass(frozen=True, slots=True)
class Result:
    """A whole run. ``why`` are the reasons for which it shows nothing, none if it does."""

    seconds: float
    deaths: Deaths
    flows: Sequence[Flow]
    why: Sequence[str]

    @property
    def verdict(self) -> Verdict:
        """Invalid when any flow is, else unknown when any is, else valid."""
        found = {flow.verdict for flow in self.flows}
        return "invalid" if "invalid" in found else "unknown" if "unknown" in found else "valid"

    @property
    def exit_status(self) -> int:
        """0: every promise was kept. 1: one was broken. 3: the run does not show it."""
        return _STATUSES[self.verdict]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "verdict": self.verdict,
            "why": list(self.why),
            "kills": self.deaths.kills,
            "kills_in_work": self.deaths.in_work,
            "kills_in_transaction": self.deaths.in_transaction,
            "seconds": round(self.seconds, 2),
            "flows": [_as_json(flow) for flow in self.flows],
        }


def _as_json(flow: Flow) -> dict[str, Any]:
    found = flow.judgement
    return {
        "name": found.name,
        "guarantee": found.guarantee.value,
        "published": found.published,
        "handled": found.handled,
        "lost": found.lost,
        "duplicated": found.duplicated,
        "messages_per_s": round(flow.messages_per_s),
        "verdict": flow.verdict,
        "why": list(flow.why),
        "kills_in_work": found.hits,
    }


def weigh(
    judgements: Sequence[Judgement],
    deaths: Deaths,
    seconds: float,
    rates: Mapping[str, float],
) -> Result:
    """Give each flow its verdict. ``rates`` are messages a second by consumer."""
    why = _not_shown(judgements, deaths)
    flows = []
    for found in judgements:
        verdict, reasons = _verdict(found, why)
        flows.append(Flow(found, rates.get(found.consumer, 0.0), verdict, reasons))
    return Result(seconds, deaths, flows, why)


def _not_shown(judgements: Sequence[Judgement], deaths: Deaths) -> Sequence[str]:
    """Why this run does not show that the promises hold under kills."""
    why = []
    if not deaths.kills:
        why.append("no worker was killed, so nothing was put to the test")
    elif deaths.in_work * 2 < deaths.kills:
        why.append(
            f"only {deaths.in_work} of {deaths.kills} kills hit a worker with work in its hands"
        )
    if deaths.kills and not any(f.duplicated for f in judgements if f.consumer == "notify"):
        why.append(
            "the handler that is not idempotent repeated nothing, so no kill was seen to matter"
        )
    return why


def _verdict(found: Judgement, not_shown: Sequence[str]) -> tuple[Verdict, Sequence[str]]:
    if found.broken:
        return "invalid", found.broken
    if not found.published:
        return "unknown", ("nothing was published", *not_shown)
    if not_shown:
        return "unknown", not_shown
    if not (found.hits or found.lost):
        return "unknown", ("no kill hit this flow",)
    return "valid", ()
